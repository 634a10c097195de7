//! Forward and backward through the block loop: one transformer block's gradients at a time.
//!
//! Gradients are those of the **sum** of the objective's loss over the micro-batch, times the loss scale. The division
//! by the global count of what it counts (trained tokens, or pairs) happens in the optimizer update, in f32 whatever the
//! compute precision, so every micro-batch is weighted alike and the count need not be known while gradients are made.
//!
//! With [`Recompute::Full`] only the blocks' inputs are kept and each block's forward is run again, with a tape, when
//! its gradient is due; with [`Recompute::None`] every block's tape is kept, its weights with it. The arithmetic is the
//! same. Weights are brought by a [`Conveyor`] just before they are used and let go after.

use crate::Error;
use crate::activations::{Meter, Phase, Working};
use crate::config::Recompute;
use crate::copies::{Conveyor, View};
use crate::flat::Flat;
use crate::micro_batch::MicroBatch;
use crate::objective::{Objective, Sums, nll_of_each, scalar};
use crate::params::ParamStore;
pub use crate::source::Gradient;
use crate::source::{Leaves, TrainSource};
use burn::tensor::Tensor;
use hearth_collective::Ordered;
use hearth_model::layers::Head;
use hearth_model::rope::Rope;
use hearth_model::{Architecture, DocumentContext, Group};
use std::sync::Arc;

/// Takes the gradient of a trained parameter, by its place in [`ParamStore::trained`].
pub type Sink<'a> = dyn FnMut(usize, Gradient) -> Result<(), Error> + 'a;

/// A model and how it is run.
pub struct BlockLoop<'a> {
    /// The model.
    pub arch: &'a dyn Architecture,
    /// Its parameters.
    pub store: &'a ParamStore,
    /// The ranks that share them.
    pub comm: &'a Ordered,
    /// What the loss is made of.
    pub objective: &'a dyn Objective,
    /// Its position embedding.
    pub rope: &'a Rope,
    /// What is kept of the forward pass.
    pub recompute: Recompute,
    /// Key of this micro-batch's dropout masks; `None` outside training.
    pub dropout: Option<u64>,
    /// Run the frozen model alone, without its adapter; only where there is one, and never for gradients.
    pub base: bool,
    /// What the loss is multiplied by before the backward pass; 1 unless 16-bit gradients could underflow.
    pub loss_scale: f32,
    /// Who is told what the activations take.
    pub meter: &'a Meter,
}

/// A part of the model between its forward and its backward pass.
struct Taped {
    /// What it was fed; tracked if anything before it is trained.
    input: Tensor<2>,
    output: Tensor<2>,
    leaves: Leaves,
    /// The weights it borrows.
    _views: Vec<View>,
    /// What its tape is charged.
    kept: Option<Working>,
}

impl BlockLoop<'_> {
    /// The objective's sums. No tape.
    ///
    /// # Errors
    /// Those of the weight source, and of bringing the weights; [`Error::Config`] when the objective compares with
    /// log-likelihoods that were not computed.
    pub fn loss(&self, batch: &MicroBatch) -> Result<Sums, Error> {
        let reference = self.reference(batch)?;
        self.forward(batch, |head, x| self.objective.loss(head, x, batch, &reference).1)
    }

    /// Log-likelihood of each sequence's trained tokens. No tape.
    ///
    /// # Errors
    /// Those of the weight source, and of bringing the weights.
    pub fn log_likelihoods(&self, batch: &MicroBatch) -> Result<Vec<f64>, Error> {
        let negate = |nll| -scalar(nll);
        self.forward(batch, |head, x| nll_of_each(head, &x, batch).into_iter().map(negate).collect())
    }

    /// Log-likelihood of each sequence under the reference model: as the micro-batch knows them, else by a pass of the
    /// frozen model without its adapter. Empty if the objective does not compare.
    fn reference(&self, batch: &MicroBatch) -> Result<Arc<[f64]>, Error> {
        if !self.objective.compares() || !batch.reference.is_empty() {
            return Ok(batch.reference.clone());
        }
        if self.store.lora().is_none() {
            return Err(Error::Config(
                "the reference log-likelihoods of a sequence are not known: with every weight trained they are computed \
                 before the first step, for the training and the validation data only"
                    .into(),
            ));
        }
        let base = BlockLoop { base: true, dropout: None, ..*self };
        base.log_likelihoods(batch).map(Arc::from)
    }

    /// Runs the model without a tape, and `finish` over its head and the last block's output.
    fn forward<T>(&self, batch: &MicroBatch, finish: impl FnOnce(&Head, Tensor<2>) -> T) -> Result<T, Error> {
        let blocks = (0..self.arch.num_blocks()).map(Group::Block);
        let steps = [Group::Embedding].into_iter().chain(blocks).chain([Group::Head]);
        // An adapter's parameters are all that is brought.
        let mut conveyor = self.store.conveyor(self.comm, steps.filter(|_| !self.base));
        let mut context = DocumentContext::new(self.rope, &batch.documents);
        let mut x = self.embed(batch, &mut conveyor)?;
        for i in 0..self.arch.num_blocks() {
            let _working = self.meter.enter(Phase::BlockForward)?;
            x = self.block_forward(i, x, &mut context, &mut conveyor)?;
        }
        let _working = self.meter.enter(Phase::HeadForward)?;
        let views = self.bring(Group::Head, &mut conveyor)?;
        let head = self.arch.head(&mut self.source(&views, false))?;
        Ok(finish(&head, x))
    }

    /// The objective's sums. Each trained parameter's gradient goes to `sink` exactly once, as
    /// soon as it is complete: head, blocks from the last to the first, embedding. A tied embedding's gradient is
    /// `head + embedding`, in this order.
    ///
    /// # Errors
    /// Those of [`BlockLoop::loss`], and of `sink`.
    pub fn gradients(&self, batch: &MicroBatch, sink: &mut Sink<'_>) -> Result<Sums, Error> {
        let reference = self.reference(batch)?;
        let mut conveyor = self.store.conveyor(self.comm, self.script());
        let mut context = DocumentContext::new(self.rope, &batch.documents);
        let mut x = self.embed(batch, &mut conveyor)?;
        let train_embedding = self.store.trains(Group::Embedding);
        let (mut inputs, mut taped, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        if self.recompute == Recompute::None {
            kept.push(self.meter.enter(Phase::Input)?);
        }
        for i in 0..self.arch.num_blocks() {
            match self.recompute {
                Recompute::Full => {
                    kept.push(self.meter.enter(Phase::Input)?);
                    inputs.push(x.clone());
                    let _working = self.meter.enter(Phase::BlockForward)?;
                    x = self.block_forward(i, x, &mut context, &mut conveyor)?;
                }
                Recompute::None => {
                    let tape = self.meter.enter(Phase::Tape)?;
                    let _working = self.meter.enter(Phase::Taping)?;
                    let mut block =
                        self.block_taped(i, x, i > 0 || train_embedding, &mut context, &mut conveyor)?;
                    x = block.output.clone().inner();
                    block.kept = Some(tape);
                    taped.push(block);
                }
            }
        }
        let (mut tied, mut tied_kept) = (None, None);
        let (sums, mut upstream) = {
            let working = self.meter.enter(Phase::Head)?;
            self.head(x, batch, &reference, working, &mut conveyor, &mut |index, gradient| match self
                .store
                .trained()[index]
                .group
            {
                Group::Embedding => {
                    let gradient = gradient.into_f32();
                    tied_kept = Some(self.meter.hold(&gradient)?);
                    tied = Some((index, gradient));
                    Ok(())
                }
                _ => sink(index, gradient),
            })?
        };
        for i in (0..self.arch.num_blocks()).rev() {
            let Some(dy) = upstream else { break };
            let working = match self.recompute {
                Recompute::Full => self.meter.enter(Phase::BlockAgain)?,
                Recompute::None => self.meter.enter(Phase::BlockBackward)?,
            };
            let block = match inputs.pop() {
                Some(input) => {
                    self.block_taped(i, input, i > 0 || train_embedding, &mut context, &mut conveyor)?
                }
                None => taped.pop().expect("one tape per block"),
            };
            upstream = block.backward(dy, working, sink)?;
            if self.recompute == Recompute::Full {
                kept.pop();
            }
        }
        if let Some(dy) = upstream.filter(|_| train_embedding) {
            let working = self.meter.enter(Phase::Embedding)?;
            self.embedding_gradient(
                batch,
                dy,
                tied.map(|(at, sum)| (at, sum, tied_kept)),
                working,
                &mut conveyor,
                sink,
            )?;
        }
        Ok(sums)
    }

    /// The order in which [`BlockLoop::gradients`] uses the weights.
    fn script(&self) -> Vec<Group> {
        let blocks = 0..self.arch.num_blocks();
        let mut steps = vec![Group::Embedding];
        steps.extend(blocks.clone().map(Group::Block));
        steps.push(Group::Head);
        if self.recompute == Recompute::Full {
            steps.extend(blocks.rev().map(Group::Block));
        }
        if self.store.trains(Group::Embedding) {
            steps.push(Group::Embedding);
        }
        steps
    }

    /// The weights of the script's next step.
    fn bring(&self, group: Group, conveyor: &mut Conveyor<'_>) -> Result<Vec<View>, Error> {
        if self.base {
            return Ok(Vec::new());
        }
        self.store.units_for(group).into_iter().map(|unit| conveyor.next(unit)).collect()
    }

    fn source<'s>(&'s self, views: &'s [View], tape: bool) -> TrainSource<'s> {
        TrainSource::new(self.store, views, tape, self.dropout).without_adapter(self.base)
    }

    fn embed(&self, batch: &MicroBatch, conveyor: &mut Conveyor<'_>) -> Result<Tensor<2>, Error> {
        let views = self.bring(Group::Embedding, conveyor)?;
        let mut source = self.source(&views, false);
        Ok(self.compute(self.arch.embedding(&mut source)?.forward(&batch.ids)))
    }

    /// Block `i` without a tape.
    fn block_forward(
        &self,
        i: usize,
        x: Tensor<2>,
        context: &mut DocumentContext,
        conveyor: &mut Conveyor<'_>,
    ) -> Result<Tensor<2>, Error> {
        let views = self.bring(Group::Block(i), conveyor)?;
        let mut source = self.source(&views, false);
        Ok(self.arch.block(i, &mut source)?.forward(x, context))
    }

    /// Block `i` with a tape.
    fn block_taped(
        &self,
        i: usize,
        input: Tensor<2>,
        track_input: bool,
        context: &mut DocumentContext,
        conveyor: &mut Conveyor<'_>,
    ) -> Result<Taped, Error> {
        let views = self.bring(Group::Block(i), conveyor)?;
        let input = if track_input { input.autodiff().require_grad() } else { input };
        let mut source = self.source(&views, true);
        let output = self.arch.block(i, &mut source)?.forward(input.clone(), context);
        let leaves = source.into_leaves();
        Ok(Taped { input, output, leaves, _views: views, kept: None })
    }

    /// The objective's sums, and the gradient of the last block's output.
    fn head(
        &self,
        x: Tensor<2>,
        batch: &MicroBatch,
        reference: &[f64],
        mut working: Working,
        conveyor: &mut Conveyor<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<(Sums, Option<Tensor<2>>), Error> {
        let views = self.bring(Group::Head, conveyor)?;
        let x = x.autodiff().require_grad();
        let mut source = self.source(&views, true);
        let head = self.arch.head(&mut source)?;
        let (loss, sums) = self.objective.loss(&head, x.clone(), batch, reference);
        drop(head);
        let scaled = if self.loss_scale == 1.0 { loss } else { loss * self.loss_scale };
        let mut gradients = scaled.backward();
        working.only_gradients();
        source.into_leaves().take(&mut gradients, &mut working, sink)?;
        Ok((sums, x.grad_remove(&mut gradients)))
    }

    fn embedding_gradient(
        &self,
        batch: &MicroBatch,
        dy: Tensor<2>,
        mut tied: Option<(usize, Vec<f32>, Option<Working>)>,
        working: Working,
        conveyor: &mut Conveyor<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        let views = self.bring(Group::Embedding, conveyor)?;
        let mut source = self.source(&views, true);
        let output = self.compute(self.arch.embedding(&mut source)?.forward(&batch.ids));
        let leaves = source.into_leaves();
        let embedding = Taped { input: output.clone().inner(), output, leaves, _views: views, kept: None };
        embedding.backward(dy, working, &mut |index, mut gradient| {
            if let Some((_, mut sum, _held)) = tied.take_if(|(head, ..)| *head == index) {
                crate::gradients::add(&mut sum, &gradient.into_f32());
                gradient = Gradient(Flat::F32(sum));
            }
            sink(index, gradient)
        })?;
        Ok(())
    }

    /// A packed embedding answers in f32.
    fn compute(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = self.store.compute().dtype();
        if x.dtype() == dtype { x } else { x.cast(dtype) }
    }
}

impl Taped {
    /// Runs the tape back from `dy` by way of the surrogate `⟨output, dy⟩`, whose gradients are the wanted ones.
    /// Returns the gradient of the input, if it was tracked.
    fn backward(
        self,
        dy: Tensor<2>,
        mut working: Working,
        sink: &mut Sink<'_>,
    ) -> Result<Option<Tensor<2>>, Error> {
        if !self.output.is_tracked() {
            return Ok(None);
        }
        let mut gradients = (self.output * Tensor::from_inner(dy)).sum().backward();
        drop(self.kept);
        working.only_gradients();
        self.leaves.take(&mut gradients, &mut working, sink)?;
        Ok(self.input.grad_remove(&mut gradients))
    }
}
