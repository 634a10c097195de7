//! What a run will hold and move, before it runs.
//!
//! A plan is made by going through a run's steps with nothing but its ledger: every charge the trainer would make is
//! made, in the same order and from the same [`Sizes`], against the same budget. A plan that goes through is a run that
//! goes through. (`tests/train/plans.rs` holds the two together, byte for byte, and both to the heap.)

mod conveyor;
mod gradients;
mod speed;
mod update;

pub use speed::{Speeds, StepTime, Traffic};

use crate::activations::{Activations, Meter, Phase};
use crate::config::{Place, Recompute, TrainConfig};
use crate::flops::ModelFlops;
use crate::frozen::held_bytes;
use crate::gradients::TreeSum;
use crate::params::{head_units, layout};
use crate::reduce::Assignment;
use crate::sizes::{ALIGN, Sizes};
use crate::{Error, Layout};
use gradients::Stored;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::{Architecture, Group, params};
use hearth_weights::TensorSource;

/// What is planned: a model, a configuration and what its activations take.
pub struct Subject<'a> {
    /// The model.
    pub arch: &'a dyn Architecture,
    /// Its weights, of which only names and formats are looked at.
    pub weights: &'a dyn TensorSource,
    /// The run.
    pub config: &'a TrainConfig,
    /// Ranks.
    pub world: usize,
    /// See [`Activations::measure`].
    pub activations: Activations,
    /// Lengths of the documents of one micro-batch.
    pub documents: &'a [usize],
}

/// Goes through loading, one step and a save of rank 0 with `ledger` alone, which remembers peaks and, if it records,
/// the timeline.
///
/// # Errors
/// [`hearth_memory::Error::OverBudget`] where the run would fail; the configuration's own contradictions.
pub fn plan(subject: &Subject<'_>, ledger: &Ledger) -> Result<Traffic, Error> {
    let &Subject { arch, config, world, .. } = subject;
    config.validate()?;
    let assignment = Assignment::new(config, world)?;
    let layout = layout(arch, config, world, 0)?;
    let sizes = Sizes { layout: &layout, config };
    let mut run = Run {
        subject,
        sizes,
        assignment,
        ledger,
        meter: Meter::new(ledger.clone(), subject.activations),
        head_units: head_units(arch, &layout),
        traffic: Traffic::default(),
        sums: Vec::new(),
        writing: None,
        late: Vec::new(),
    };
    ledger.mark("load");
    let _resident = run.load()?;
    let _beside = run.beside()?;
    // A save is written beside the next step's passes and ends before anything changes.
    let mut saving = run.saving()?;
    if sizes.beside() {
        saving = None;
        run.late = run.late_before()?;
    }
    for turn in 0..assignment.each() {
        run.micro_batch(turn)?;
    }
    run.writing = None;
    drop(saving);
    ledger.mark("update");
    run.update()?;
    ledger.mark("end");
    run.traffic.flops = run.flops();
    Ok(run.traffic)
}

/// Units of the subject whose update is worth making late: see [`crate::Offload::late`].
///
/// # Errors
/// The configuration's own contradictions.
pub fn most_late(subject: &Subject<'_>) -> Result<usize, Error> {
    subject.config.validate()?;
    let layout = layout(subject.arch, subject.config, subject.world, 0)?;
    Ok(Sizes { layout: &layout, config: subject.config }.most_late())
}

struct Run<'a> {
    subject: &'a Subject<'a>,
    sizes: Sizes<'a>,
    assignment: Assignment,
    ledger: &'a Ledger,
    meter: Meter,
    head_units: Vec<usize>,
    traffic: Traffic,
    /// Of each unit, over this rank's micro-batches and over all.
    sums: Vec<(TreeSum<Charge>, TreeSum<Stored>)>,
    /// A sum on its way to the disk.
    writing: Option<Charge>,
    /// Gradients that wait for their update: the step's before until the forward pass has used what came of them.
    late: Vec<Charge>,
}

impl<'a> Run<'a> {
    fn charge(&self, tier: Tier, kind: Kind, bytes: u64) -> Result<Charge, Error> {
        Ok(self.ledger.charge(tier, kind, bytes)?)
    }

    fn layout(&self) -> &'a Layout {
        self.sizes.layout
    }

    fn units(&self) -> std::ops::Range<usize> {
        0..self.layout().units().len()
    }

    /// What stays for the whole run.
    fn load(&mut self) -> Result<Vec<Charge>, Error> {
        let (sizes, config) = (self.sizes, self.subject.config);
        let mut resident = Vec::new();
        let mut on_disk = 0;
        for unit in self.units() {
            for (range, place) in sizes.segments(unit) {
                let bytes = sizes.optimizer_bytes(unit, &range, place);
                match place {
                    Place::Nvme => on_disk += bytes,
                    _ => resident.push(self.charge(place.tier(), Kind::Optimizer, bytes)?),
                }
            }
        }
        if on_disk > 0 {
            resident.push(self.charge(Tier::Nvme, Kind::Optimizer, on_disk)?);
        }
        if sizes.spills() {
            let slot = |unit| sizes.partition_bytes(unit).next_multiple_of(ALIGN);
            let slots = self.assignment.most_held() as u64;
            resident.push(self.charge(
                Tier::Nvme,
                Kind::Gradients,
                self.units().map(|unit| slots * slot(unit)).sum(),
            )?);
        }
        resident.push(self.charge(Tier::Device, Kind::Staging, self.subject.activations.scratch)?);
        let copies: u64 = self.units().map(|unit| sizes.copy_bytes(unit)).sum();
        match config.offload.params {
            Place::Nvme => resident.push(self.charge(Tier::Nvme, Kind::Weights, copies)?),
            place => {
                for unit in self.units() {
                    resident.push(self.charge(place.tier(), Kind::Weights, sizes.copy_bytes(unit))?);
                }
            }
        }
        if let Some(adapter) = &config.adapter {
            for spec in params(self.subject.arch) {
                let format = self.subject.weights.meta(&spec.name)?.format.name();
                let bytes = held_bytes(&spec, format, config.compute, adapter.quant.as_deref());
                resident.push(self.charge(Tier::Device, Kind::Weights, bytes)?);
            }
        }
        for unit in self.units() {
            drop(self.charge(Tier::Host, Kind::Staging, sizes.loading_bytes(unit))?);
        }
        let (own, all) = (self.assignment.block(), self.assignment.total());
        self.sums = self.units().map(|_| (TreeSum::new(own), TreeSum::new(all))).collect();
        Ok(resident)
    }

    /// One micro-batch, as [`crate::block_loop::BlockLoop::gradients`].
    fn micro_batch(&mut self, turn: usize) -> Result<(), Error> {
        let blocks = self.subject.arch.num_blocks();
        let full = self.subject.config.recompute == Recompute::Full;
        let train_embedding = self.layout().unit_of(Group::Embedding).is_some();
        let mut steps = vec![Group::Embedding];
        steps.extend((0..blocks).map(Group::Block));
        steps.push(Group::Head);
        if full {
            steps.extend((0..blocks).rev().map(Group::Block));
        }
        if train_embedding {
            steps.push(Group::Embedding);
        }
        if self.asks_the_base() {
            self.ledger.mark("reference");
            (0..blocks).try_for_each(|_| self.meter.enter(Phase::BlockForward).map(drop))?;
            drop(self.meter.enter(Phase::HeadForward)?);
        }
        let mut conveyor = self.conveyor(&steps);
        let mut exchange = None;
        self.ledger.mark("forward");
        drop(self.bring(Group::Embedding, &mut conveyor)?);
        let (mut kept, mut tapes) = (Vec::new(), Vec::new());
        if !full {
            kept.push(self.meter.enter(Phase::Input)?);
        }
        for i in 0..blocks {
            if full {
                kept.push(self.meter.enter(Phase::Input)?);
                let _working = self.meter.enter(Phase::BlockForward)?;
                drop(self.bring(Group::Block(i), &mut conveyor)?);
            } else {
                let tape = self.meter.enter(Phase::Tape)?;
                let _working = self.meter.enter(Phase::Taping)?;
                tapes.push((tape, self.bring(Group::Block(i), &mut conveyor)?));
            }
        }
        self.late.clear();
        self.ledger.mark("head");
        let tied = {
            let working = self.meter.enter(Phase::Head)?;
            let _views = self.bring(Group::Head, &mut conveyor)?;
            self.head(turn, working, &mut exchange)?
        };
        self.ledger.mark("backward");
        for i in (0..blocks).rev() {
            let phase = if full { Phase::BlockAgain } else { Phase::BlockBackward };
            let mut working = self.meter.enter(phase)?;
            let (tape, _views) = match tapes.pop() {
                Some((tape, views)) => (Some(tape), views),
                None => (None, self.bring(Group::Block(i), &mut conveyor)?),
            };
            drop(tape);
            working.only_gradients();
            self.hand_out(turn, Group::Block(i), &mut working, &mut exchange)?;
            if full {
                kept.pop();
            }
        }
        if train_embedding {
            self.ledger.mark("embedding");
            let mut working = self.meter.enter(Phase::Embedding)?;
            let _views = self.bring(Group::Embedding, &mut conveyor)?;
            working.only_gradients();
            self.hand_out_tied(turn, &mut working, tied, &mut exchange)?;
        }
        self.settle(&mut exchange)
    }

    /// Whether every micro-batch is seen by the frozen model first, without its adapter.
    fn asks_the_base(&self) -> bool {
        let config = self.subject.config;
        config.objective.objective().compares() && config.adapter.is_some()
    }

    /// Of this rank's micro-batches.
    fn flops(&self) -> f64 {
        let model = ModelFlops::planned(self.subject.arch, self.subject.config, self.layout());
        let documents = self.subject.documents.iter().copied();
        let again = match self.subject.config.recompute {
            Recompute::Full => model.forward(self.subject.documents.iter().copied()),
            Recompute::None => 0.0,
        };
        let reference = match self.asks_the_base() {
            true => model.forward(self.subject.documents.iter().copied()),
            false => 0.0,
        };
        (model.of(documents) + again + reference) * self.assignment.each() as f64
    }
}
