//! The comparison of layouts is itself put to the test: whatever goes wrong between the ranks must not go unnoticed.
//!
//! A mutant is a rank whose process group does one thing wrong; the trainer is the real one. Everything that
//! [`crate::layouts`] compares is compared here, by the same means.

use crate::layouts::{Outcome, ranks_of, run};
use crate::support::{config, setup};
use crate::tiny::{cut, offload, outcome};
use hearth_collective::buffer::into_vec;
use hearth_collective::{Buffer, Error, ProcessGroup, threads};
use hearth_data::Sequence;
use hearth_train::reduce::Assignment;
use hearth_train::{Recompute, TrainConfig};
use hearth_weights::ModelFiles;
use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const STEPS: usize = 3;

/// Embedding, three transformer blocks, head.
const UNITS: usize = 5;

/// What goes wrong. Numbers count operations from the beginning of the run.
#[derive(Clone, Debug)]
enum Fault {
    /// Nothing, so that it is known that the wrapper itself is not what is noticed.
    None,
    /// One reduction of gradients is dropped: every rank keeps its own.
    Dropped(usize),
    /// One reduction misses the gradients of the last rank.
    Lost(usize),
    /// Gradients are summed from the last rank to the first: the same but for rounding.
    OtherOrder,
    /// One gather of summed gradients, which stage 0 needs whole, brings nothing from the other ranks.
    Ungathered(usize),
    /// The gradient norm is not synchronised: every rank takes its own partition's.
    OwnNorm,
    /// Every rank's mean is over its own trained tokens and the means are averaged: what the rank sends is off by a
    /// factor, step for step.
    OwnMean(Vec<f64>),
    /// A unit's parameters are gathered from the other ranks as they were a step before.
    Stale(usize),
}

/// One rank of a group with a fault.
struct Faulty {
    inner: Box<dyn ProcessGroup>,
    fault: Fault,
    /// Reductions of gradients so far, by all mutants of a run: how many there are to drop.
    reductions: Arc<AtomicUsize>,
    reduced: usize,
    /// Gathers of f32: summed gradients.
    gradients: usize,
    /// Gathers of f64: a step's losses, then its squares, in turn.
    sums: usize,
    /// Gathers of u32: parameters.
    parameters: usize,
    /// The gather of the unit whose parameters come late, a step ago.
    before: Option<Vec<u8>>,
}

/// Whether a buffer has elements of this type.
fn holds<T: 'static>(buffer: &dyn Buffer) -> bool {
    let buffer: &dyn Any = buffer;
    buffer.is::<Vec<T>>()
}

fn counted(count: &mut usize) -> usize {
    *count += 1;
    *count - 1
}

impl Faulty {
    fn new(inner: Box<dyn ProcessGroup>, fault: Fault, reductions: Arc<AtomicUsize>) -> Self {
        Self { inner, fault, reductions, reduced: 0, gradients: 0, sums: 0, parameters: 0, before: None }
    }

    /// What the rank sends to a reduction, and the reduction's number.
    fn sent(&mut self, mut input: Vec<f32>) -> (Vec<f32>, usize) {
        let number = counted(&mut self.reduced);
        self.reductions.fetch_max(self.reduced, Ordering::Relaxed);
        let last = self.rank() + 1 == self.world_size();
        match &self.fault {
            Fault::Lost(n) if *n == number && last => input.fill(0.0),
            Fault::OwnMean(factors) => {
                // A step's gradients come before its losses and squares.
                let factor = factors[self.sums / 2];
                input.iter_mut().for_each(|x| *x = (*x as f64 * factor) as f32);
            }
            _ => {}
        }
        (input, number)
    }

    /// The bytes of `all` that did not come from this rank.
    fn others<'a>(&self, all: &'a mut [u8]) -> impl Iterator<Item = (usize, &'a mut [u8])> {
        let (each, rank) = (all.len() / self.world_size(), self.rank());
        all.chunks_mut(each)
            .enumerate()
            .filter(move |(from, _)| *from != rank)
            .map(move |(from, part)| (from * each, part))
    }

    /// What is wrong with what was gathered.
    fn gathered(&mut self, all: &mut Box<dyn Buffer>) {
        let wrong = match (&**all, &self.fault) {
            (all, Fault::Ungathered(n)) if holds::<f32>(all) => counted(&mut self.gradients) == *n,
            (all, fault) if holds::<f64>(all) => {
                counted(&mut self.sums) % 2 == 1 && matches!(fault, Fault::OwnNorm)
            }
            (all, Fault::Stale(unit)) if holds::<u32>(all) => counted(&mut self.parameters) % UNITS == *unit,
            _ => false,
        };
        if !wrong {
            return;
        }
        let now = all.bytes().to_vec();
        let before = match self.fault {
            Fault::Stale(_) => self.before.replace(now.clone()).unwrap_or(now),
            _ => vec![0; now.len()],
        };
        for (start, part) in self.others(all.bytes_mut()) {
            part.copy_from_slice(&before[start..start + part.len()]);
        }
    }
}

impl ProcessGroup for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&mut self, buffer: Vec<f32>) -> Result<Vec<f32>, Error> {
        self.inner.all_reduce(buffer)
    }

    fn reduce_scatter(&mut self, input: Vec<f32>) -> Result<Vec<f32>, Error> {
        let (input, number) = self.sent(input);
        let each = input.len() / self.world_size();
        if matches!(self.fault, Fault::OtherOrder) {
            let output = Box::new(vec![0.0f32; input.len()]);
            let parts: Vec<f32> = into_vec(self.inner.all_to_all(Box::new(input), output)?);
            let sum = |i| parts.iter().skip(i).step_by(each).rev().copied().reduce(|a, b| a + b);
            return Ok((0..each).map(|i| sum(i).expect("a rank")).collect());
        }
        let own = input[self.rank() * each..][..each].to_vec();
        let sum = self.inner.reduce_scatter(input)?;
        Ok(if matches!(self.fault, Fault::Dropped(n) if n == number) { own } else { sum })
    }

    fn all_gather(
        &mut self,
        mut partition: Box<dyn Buffer>,
        output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error> {
        if let Fault::OwnMean(factors) = &self.fault
            && holds::<f64>(&*partition)
            && self.sums.is_multiple_of(2)
        {
            let mut sums: Vec<f64> = into_vec(partition);
            // The last number says whether to stop.
            let (_, losses) = sums.split_last_mut().expect("sums");
            losses.iter_mut().for_each(|x| *x *= factors[self.sums / 2]);
            partition = Box::new(sums);
        }
        let mut all = self.inner.all_gather(partition, output)?;
        self.gathered(&mut all);
        Ok(all)
    }

    fn all_to_all(
        &mut self,
        input: Box<dyn Buffer>,
        output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error> {
        let (input, number) = self.sent(into_vec(input));
        let own = input.clone();
        let all = self.inner.all_to_all(Box::new(input), output)?;
        // Every part that should have come from another rank is this rank's own.
        let dropped = matches!(self.fault, Fault::Dropped(n) if n == number);
        let each = own.len() / self.world_size();
        let part = &own[self.rank() * each..][..each];
        Ok(if dropped { Box::new(part.repeat(self.world_size())) } else { all })
    }

    fn broadcast(&mut self, root: usize, buffer: Box<dyn Buffer>) -> Result<Box<dyn Buffer>, Error> {
        self.inner.broadcast(root, buffer)
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.inner.barrier()
    }

    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn ProcessGroup>, Error> {
        self.inner.split(color, key)
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.inner.set_timeout(timeout);
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        self.inner.aborter()
    }
}

/// A run with faults, a fault a rank: what each rank makes of it, and the reductions of a rank.
fn mutated(files: &ModelFiles, config: &TrainConfig, faults: &[Fault]) -> (Vec<Outcome>, usize) {
    let reductions = Arc::new(AtomicUsize::new(0));
    let group = threads::group(faults.len()).into_iter().zip(faults);
    let group = group.map(|(rank, fault)| {
        let faulty = Faulty::new(Box::new(rank), fault.clone(), reductions.clone());
        Box::new(faulty) as Box<dyn ProcessGroup>
    });
    let outcomes = ranks_of(group.collect(), files, config, &|trainer| outcome(trainer, STEPS));
    (outcomes, reductions.load(Ordering::Relaxed))
}

/// Ranks, micro-batches of each, stage, tier.
const LAYOUTS: [(usize, usize, u8, &str); 6] = [
    (2, 4, 0, "device"),
    (2, 1, 1, "cpu"),
    (4, 2, 1, "split"),
    (2, 2, 2, "nvme"),
    (3, 2, 2, "device"),
    (4, 1, 3, "all-nvme"),
];

/// The layouts' settings: the name, the ranks, the configuration.
fn layouts(dir: &Path) -> impl Iterator<Item = (String, usize, TrainConfig)> {
    LAYOUTS.into_iter().map(move |(world, each, zero, tier)| {
        let (offload, global_batch) = (offload(tier, dir), world * each);
        // Clipping is always at work, so that the norm matters to the update.
        let settings = TrainConfig { clip_norm: 1e-2, recompute: Recompute::Full, ..config(STEPS) };
        let config = TrainConfig { zero, offload, global_batch, ..settings };
        (format!("{world} ranks x{each} stage {zero} {tier}"), world, config)
    })
}

fn plain(files: &ModelFiles, config: &TrainConfig) -> Outcome {
    run(files, &TrainConfig { zero: 0, offload: Default::default(), ..config.clone() }, 1, STEPS)
}

/// Whether the comparison of layouts would have failed.
fn is_noticed(outcomes: &[Outcome], plain: &Outcome) -> bool {
    outcomes.iter().any(|outcome| outcome != plain)
}

#[test]
fn every_dropped_or_incomplete_reduction_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let files = cut(dir.path());
    for (name, world, config) in layouts(dir.path()) {
        let plain = plain(&files, &config);
        let (outcomes, reductions) = mutated(&files, &config, &vec![Fault::None; world]);
        assert!(!is_noticed(&outcomes, &plain), "{name}: nothing is wrong");
        assert!(reductions >= STEPS * UNITS, "{name}: {reductions} reductions");
        // A few of each unit: a number that shares no factor with the units.
        for number in (0..reductions).step_by(if reductions > 3 * UNITS { 7 } else { 1 }) {
            for fault in [Fault::Dropped(number), Fault::Lost(number)] {
                let (outcomes, _) = mutated(&files, &config, &vec![fault.clone(); world]);
                assert!(is_noticed(&outcomes, &plain), "{name}: {fault:?}");
            }
        }
    }
}

#[test]
fn a_norm_a_gather_or_an_order_of_sums_that_is_wrong_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let files = cut(dir.path());
    for (name, world, config) in layouts(dir.path()) {
        let plain = plain(&files, &config);
        let mut faults = vec![Fault::OwnNorm];
        if world == 4 {
            faults.push(Fault::OtherOrder);
        }
        match config.zero {
            // What the last step leaves wrong in a replica would show only in a step after it.
            0 => faults.extend((0..(STEPS - 1) * UNITS).map(Fault::Ungathered)),
            1 | 2 => faults.extend((0..UNITS - 1).map(Fault::Stale)),
            _ => {}
        }
        for fault in faults {
            let (outcomes, _) = mutated(&files, &config, &vec![fault.clone(); world]);
            assert!(is_noticed(&outcomes, &plain), "{name}: {fault:?}");
        }
    }
}

/// A step's sequences as a rank sees them that knows of no trained tokens but its own.
fn own_alone(sequences: Vec<Sequence>, own: &[usize]) -> Vec<Sequence> {
    let blind = |(i, mut sequence): (usize, Sequence)| {
        if !own.contains(&i) {
            sequence.labels.fill(-100);
        }
        sequence
    };
    sequences.into_iter().enumerate().map(blind).collect()
}

/// Trained tokens: no fixture trains a document's first.
fn trained(sequences: &[Sequence]) -> usize {
    sequences.iter().flat_map(|sequence| &sequence.labels).filter(|label| **label >= 0).count()
}

/// The micro-batches of one sequence that a rank computes.
fn own_indices(config: &TrainConfig, world: usize, rank: usize) -> Vec<usize> {
    let assignment = Assignment::new(config, world).expect("shared out evenly");
    (0..assignment.each()).map(|turn| assignment.index(rank, turn)).collect()
}

#[test]
fn a_local_token_count_is_noticed_even_where_ranks_average_their_means() {
    let dir = tempfile::tempdir().unwrap();
    let files = cut(dir.path());
    for (name, world, config) in layouts(dir.path()) {
        let plain = plain(&files, &config);
        // Each rank divides the sum over all ranks by its own tokens.
        let group = threads::group(world).into_iter().map(|rank| Box::new(rank) as Box<dyn ProcessGroup>);
        let steps = || {
            let mut loader = setup(&files, &config).loader;
            (0..STEPS).map(move |_| loader.next_step())
        };
        let outcomes = ranks_of(group.collect(), &files, &config, &|trainer| {
            let own = own_indices(&config, world, trainer.comm().rank());
            let steps = steps().map(|sequences| own_alone(sequences, &own));
            Outcome::of(trainer, steps.map(Some))
        });
        assert!(is_noticed(&outcomes, &plain), "{name}");
        // Each rank divides its own sum by its own tokens, and the ranks average: `factor` turns the right share of the
        // mean into that.
        let factors = |rank| -> Vec<f64> {
            let own = own_indices(&config, world, rank);
            let factor =
                |all: Vec<Sequence>| trained(&all) as f64 / (world * trained(&own_alone(all, &own))) as f64;
            steps().map(factor).collect()
        };
        let faults: Vec<Fault> = (0..world).map(|rank| Fault::OwnMean(factors(rank))).collect();
        let (outcomes, _) = mutated(&files, &config, &faults);
        assert!(is_noticed(&outcomes, &plain), "{name}: {faults:?}");
    }
}
