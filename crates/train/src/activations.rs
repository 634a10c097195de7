//! What the forward and backward pass hold beside weights and gradients.
//!
//! The numbers are not estimated: [`Activations::measure`] runs one transformer block, the head and the embedding at the
//! run's own shapes and reads the heap. All blocks of a model have one shape, so a run's activations are sums of these.

use crate::Error;
use crate::config::{Recompute, TrainConfig};
use crate::copies::{Conveyor, View};
use crate::micro_batch::MicroBatch;
use crate::params::ParamStore;
use crate::source::TrainSource;
use burn::tensor::{Device, Tensor};
use hearth_memory::{Charge, Kind, Ledger, Tier, heap};
use hearth_model::rope::Rope;
use hearth_model::{Architecture, DocumentContext, Group};
use hearth_weights::TensorSource;
use serde::Serialize;
use std::time::{Duration, Instant};

/// What the model is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Keeping a block's input until its backward pass.
    Input,
    /// Keeping a block's tape until its backward pass.
    Tape,
    /// Making it.
    Taping,
    /// A block without a tape.
    BlockForward,
    /// A block's backward pass over the tape that was kept.
    BlockBackward,
    /// A block's forward pass with a tape, and its backward pass.
    BlockAgain,
    /// The head without a tape.
    HeadForward,
    /// The head, forward and backward.
    Head,
    /// The embedding's gradient.
    Embedding,
}

/// Bytes of each phase, for one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Activations {
    /// A block's input, or the gradient of its output.
    pub input: u64,
    /// A block's tape, its output included.
    pub tape: u64,
    /// Most that making a tape holds beside it.
    pub taping: u64,
    /// Most that a block's forward pass holds beside its input, its output included.
    pub block_forward: u64,
    /// Most that a block's backward pass holds beside its tape.
    pub block_backward: u64,
    /// Most that a block's forward pass with a tape and its backward pass hold.
    pub block_again: u64,
    /// What is left of a block's backward pass when its gradients are handed out.
    pub block_gradients: u64,
    /// Most that the head's loss holds.
    pub head_forward: u64,
    /// Most that the head's loss and gradients hold.
    pub head: u64,
    /// What is left when the head's gradients are handed out.
    pub head_gradients: u64,
    /// Most that the embedding's gradient holds.
    pub embedding: u64,
    /// What is left when it is handed out.
    pub embedding_gradients: u64,
    /// What the kernels keep for themselves once they have run.
    pub scratch: u64,
}

/// How long the parts of a model take on one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// A block without a tape.
    pub block_forward: Duration,
    /// A block with a tape, forward and backward.
    pub block: Duration,
    /// The head without a tape.
    pub head_forward: Duration,
    /// The head, forward and backward.
    pub head: Duration,
    /// The embedding and its gradient.
    pub embedding: Duration,
}

impl Pace {
    /// A whole micro-batch of a model with so many blocks: what `config` has computed again, and what it asks the frozen
    /// model first, included.
    pub fn micro_batch(&self, blocks: usize, config: &TrainConfig) -> Duration {
        let forwards = self.block_forward * blocks as u32;
        let again = if config.recompute == Recompute::Full { forwards } else { Duration::ZERO };
        let asked = config.objective.objective().compares() && config.adapter.is_some();
        let reference = if asked { forwards + self.head_forward } else { Duration::ZERO };
        self.block * blocks as u32 + self.head + self.embedding + again + reference
    }
}

impl Activations {
    /// Bytes of a phase at its height, and when only gradients are left.
    fn bytes(&self, phase: Phase) -> (u64, u64) {
        match phase {
            Phase::Input => (self.input, 0),
            Phase::Tape => (self.tape, 0),
            Phase::Taping => (self.taping, 0),
            Phase::BlockForward => (self.block_forward, 0),
            Phase::BlockBackward => (self.block_backward, self.block_gradients),
            Phase::BlockAgain => (self.block_again, self.block_gradients),
            Phase::HeadForward => (self.head_forward, 0),
            Phase::Head => (self.head, self.head_gradients),
            Phase::Embedding => (self.embedding, self.embedding_gradients),
        }
    }

    /// Runs one transformer block, the head and the embedding on documents of these lengths and reads the heap. Every
    /// number is zero when the process does not count its heap ([`heap::CountingAllocator`]).
    ///
    /// Only one of the three is in memory at a time: measuring takes no more than training will.
    ///
    /// # Errors
    /// Weights that cannot be read.
    ///
    /// # Panics
    /// Where the objective compares pairs and the number of documents is odd.
    pub fn measure(
        arch: &dyn Architecture,
        source: &dyn TensorSource,
        config: &TrainConfig,
        device: &Device,
        documents: &[usize],
    ) -> Result<Self, Error> {
        if heap::current().is_none() {
            return Ok(Self::default());
        }
        Ok(Self::measure_with_pace(arch, source, config, device, documents)?.0)
    }

    /// As [`Activations::measure`]; also how long each part took, the faster of two runs after the first.
    ///
    /// # Errors
    /// As [`Activations::measure`].
    ///
    /// # Panics
    /// As [`Activations::measure`].
    pub fn measure_with_pace(
        arch: &dyn Architecture,
        source: &dyn TensorSource,
        config: &TrainConfig,
        device: &Device,
        documents: &[usize],
    ) -> Result<(Self, Pace), Error> {
        let probe = Probe { arch, source, config, device, documents, rope: Rope::new(arch.config()) };
        let rows: usize = documents.iter().sum();
        let input = (rows * arch.config().hidden_size * config.compute.bytes()) as u64;
        let mut found = Self { input, ..Self::default() };
        let before = level();
        probe.block(&mut found)?;
        found.scratch = (level() - before).max(0) as u64;
        // Again, now that the kernels have what they keep.
        let (first, second) = (probe.block(&mut found)?, probe.block(&mut found)?);
        let (head_forward, head) = probe.head(&mut found)?;
        let pace = Pace {
            block_forward: first.0.min(second.0),
            block: first.1.min(second.1),
            head_forward,
            head,
            embedding: probe.embedding(&mut found)?,
        };
        Ok((found, pace))
    }
}

/// What is measured.
struct Probe<'a> {
    arch: &'a dyn Architecture,
    source: &'a dyn TensorSource,
    config: &'a TrainConfig,
    device: &'a Device,
    documents: &'a [usize],
    rope: Rope,
}

/// Bytes on the heap.
fn level() -> i64 {
    heap::current().unwrap_or(0) as i64
}

/// The heap from some moment on.
struct Since(i64);

impl Since {
    fn now() -> Self {
        heap::reset_peak();
        Since(level())
    }

    /// Bytes more than then, at most.
    fn height(&self) -> u64 {
        (heap::peak().unwrap_or(0) as i64 - self.0).max(0) as u64
    }

    /// Bytes more than then.
    fn rise(&self) -> i64 {
        level() - self.0
    }
}

impl Probe<'_> {
    fn rows(&self) -> usize {
        self.documents.iter().sum()
    }

    /// A sequence of each document, every row trained.
    fn batch(&self) -> MicroBatch {
        MicroBatch {
            ids: vec![0; self.rows()].into(),
            targets: vec![0; self.rows()].into(),
            documents: self.documents.into(),
            sequences: self.documents.into(),
            reference: vec![0.0; self.documents.len()].into(),
        }
    }

    /// Hidden states like any others.
    fn hidden(&self) -> Tensor<2> {
        let shape = [self.rows(), self.arch.config().hidden_size];
        let dtype = self.config.compute.dtype();
        Tensor::<2>::ones(shape, self.device).cast(dtype)
    }

    /// The weights of one step of the block loop, and the views of them.
    fn load(&self, group: Group) -> Result<(ParamStore, Vec<View>), Error> {
        let store = ParamStore::load_step(self.arch, group, self.source, self.config, self.device.clone())?;
        let comm = hearth_collective::single();
        let views = {
            let units: Vec<usize> = (0..store.layout().units().len()).collect();
            let mut conveyor = Conveyor::new(store.copies(), &comm, units.clone());
            units.into_iter().map(|unit| conveyor.next(unit)).collect::<Result<_, _>>()?
        };
        Ok((store, views))
    }

    /// Returns how long it takes without a tape, and with one, backward included.
    fn block(&self, found: &mut Activations) -> Result<(Duration, Duration), Error> {
        let (store, views) = self.load(Group::Block(0))?;
        let input = found.input;
        let (x, dy) = (self.hidden(), self.hidden());
        let mut context = DocumentContext::new(&self.rope, self.documents);
        let dropout = self.config.adapter.as_ref().map(|_| 1);
        let (since, begun) = (Since::now(), Instant::now());
        let mut source = TrainSource::new(&store, &views, false, dropout);
        drop(self.arch.block(0, &mut source)?.forward(x.clone(), &mut context));
        let alone = begun.elapsed();
        found.block_forward = since.height();
        let begun = Instant::now();
        let x = x.autodiff().require_grad();
        let (all, taping) = (Since::now(), Since::now());
        let mut source = TrainSource::new(&store, &views, true, dropout);
        let y = self.arch.block(0, &mut source)?.forward(x.clone(), &mut context);
        let leaves = source.into_leaves();
        found.tape = taping.rise().max(0) as u64;
        found.taping = taping.height().saturating_sub(found.tape);
        let forward = all.height();
        let backward = Since::now();
        let gradients = (y * Tensor::from_inner(dy)).sum().backward();
        let taped = begun.elapsed();
        found.block_backward = backward.height() + input;
        found.block_again = forward.max(found.tape + backward.height()) + input;
        // The upstream gradient is gone, the input's is there.
        found.block_gradients = (all.rise() + input as i64).max(0) as u64;
        drop((gradients, leaves, x));
        Ok((alone, taped))
    }

    /// Returns how long it takes without a tape, and with one, backward included.
    fn head(&self, found: &mut Activations) -> Result<(Duration, Duration), Error> {
        let (store, views) = self.load(Group::Head)?;
        let x = self.hidden();
        let (batch, objective) = (self.batch(), self.config.objective.objective());
        let (since, begun) = (Since::now(), Instant::now());
        let mut source = TrainSource::new(&store, &views, false, None);
        drop(objective.loss(&self.arch.head(&mut source)?, x.clone(), &batch, &batch.reference));
        let alone = begun.elapsed();
        found.head_forward = since.height() + found.input;
        let x = x.autodiff().require_grad();
        let (since, begun) = (Since::now(), Instant::now());
        let mut source = TrainSource::new(&store, &views, true, None);
        let head = self.arch.head(&mut source)?;
        let (loss, _) = objective.loss(&head, x.clone(), &batch, &batch.reference);
        drop(head);
        let gradients = loss.backward();
        let taped = begun.elapsed();
        found.head = since.height() + found.input;
        found.head_gradients = since.rise().max(0) as u64 + found.input;
        drop((gradients, source.into_leaves(), x));
        Ok((alone, taped))
    }

    fn embedding(&self, found: &mut Activations) -> Result<Duration, Error> {
        if self.config.adapter.is_some() {
            return Ok(Duration::ZERO);
        }
        let (store, views) = self.load(Group::Embedding)?;
        let (ids, dy) = (vec![0; self.rows()], self.hidden());
        let (since, begun) = (Since::now(), Instant::now());
        let mut source = TrainSource::new(&store, &views, true, None);
        let y = self.arch.embedding(&mut source)?.forward(&ids);
        let gradients = (y * Tensor::from_inner(dy)).sum().backward();
        let taken = begun.elapsed();
        found.embedding = since.height() + found.input;
        found.embedding_gradients = (since.rise() + found.input as i64).max(0) as u64;
        drop((gradients, source.into_leaves()));
        Ok(taken)
    }
}

/// Charges activations to the device as they come and go.
#[derive(Clone)]
pub struct Meter {
    ledger: Ledger,
    sizes: Activations,
}

impl Meter {
    /// Charges `sizes` to `ledger`.
    pub fn new(ledger: Ledger, sizes: Activations) -> Self {
        Self { ledger, sizes }
    }

    /// What it charges.
    pub fn sizes(&self) -> &Activations {
        &self.sizes
    }

    /// Begins a phase.
    ///
    /// # Errors
    /// When the device's budget does not hold it.
    pub fn enter(&self, phase: Phase) -> Result<Working, Error> {
        let (height, gradients) = self.sizes.bytes(phase);
        let charge = self.ledger.charge(Tier::Device, Kind::Activations, height)?;
        Ok(Working { charge, gradients: gradients.min(height) })
    }

    /// A gradient that waits for its other half.
    pub(crate) fn hold(&self, gradient: &[f32]) -> Result<Working, Error> {
        let bytes = size_of_val(gradient) as u64;
        Ok(Working { charge: self.ledger.charge(Tier::Device, Kind::Gradients, bytes)?, gradients: bytes })
    }
}

/// A phase under way.
pub struct Working {
    charge: Charge,
    gradients: u64,
}

impl Working {
    /// The tape is gone, its gradients are there.
    pub(crate) fn only_gradients(&mut self) {
        self.charge.shrink_to(self.gradients);
    }

    /// Somebody else has `bytes` of it now.
    pub(crate) fn give(&mut self, bytes: usize) {
        self.charge.shrink_to(self.charge.bytes().saturating_sub(bytes as u64));
    }
}
