//! Forward and backward through the block loop: one transformer block's gradients at a time.
//!
//! Gradients are those of the **sum** of the loss over the micro-batch's trained tokens. The division by the global
//! count of trained tokens happens in the optimizer update, in f32 whatever the compute precision, so every
//! micro-batch is weighted alike and the count need not be known while gradients are made.
//!
//! With [`Recompute::Full`] only the blocks' inputs are kept and each block's forward is run again, with a tape, when
//! its gradient is due; with [`Recompute::None`] every block's tape is kept. The arithmetic is the same.

use crate::Error;
use crate::config::{Compute, Recompute};
use crate::micro_batch::MicroBatch;
use crate::params::ParamStore;
use crate::source::{Leaves, TrainSource};
use burn::tensor::{DType, Tensor};
use hearth_model::rope::Rope;
use hearth_model::{Architecture, DocumentContext, Group};

/// Takes the gradient of a trained parameter, by its place in [`ParamStore::trained`].
pub type Sink<'a> = dyn FnMut(usize, Vec<f32>) + 'a;

/// A model and how it is run.
pub struct BlockLoop<'a> {
    /// The model.
    pub arch: &'a dyn Architecture,
    /// Its parameters.
    pub store: &'a ParamStore,
    /// Its position embedding.
    pub rope: &'a Rope,
    /// What is kept of the forward pass.
    pub recompute: Recompute,
    /// Key of this micro-batch's dropout masks; `None` outside training.
    pub dropout: Option<u64>,
}

/// A part of the model between its forward and its backward pass.
struct Taped {
    /// What it was fed; tracked if anything before it is trained.
    input: Tensor<2>,
    output: Tensor<2>,
    leaves: Leaves,
}

impl BlockLoop<'_> {
    /// Sum of the loss over the trained tokens. No tape.
    ///
    /// # Errors
    /// Those of the weight source.
    pub fn loss(&self, batch: &MicroBatch) -> Result<f64, Error> {
        let mut context = DocumentContext::new(self.rope, &batch.documents);
        let mut source = self.source(false);
        let mut x = self.compute(self.arch.embedding(&mut source)?.forward(&batch.ids));
        for i in 0..self.arch.num_blocks() {
            x = self.arch.block(i, &mut source)?.forward(x, &mut context);
        }
        Ok(scalar(self.arch.head(&mut source)?.nll_sum(x, batch.targets.clone())))
    }

    /// Sum of the loss over the trained tokens. Each trained parameter's gradient goes to `sink` exactly once, as
    /// soon as it is complete: head, blocks from the last to the first, embedding. A tied embedding's gradient is
    /// `head + embedding`, in this order.
    ///
    /// # Errors
    /// Those of the weight source.
    pub fn gradients(&self, batch: &MicroBatch, sink: &mut Sink<'_>) -> Result<f64, Error> {
        let mut context = DocumentContext::new(self.rope, &batch.documents);
        let embedding = self.embed(batch)?;
        let mut x = embedding.output.clone().inner();
        let track_first = !embedding.leaves.is_empty();
        let (mut inputs, mut taped) = (Vec::new(), Vec::new());
        for i in 0..self.arch.num_blocks() {
            match self.recompute {
                Recompute::Full => {
                    inputs.push(x.clone());
                    x = self.arch.block(i, &mut self.source(false))?.forward(x, &mut context);
                }
                Recompute::None => {
                    let block = self.block(i, x, i > 0 || track_first, &mut context)?;
                    x = block.output.clone().inner();
                    taped.push(block);
                }
            }
        }
        let mut tied = None;
        let (loss, mut upstream) =
            self.head(x, batch, &mut |index, gradient| match self.store.trained()[index].group {
                Group::Embedding => tied = Some((index, gradient)),
                _ => sink(index, gradient),
            })?;
        for i in (0..self.arch.num_blocks()).rev() {
            let Some(dy) = upstream else { break };
            let block = match inputs.pop() {
                Some(input) => self.block(i, input, i > 0 || track_first, &mut context)?,
                None => taped.pop().expect("one tape per block"),
            };
            upstream = block.backward(dy, sink);
        }
        self.embedding_gradient(embedding, upstream, tied, sink);
        Ok(loss)
    }

    fn embed(&self, batch: &MicroBatch) -> Result<Taped, Error> {
        let mut source = self.source(true);
        let output = self.compute(self.arch.embedding(&mut source)?.forward(&batch.ids));
        Ok(Taped { input: output.clone().inner(), output, leaves: source.into_leaves() })
    }

    /// Block `i` with a tape.
    fn block(
        &self,
        i: usize,
        input: Tensor<2>,
        track_input: bool,
        context: &mut DocumentContext,
    ) -> Result<Taped, Error> {
        let input = if track_input { input.autodiff().require_grad() } else { input };
        let mut source = self.source(true);
        let output = self.arch.block(i, &mut source)?.forward(input.clone(), context);
        Ok(Taped { input, output, leaves: source.into_leaves() })
    }

    /// Loss, and the gradient of the last block's output.
    fn head(
        &self,
        x: Tensor<2>,
        batch: &MicroBatch,
        sink: &mut Sink<'_>,
    ) -> Result<(f64, Option<Tensor<2>>), Error> {
        let x = x.autodiff().require_grad();
        let mut source = self.source(true);
        let nll = self.arch.head(&mut source)?.nll_sum(x.clone(), batch.targets.clone());
        let mut gradients = nll.backward();
        source.into_leaves().take(&mut gradients, sink);
        Ok((scalar(nll.inner()), x.grad_remove(&mut gradients)))
    }

    fn embedding_gradient(
        &self,
        embedding: Taped,
        upstream: Option<Tensor<2>>,
        mut tied: Option<(usize, Vec<f32>)>,
        sink: &mut Sink<'_>,
    ) {
        if let Some(dy) = upstream {
            embedding.backward(dy, &mut |index, mut gradient| {
                if let Some((_, mut sum)) = tied.take_if(|(head, _)| *head == index) {
                    crate::gradients::add(&mut sum, &gradient);
                    gradient = sum;
                }
                sink(index, gradient);
            });
        }
    }

    fn source(&self, tape: bool) -> TrainSource<'_> {
        TrainSource::new(self.store, tape, self.dropout)
    }

    /// A packed embedding answers in f32.
    fn compute(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = match self.store.compute() {
            Compute::F32 => DType::F32,
            Compute::Bf16 => DType::BF16,
        };
        if x.dtype() == dtype { x } else { x.cast(dtype) }
    }
}

impl Taped {
    /// Runs the tape back from `dy` by way of the surrogate `⟨output, dy⟩`, whose gradients are the wanted ones.
    /// Returns the gradient of the input, if it was tracked.
    fn backward(self, dy: Tensor<2>, sink: &mut Sink<'_>) -> Option<Tensor<2>> {
        if !self.output.is_tracked() {
            return None;
        }
        let mut gradients = (self.output * Tensor::from_inner(dy)).sum().backward();
        self.leaves.take(&mut gradients, sink);
        self.input.grad_remove(&mut gradients)
    }
}

fn scalar(x: Tensor<1>) -> f64 {
    x.into_data().try_into_vec_as::<f32>().expect("a loss is a readable number")[0] as f64
}
