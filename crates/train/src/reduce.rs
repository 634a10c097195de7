//! One step's gradients: put together unit by unit as the backward pass makes them, summed over micro-batches and
//! ranks in the tree of [`crate::gradients`], and kept where the plan wants them until the update.
//!
//! # Who computes which micro-batch
//! The tree is over the *global* index of the micro-batches, so who computes which is free. When gradients are held
//! whole until the step ends (stages 0 and 1) and the micro-batches per rank are a power of two, a rank takes a
//! contiguous block, sums it alone and sends its sum once. Otherwise the ranks take neighbouring micro-batches and
//! every one's gradients are reduced as soon as they exist: only a partition is ever kept.

use crate::Error;
use crate::beside::Handover;
use crate::config::{Place, TrainConfig};
use crate::disk::Waited;
use crate::flat::Flat;
use crate::gradients::{TreeSum, add, chunk_squares, chunk_squares_of};
use crate::sizes::{ALIGN, Sizes};
use crate::source::Gradient;
use hearth_collective::{Operation, Ordered, Pending};
use hearth_memory::nvme::NvmeFile;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Which micro-batches a rank computes, and when their gradients are exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    total: usize,
    world: usize,
    /// Micro-batches a rank sums before anything is exchanged: a power of two, or 1.
    block: usize,
}

impl Assignment {
    /// For a step of `config` on `world` ranks.
    ///
    /// # Errors
    /// [`Error::Config`] when the micro-batches cannot be shared out evenly.
    pub fn new(config: &TrainConfig, world: usize) -> Result<Self, Error> {
        let total = config.micro_batches();
        if !total.is_multiple_of(world) {
            return Err(Error::Config(format!(
                "train.global_batch / train.micro_batch = {total} micro-batches cannot be shared out evenly among {world} \
                 ranks (parallel.data); make it {} or {}, or use fewer ranks",
                (total / world).max(1) * world,
                (total / world + 1) * world
            )));
        }
        let each = total / world;
        let block = if config.zero < 2 && each.is_power_of_two() { each } else { 1 };
        Ok(Self { total, world, block })
    }

    /// Micro-batches of each rank.
    pub fn each(&self) -> usize {
        self.total / self.world
    }

    /// Global index of the micro-batch that `rank` computes in its `turn`.
    pub fn index(&self, rank: usize, turn: usize) -> usize {
        self.node(rank, turn).start + turn % self.block
    }

    /// Micro-batches in all.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Micro-batches a rank sums before anything is exchanged.
    pub(crate) fn block(&self) -> usize {
        self.block
    }

    /// The node of the tree that `rank` hands over with its `turn`.
    fn node(&self, rank: usize, turn: usize) -> Range<usize> {
        let start = (turn / self.block * self.world + rank) * self.block;
        start..start + self.block
    }

    /// Whether the turn's gradients complete what a rank hands over.
    pub(crate) fn is_due(&self, turn: usize) -> bool {
        (turn + 1).is_multiple_of(self.block)
    }

    /// Whether the nodes that the ranks hand over together are one node, summed in the order of
    /// [`hearth_collective::ProcessGroup::reduce_scatter`].
    pub(crate) fn joint(&self) -> bool {
        self.block == self.each() || self.world.is_power_of_two()
    }

    /// Partial sums of one unit that a rank puts by between two exchanges, at most.
    pub fn most_held(&self) -> usize {
        let (mut tree, mut most) = (TreeSum::new(self.total), 0);
        for turn in (0..self.each()).filter(|turn| self.is_due(*turn)) {
            for node in self.nodes(turn) {
                tree.push(node, (), &mut |(), ()| Ok::<_, ()>(())).expect("nothing to fail");
                most = most.max(tree.held());
            }
        }
        most
    }

    /// What arrives in one exchange, as nodes.
    pub(crate) fn nodes(&self, turn: usize) -> Vec<Range<usize>> {
        if !self.joint() {
            return (0..self.world).map(|rank| self.node(rank, turn)).collect();
        }
        let joint = self.node(0, turn).start..self.node(self.world - 1, turn).end;
        std::iter::once(joint).collect()
    }
}

/// A summed gradient, waiting for the update.
pub(crate) enum Stored {
    Memory(Flat, Charge),
    Disk(Slot),
    /// It was handed over to the update.
    Given,
}

/// The sum of two gradients; f32, or there would be only one.
fn sum(left: Flat, right: Flat) -> Flat {
    let mut left = left.into_f32();
    add(&mut left, &right.into_f32());
    Flat::F32(left)
}

/// A place in the spill file.
pub(crate) struct Slot {
    pub(crate) number: usize,
}

/// What is on its way to the spill file: one sum at a time, so that what is held does not depend on timing.
struct Writing {
    thread: JoinHandle<Result<(), hearth_memory::Error>>,
    _charge: Charge,
}

/// Waits for it.
fn settle(writing: &mut Option<Writing>) -> Result<(), Error> {
    match writing.take() {
        Some(writing) => Ok(writing.thread.join().expect("writing does not panic")?),
        None => Ok(()),
    }
}

/// Gradients on the nvme tier: a few slots per unit, kept from step to step.
pub(crate) struct Spill {
    pub(crate) file: Arc<NvmeFile>,
    /// Offset of each unit's first slot and bytes of each of its slots.
    units: Vec<(u64, u64)>,
    slots: usize,
    pub(crate) waited: Waited,
}

impl Spill {
    pub(crate) fn new(sizes: &Sizes<'_>, assignment: Assignment, ledger: &Ledger) -> Result<Self, Error> {
        let slots = assignment.most_held();
        let mut at = 0;
        let place = |unit| {
            let bytes = sizes.partition_bytes(unit).next_multiple_of(ALIGN);
            at += slots as u64 * bytes;
            (at - slots as u64 * bytes, bytes)
        };
        let units = (0..sizes.layout.units().len()).map(place).collect();
        let file = crate::disk::file(sizes, "gradients", at, Kind::Gradients, ledger)?;
        Ok(Self { file: Arc::new(file), units, slots, waited: Waited::default() })
    }

    /// Where a slot lies.
    pub(crate) fn offset(&self, unit: usize, slot: usize) -> u64 {
        assert!(slot < self.slots, "as many slots as partial sums");
        self.units[unit].0 + slot as u64 * self.units[unit].1
    }
}

/// One unit's gradients during a step.
struct UnitGradients {
    /// The micro-batch's gradient, as far as it is known.
    open: Option<(Flat, Charge)>,
    /// Parameters put in so far.
    filled: usize,
    /// Sums of this rank's micro-batches.
    own: TreeSum<(Flat, Charge)>,
    /// Sums over ranks, of this rank's partition.
    all: TreeSum<Stored>,
    free_slots: Vec<usize>,
    /// Of the complete sum.
    squares: Vec<f64>,
}

/// An exchange under way.
struct InFlight {
    unit: usize,
    turn: usize,
    result: Pending<Vec<f32>>,
    charges: Vec<Charge>,
}

/// Collects one step's gradients.
pub(crate) struct Reducer<'a> {
    sizes: Sizes<'a>,
    assignment: Assignment,
    comm: &'a Ordered,
    ledger: &'a Ledger,
    spill: Option<&'a Spill>,
    handover: Option<Handover<'a>>,
    units: Vec<UnitGradients>,
    in_flight: Option<InFlight>,
    writing: Option<Writing>,
}

/// One step's summed gradients.
pub(crate) struct Reduced {
    /// This rank's partition of each unit.
    pub(crate) units: Vec<Stored>,
    /// Sums of squares of their chunks.
    pub(crate) squares: Vec<Vec<f64>>,
}

impl<'a> Reducer<'a> {
    pub(crate) fn new(
        sizes: Sizes<'a>,
        assignment: Assignment,
        comm: &'a Ordered,
        ledger: &'a Ledger,
        spill: Option<&'a Spill>,
        handover: Option<Handover<'a>>,
    ) -> Self {
        let fresh = |_| UnitGradients {
            open: None,
            filled: 0,
            own: TreeSum::new(assignment.block),
            all: TreeSum::new(assignment.total),
            free_slots: spill.map_or(Vec::new(), |spill| (0..spill.slots).rev().collect()),
            squares: Vec::new(),
        };
        let units = (0..sizes.layout.units().len()).map(fresh).collect();
        Self { sizes, assignment, comm, ledger, spill, handover, units, in_flight: None, writing: None }
    }

    /// Takes the gradient of one parameter from the micro-batch of this rank's `turn`.
    pub(crate) fn put(&mut self, turn: usize, param: usize, gradient: Gradient) -> Result<(), Error> {
        let (param, Gradient(gradient)) = (&self.sizes.layout.params()[param], gradient);
        let (at, layout) = (param.unit, self.sizes.layout);
        let (padded, precision) = (layout.padded_len(at), self.sizes.gradient_precision(at));
        let unit = &mut self.units[at];
        let whole = gradient.len() == padded && gradient.precision() == precision;
        if unit.open.is_none() {
            let charge = self.ledger.charge(Tier::Device, Kind::Gradients, self.sizes.gradient_bytes(at))?;
            unit.open = Some((Flat::with_capacity(precision, if whole { 0 } else { padded }), charge));
        }
        let (buffer, _) = unit.open.as_mut().expect("just opened");
        if whole {
            *buffer = gradient;
        } else {
            let bytes = gradient.as_bytes().len() as u64;
            let _arriving = self.ledger.charge(Tier::Device, Kind::Gradients, bytes)?;
            buffer.put(param.range.start, &gradient);
        }
        unit.filled += 1;
        if unit.filled < layout.units()[at].params.len() {
            return Ok(());
        }
        unit.filled = 0;
        let mut open = unit.open.take().expect("just filled");
        open.0.pad_to(padded);
        let place = turn % self.assignment.block;
        unit.own.push(place..place + 1, open, &mut |mut left, right| {
            left.0 = sum(left.0, right.0);
            Ok::<_, Error>(left)
        })?;
        match self.assignment.is_due(turn) {
            true => self.exchange(at, turn),
            false => Ok(()),
        }
    }

    /// Hands a unit's sum over, and takes what came of the exchange before: it ran beside the backward pass.
    fn exchange(&mut self, unit: usize, turn: usize) -> Result<(), Error> {
        self.settle()?;
        let (sum, charge) = self.units[unit].own.take_root().expect("this rank's micro-batches are summed");
        if self.comm.world_size() == 1 {
            let node = self.assignment.node(0, turn);
            return self.keep(unit, node, sum, charge);
        }
        let operation = if self.assignment.joint() { Operation::ReduceScatter } else { Operation::AllToAll };
        let moving = self.sizes.exchange_bytes(operation, self.sizes.gradient_bytes(unit));
        let moving = self.ledger.charge(Tier::Device, Kind::Staging, moving)?;
        let result = match operation {
            Operation::ReduceScatter => self.comm.reduce_scatter(sum.into_f32()),
            _ => self.comm.all_to_all(sum.into_f32()),
        };
        self.in_flight = Some(InFlight { unit, turn, result, charges: vec![charge, moving] });
        Ok(())
    }

    /// Waits for the exchange under way.
    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        let Some(InFlight { unit, turn, result, charges }) = self.in_flight.take() else { return Ok(()) };
        let result = result.wait()?;
        let bytes = self.sizes.partition_bytes(unit);
        let nodes = self.assignment.nodes(turn);
        if let [node] = nodes.as_slice() {
            drop(charges);
            let charge = self.ledger.charge(Tier::Device, Kind::Gradients, bytes)?;
            return self.keep(unit, node.clone(), Flat::F32(result), charge);
        }
        for (node, part) in nodes.into_iter().zip(result.chunks(self.sizes.layout.partition_len(unit))) {
            let charge = self.ledger.charge(Tier::Device, Kind::Gradients, bytes)?;
            self.keep(unit, node, Flat::F32(part.to_vec()), charge)?;
        }
        drop(charges);
        Ok(())
    }

    /// Adds a sum over the micro-batches `node` to the tree, and puts by what comes of it.
    fn keep(&mut self, unit: usize, node: Range<usize>, new: Flat, charge: Charge) -> Result<(), Error> {
        let (spill, sizes, ledger) = (self.spill, self.sizes, self.ledger);
        let UnitGradients { all, free_slots, squares, .. } = &mut self.units[unit];
        let (writing, handover) = (&mut self.writing, &self.handover);
        let place = sizes.config.offload.grads;
        let bytes = sizes.partition_bytes(unit);
        // Whatever is summed now is in memory; what was put by may have to be read.
        let mut read = |stored: Stored| match stored {
            Stored::Memory(values, charge) => Ok((values, charge)),
            Stored::Disk(slot) => {
                let spill = spill.expect("a slot lies in a spill file");
                spill.waited.time(|| settle(writing))?;
                let charge = ledger.charge(Tier::Host, Kind::Staging, bytes)?;
                let mut values =
                    Flat::zeros(sizes.gradient_precision(unit), sizes.layout.partition_len(unit));
                let offset = spill.offset(unit, slot.number);
                spill.waited.time(|| spill.file.read_at(offset, values.as_bytes_mut()))?;
                free_slots.push(slot.number);
                Ok::<_, Error>((values, charge))
            }
            Stored::Given => panic!("a gradient that is handed over is the only one"),
        };
        all.push(node, Stored::Memory(new, charge), &mut |left, right| {
            let ((left, charge), (right, _)) = (read(left)?, read(right)?);
            Ok::<_, Error>(Stored::Memory(sum(left, right), charge))
        })?;
        if let Some(Stored::Memory(sum, _)) = all.root() {
            *squares = match sum {
                Flat::F32(sum) => chunk_squares(sum),
                Flat::Bf16(sum) => chunk_squares_of(sum),
                Flat::F16(sum) => chunk_squares_of(sum),
            };
        }
        all.update_last(&mut |stored| {
            let Stored::Memory(values, charge) = stored else { return Ok(stored) };
            if let Some(handover) = handover {
                return handover.give(unit, values, squares, charge).map(|()| Stored::Given);
            }
            match place {
                Place::Device => Ok(Stored::Memory(values, charge)),
                Place::Cpu => {
                    drop(charge);
                    let charge = ledger.charge(Tier::Host, Kind::Gradients, bytes)?;
                    Ok(Stored::Memory(values, charge))
                }
                Place::Nvme => {
                    drop(charge);
                    let spill = spill.expect("gradients on nvme have a spill file");
                    spill.waited.time(|| settle(writing))?;
                    let _charge = ledger.charge(Tier::Host, Kind::Staging, sizes.writing_bytes(bytes))?;
                    let number = free_slots.pop().expect("as many slots as partial sums");
                    let (file, offset) = (spill.file.clone(), spill.offset(unit, number));
                    let thread =
                        std::thread::spawn(move || crate::disk::write(&file, offset, values.as_bytes()));
                    *writing = Some(Writing { thread, _charge });
                    Ok(Stored::Disk(Slot { number }))
                }
            }
        })
    }

    /// The sums, after the last micro-batch.
    pub(crate) fn finish(mut self) -> Result<Reduced, Error> {
        self.settle()?;
        match self.spill {
            Some(spill) => spill.waited.time(|| settle(&mut self.writing))?,
            None => settle(&mut self.writing)?,
        }
        let mut reduced = Reduced { units: Vec::new(), squares: Vec::new() };
        for mut unit in self.units {
            reduced.units.push(unit.all.take_root().expect("every micro-batch gave a gradient"));
            reduced.squares.push(unit.squares);
        }
        Ok(reduced)
    }
}
