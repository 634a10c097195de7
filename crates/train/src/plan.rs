//! What a run will hold and move, before it runs.
//!
//! A plan is made by going through a run's steps with nothing but its ledger: every charge the trainer would make is
//! made, in the same order and from the same [`Sizes`], against the same budget. A plan that goes through is a run that
//! goes through. (`tests/train/plans.rs` holds the two together, byte for byte, and both to the heap.)

use crate::activations::{Activations, Meter, Phase, Working};
use crate::checkpoint::saver::CHUNK_BYTES;
use crate::config::{Compute, Place, Recompute, TrainConfig};
use crate::flops::ModelFlops;
use crate::frozen::held_bytes;
use crate::gradients::TreeSum;
use crate::params::{head_units, layout};
use crate::reduce::Assignment;
use crate::sizes::{ALIGN, Sizes};
use crate::update::{copy_buffers, gradient_ring_bytes};
use crate::{Error, Layout};
use hearth_collective::Operation;
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::{Architecture, Group, params};
use hearth_weights::TensorSource;
use serde::Serialize;
use std::collections::VecDeque;

/// What one step of one rank moves and computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Traffic {
    /// Bytes read from the nvme tier while the model is computed.
    pub disk_read: u64,
    /// Bytes written to it while the model is computed.
    pub disk_written: u64,
    /// Bytes the update reads from it.
    pub update_read: u64,
    /// Bytes the update writes to it.
    pub update_written: u64,
    /// Bytes of state the update reads and writes in memory.
    pub update_memory: u64,
    /// Bytes that come from other ranks.
    pub received: u64,
    /// Floating-point operations, those of recomputation included.
    pub flops: f64,
}

/// What this machine does in a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speeds {
    /// Floating-point operations of the model, as trained here.
    pub flops: f64,
    /// Bytes from the nvme tier.
    pub disk_read: f64,
    /// Bytes to it.
    pub disk_write: f64,
    /// Bytes from and to it at once, together.
    pub disk_both: f64,
    /// Bytes the optimizer reads and writes in memory.
    pub memory: f64,
    /// Bytes from the other ranks.
    pub link: f64,
}

/// How long a step takes, by what takes it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Seconds of arithmetic.
    pub compute_s: f64,
    /// Seconds of reading and writing beside it.
    pub disk_s: f64,
    /// Seconds of exchange between ranks beside it.
    pub exchange_s: f64,
    /// Seconds of the update.
    pub update_s: f64,
    /// Seconds of the step: the longest of the first three, then the update.
    pub step_s: f64,
    /// What the step would be shorter by more of: `compute`, `disk`, `link` or `memory`.
    pub bound_by: &'static str,
}

impl Traffic {
    /// The step on `ranks` ranks that share one machine of these speeds.
    pub fn time(&self, speeds: &Speeds, ranks: usize) -> StepTime {
        let ranks = ranks as f64;
        let compute_s = ranks * self.flops / speeds.flops;
        let disk_s =
            ranks * (self.disk_read as f64 / speeds.disk_read + self.disk_written as f64 / speeds.disk_write);
        let exchange_s = ranks * self.received as f64 / speeds.link;
        let update_disk = ranks * (self.update_read + self.update_written) as f64 / speeds.disk_both;
        let update_memory = ranks * self.update_memory as f64 / speeds.memory;
        let update_s = update_disk.max(update_memory);
        let passes = compute_s.max(disk_s).max(exchange_s);
        let step_s = passes + update_s;
        // What the whole step spends most on, the update's share with the resource that bounds it.
        let by = |share: f64, bound: f64| if bound == passes { share + passes } else { share };
        let disk_update = if update_disk >= update_memory { update_disk } else { 0.0 };
        let memory_update = update_s - disk_update;
        let candidates = [
            ("compute", by(0.0, compute_s)),
            ("disk", by(disk_update, disk_s)),
            ("link", by(0.0, exchange_s)),
            ("memory", memory_update),
        ];
        let longest = candidates.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("four of them");
        StepTime { compute_s, disk_s, exchange_s, update_s, step_s, bound_by: longest.0 }
    }
}

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

/// A summed gradient that was put by.
enum Stored {
    Memory(Charge),
    Disk,
}

/// Adds two of them. The right one is read, if need be, and let go.
type Add<'a> = dyn FnMut(Stored, Stored) -> Result<Stored, Error> + 'a;

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

/// Weights on their way, in the order of the script; see [`crate::copies::Conveyor`].
struct Conveyor {
    script: VecDeque<usize>,
    coming: VecDeque<(usize, Coming)>,
}

enum Coming {
    Local(Option<Charge>),
    Gathering(Charge, Charge),
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

    fn conveyor(&self, steps: &[Group]) -> Conveyor {
        let script = steps.iter().flat_map(|group| self.units_for(*group)).collect();
        Conveyor { script, coming: VecDeque::new() }
    }

    fn units_for(&self, group: Group) -> Vec<usize> {
        match group {
            Group::Head => self.head_units.clone(),
            _ => self.layout().unit_of(group).into_iter().collect(),
        }
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

    /// Hands out the head's gradients; what waits for the embedding's half is returned.
    fn head(
        &mut self,
        turn: usize,
        mut working: Working,
        exchange: &mut Option<Exchange>,
    ) -> Result<Vec<Charge>, Error> {
        working.only_gradients();
        let mut tied = Vec::new();
        for unit in self.head_units.clone() {
            match self.layout().units()[unit].group {
                Group::Head => self.hand_out(turn, Group::Head, &mut working, exchange)?,
                _ => {
                    let len = self.layout().units()[unit].len;
                    working.give(len * self.subject.config.compute.bytes());
                    tied.push(self.charge(Tier::Device, Kind::Gradients, 4 * len as u64)?);
                }
            }
        }
        Ok(tied)
    }

    fn hand_out(
        &mut self,
        turn: usize,
        group: Group,
        working: &mut Working,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        self.hand_out_in(turn, group, self.subject.config.compute, working, exchange)
    }

    /// Hands out gradients that come in this precision.
    fn hand_out_in(
        &mut self,
        turn: usize,
        group: Group,
        precision: Compute,
        working: &mut Working,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        let Some(unit) = self.layout().unit_of(group) else { return Ok(()) };
        let params = self.layout().units()[unit].params.clone();
        let padded = self.layout().padded_len(unit);
        let kept = self.sizes.gradient_precision(unit);
        let mut open = None;
        for param in &self.layout().params()[params] {
            let len = param.range.len();
            working.give(len * self.subject.config.compute.bytes());
            if open.is_none() {
                open = Some(self.charge(Tier::Device, Kind::Gradients, self.sizes.gradient_bytes(unit))?);
            }
            if len != padded || precision != kept {
                drop(self.charge(Tier::Device, Kind::Gradients, (precision.bytes() * len) as u64)?);
            }
        }
        let open = open.expect("a unit has parameters");
        self.complete(turn, unit, open, exchange)
    }

    fn hand_out_tied(
        &mut self,
        turn: usize,
        working: &mut Working,
        tied: Vec<Charge>,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        let precision = if tied.is_empty() { self.subject.config.compute } else { Compute::F32 };
        let _held = tied;
        self.hand_out_in(turn, Group::Embedding, precision, working, exchange)
    }

    /// A unit's gradient of one micro-batch is there.
    fn complete(
        &mut self,
        turn: usize,
        unit: usize,
        open: Charge,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        let place = turn % self.assignment.block();
        let own = &mut self.sums[unit].0;
        own.push(place..place + 1, open, &mut |left, _right| Ok::<_, Error>(left))?;
        if !self.assignment.is_due(turn) {
            return Ok(());
        }
        self.settle(exchange)?;
        let sum = self.sums[unit].0.take_root().expect("complete");
        if self.subject.world == 1 {
            return self.keep(unit, self.assignment.nodes(turn).remove(0), sum);
        }
        let operation = if self.assignment.joint() { Operation::ReduceScatter } else { Operation::AllToAll };
        let bytes = self.sizes.gradient_bytes(unit);
        let moving = self.charge(Tier::Device, Kind::Staging, self.sizes.exchange_bytes(operation, bytes))?;
        self.traffic.received += bytes - bytes / self.subject.world as u64;
        *exchange = Some(Exchange { unit, turn, charges: vec![sum, moving] });
        Ok(())
    }

    fn settle(&mut self, exchange: &mut Option<Exchange>) -> Result<(), Error> {
        let Some(Exchange { unit, turn, charges }) = exchange.take() else { return Ok(()) };
        let bytes = self.sizes.partition_bytes(unit);
        let nodes = self.assignment.nodes(turn);
        if nodes.len() == 1 {
            drop(charges);
            let charge = self.charge(Tier::Device, Kind::Gradients, bytes)?;
            return self.keep(unit, nodes[0].clone(), charge);
        }
        for node in nodes {
            let charge = self.charge(Tier::Device, Kind::Gradients, bytes)?;
            self.keep(unit, node, charge)?;
        }
        drop(charges);
        Ok(())
    }

    fn keep(&mut self, unit: usize, node: std::ops::Range<usize>, sum: Charge) -> Result<(), Error> {
        let (ledger, sizes, bytes) = (self.ledger, self.sizes, self.sizes.partition_bytes(unit));
        let place = self.subject.config.offload.grads;
        let (mut read, mut written) = (0, 0);
        let (writing, late) = (&mut self.writing, &mut self.late);
        let mut fetch = |stored| match stored {
            Stored::Memory(charge) => Ok(charge),
            Stored::Disk => {
                *writing = None;
                read += bytes;
                ledger.charge(Tier::Host, Kind::Staging, bytes)
            }
        };
        let add: &mut Add<'_> = &mut |left, right| {
            let (left, _right) = (fetch(left)?, fetch(right)?);
            Ok(Stored::Memory(left))
        };
        let all = &mut self.sums[unit].1;
        all.push(node, Stored::Memory(sum), add)?;
        all.update_last(&mut |stored| {
            let Stored::Memory(charge) = stored else { return Ok::<_, Error>(stored) };
            if sizes.beside() {
                drop(charge);
                match sizes.late(unit) {
                    true => late.push(ledger.charge(Tier::Host, Kind::Staging, bytes)?),
                    false => {
                        *writing = None;
                        *writing = Some(ledger.charge(Tier::Host, Kind::Staging, bytes)?);
                    }
                }
                return Ok(Stored::Disk);
            }
            match place {
                Place::Device => Ok(Stored::Memory(charge)),
                Place::Cpu => {
                    drop(charge);
                    Ok(Stored::Memory(ledger.charge(Tier::Host, Kind::Gradients, bytes)?))
                }
                Place::Nvme => {
                    drop((charge, writing.take()));
                    *writing = Some(ledger.charge(Tier::Host, Kind::Staging, sizes.writing_bytes(bytes))?);
                    written += bytes;
                    Ok(Stored::Disk)
                }
            }
        })?;
        self.traffic.disk_read += read;
        self.traffic.disk_written += written;
        Ok(())
    }

    /// The views of a step's units, charged as [`crate::copies::Conveyor::next`] charges them.
    fn bring(&mut self, group: Group, conveyor: &mut Conveyor) -> Result<Vec<Charge>, Error> {
        let mut views = Vec::new();
        for unit in self.units_for(group) {
            views.extend(self.next(unit, conveyor)?);
        }
        Ok(views)
    }

    fn next(&mut self, unit: usize, conveyor: &mut Conveyor) -> Result<Option<Charge>, Error> {
        let (place, partitioned) = (self.subject.config.offload.params, self.sizes.partitioned());
        let ahead = match (place, partitioned) {
            (Place::Nvme, true) => 3,
            (Place::Nvme, false) | (_, true) => 2,
            _ => 1,
        };
        while conveyor.coming.len() < ahead
            && let Some(unit) = conveyor.script.pop_front()
        {
            let local = match place {
                Place::Nvme => {
                    let bytes = self.sizes.copy_len(unit) * self.subject.config.compute.bytes();
                    self.traffic.disk_read += bytes as u64;
                    let bytes = AlignedBuffer::capacity_for(bytes) as u64;
                    let (tier, kind) = match partitioned {
                        true => (Tier::Host, Kind::Staging),
                        false => (Tier::Device, Kind::Weights),
                    };
                    Some(self.charge(tier, kind, bytes)?)
                }
                _ => None,
            };
            conveyor.coming.push_back((unit, Coming::Local(local)));
        }
        if partitioned {
            for at in 0..conveyor.coming.len().min(2) {
                let (unit, coming) = &mut conveyor.coming[at];
                if let Coming::Local(local) = coming {
                    let whole = self.sizes.view_bytes(*unit);
                    let own = whole / self.subject.world as u64;
                    let _read = local.take();
                    self.traffic.received += whole - own;
                    *coming = Coming::Gathering(
                        self.ledger.charge(Tier::Device, Kind::Weights, whole)?,
                        self.ledger.charge(Tier::Device, Kind::Staging, own)?,
                    );
                }
            }
        }
        let (_, coming) = conveyor.coming.pop_front().expect("the script goes on");
        match coming {
            Coming::Gathering(charge, _moved) => Ok(Some(charge)),
            Coming::Local(local) => match place {
                Place::Device => Ok(None),
                Place::Nvme => Ok(local),
                Place::Cpu => {
                    Ok(Some(self.charge(Tier::Device, Kind::Weights, self.sizes.view_bytes(unit))?))
                }
            },
        }
    }

    /// What the update beside the passes works in, as [`crate::beside`], and what it moves.
    fn beside(&mut self) -> Result<Option<[Charge; 2]>, Error> {
        let sizes = self.sizes;
        if !sizes.beside() {
            return Ok(None);
        }
        for unit in self.units() {
            for (range, _) in sizes.pieces(unit) {
                let state = sizes.tile_bytes(range.len());
                self.traffic.disk_read += state;
                self.traffic.disk_written +=
                    state + (range.len() * self.subject.config.compute.bytes()) as u64;
            }
        }
        let wide = 4 * sizes.widened() as u64;
        Ok(Some([self.ring()?, self.charge(Tier::Host, Kind::Staging, wide)?]))
    }

    /// Gradients of the step before that wait for their update.
    fn late_before(&self) -> Result<Vec<Charge>, Error> {
        let late = self.units().filter(|unit| self.sizes.late(*unit));
        late.map(|unit| self.charge(Tier::Host, Kind::Staging, self.sizes.partition_bytes(unit))).collect()
    }

    /// What a save passes through.
    fn saving(&self) -> Result<Option<Charge>, Error> {
        match self.subject.config.checkpoint {
            Some(_) => self.charge(Tier::Host, Kind::Staging, CHUNK_BYTES).map(Some),
            None => Ok(None),
        }
    }

    /// What state on a disk, and what travels with it, passes through.
    fn ring(&self) -> Result<Charge, Error> {
        let parts = self.sizes.ring_parts().map(|bytes| AlignedBuffer::capacity_for(bytes) as u64);
        self.charge(
            Tier::Host,
            Kind::Staging,
            self.subject.config.offload.ring as u64 * parts.iter().sum::<u64>(),
        )
    }

    /// The update, as [`crate::update::Updater::run`].
    fn update(&mut self) -> Result<(), Error> {
        if self.sizes.beside() {
            return Ok(());
        }
        let (sizes, config, world) = (self.sizes, self.subject.config, self.subject.world);
        let sums: Vec<Stored> =
            self.sums.iter_mut().map(|(_, all)| all.take_root().expect("complete")).collect();
        let replicated = config.zero == 0 && world > 1;
        let of_unit = |unit| sizes.pieces(unit).into_iter().map(move |(range, at)| (unit, range.len(), at));
        let (on_disk, in_memory): (Vec<_>, Vec<_>) =
            self.units().flat_map(of_unit).partition(|(_, _, place)| *place == Place::Nvme);
        let _widening = self.charge(Tier::Host, Kind::Staging, 4 * sizes.widened() as u64)?;
        let mut whole = None;
        {
            let _behind = self.copies_behind(&in_memory)?;
            let from_disk =
                in_memory.iter().filter(|(unit, ..)| !replicated && matches!(sums[*unit], Stored::Disk));
            let longest =
                from_disk.map(|(unit, len, _)| sizes.gradient_width(*unit) * len).max().unwrap_or(0);
            let _ahead = match longest {
                0 => None,
                _ => Some(self.charge(Tier::Host, Kind::Staging, gradient_ring_bytes(longest))?),
            };
            self.update_pieces(&in_memory, &sums, &mut whole)?;
        }
        {
            let _ring = if on_disk.is_empty() { None } else { Some(self.ring()?) };
            self.update_pieces(&on_disk, &sums, &mut whole)?;
        }
        drop((whole, sums, _widening));
        self.exchange()
    }

    fn update_pieces(
        &mut self,
        pieces: &[(usize, usize, Place)],
        sums: &[Stored],
        whole: &mut Option<(usize, Charge)>,
    ) -> Result<(), Error> {
        let (sizes, config, world) = (self.sizes, self.subject.config, self.subject.world);
        let (replicated, copy) = (config.zero == 0 && world > 1, config.compute.bytes());
        for &(unit, len, place) in pieces {
            if replicated && whole.as_ref().is_none_or(|(there, _)| *there != unit) {
                drop(whole.take());
                let bytes = 4 * self.layout().partition_len(unit);
                let held = Operation::AllGather.held_bytes(world, bytes) as u64;
                *whole = Some((unit, self.charge(Tier::Device, Kind::Gradients, held)?));
                self.traffic.received += (bytes * (world - 1)) as u64;
            }
            if config.offload.params == Place::Nvme {
                self.traffic.update_written += (len * copy) as u64;
            }
            if matches!(sums[unit], Stored::Disk) {
                self.traffic.update_read += (sizes.gradient_width(unit) * len) as u64;
            }
            match place {
                Place::Nvme => {
                    self.traffic.update_read += sizes.tile_bytes(len);
                    self.traffic.update_written += sizes.tile_bytes(len);
                }
                _ => {
                    let states = config.optim.states().len() * config.state_dtype.bytes();
                    let copied = if sizes.master_is_copy() { 0 } else { copy };
                    self.traffic.update_memory += (len * (4 + 2 * (4 + states) + copied)) as u64;
                }
            }
        }
        Ok(())
    }

    /// What copies on their way to the disk pass through.
    fn copies_behind(&self, pieces: &[(usize, usize, Place)]) -> Result<Option<Charge>, Error> {
        let config = self.subject.config;
        let longest = pieces.iter().map(|(_, len, _)| *len).max().unwrap_or(0);
        if config.offload.params != Place::Nvme || longest == 0 {
            return Ok(None);
        }
        let (buffers, bytes) = copy_buffers(longest, config.compute);
        self.charge(Tier::Host, Kind::Staging, (buffers * bytes) as u64).map(Some)
    }

    /// Stages 1 and 2: the copies that the other ranks updated.
    fn exchange(&mut self) -> Result<(), Error> {
        let (config, world) = (self.subject.config, self.subject.world);
        if world == 1 || !matches!(config.zero, 1 | 2) {
            return Ok(());
        }
        for unit in self.units() {
            let own = self.layout().partition_len(unit) * config.compute.bytes();
            let held = Operation::AllGather.held_bytes(world, own) as u64;
            drop(self.charge(Tier::Device, Kind::Staging, held)?);
            self.traffic.received += (own * (world - 1)) as u64;
        }
        Ok(())
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

/// An exchange of gradients under way.
struct Exchange {
    unit: usize,
    turn: usize,
    charges: Vec<Charge>,
}
