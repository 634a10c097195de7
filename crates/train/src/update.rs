//! The optimizer's update of everything a rank owns: state in memory where it lies, state on a disk tile by tile with
//! reads ahead and writes behind; then the copies that the ranks owe each other.

use crate::Error;
use crate::config::TrainConfig;
use crate::copies::Copies;
use crate::flat::Flat;
use crate::layout::Layout;
use crate::optim::Step;
use crate::reduce::{Reduced, Spill, Stored};
use crate::sizes::{ALIGN, Sizes};
use crate::state::OptimizerState;
use hearth_collective::{Operation, Ordered};
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::stream::{Ahead, Lease, Prefetcher, Throughput, update_tiles};
use hearth_memory::{Charge, Kind, Ledger, Tier};
use std::ops::Range;

/// Gradients are read this far ahead of the update.
const GRADIENTS_AHEAD: usize = 2;

/// What an update works with.
pub(crate) struct Updater<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) config: &'a TrainConfig,
    pub(crate) comm: &'a Ordered,
    pub(crate) ledger: &'a Ledger,
    pub(crate) spill: Option<&'a Spill>,
}

/// A part of a unit.
type Piece = (usize, Range<usize>);

/// Bytes of the buffers in which gradients come back from a disk.
pub(crate) fn gradient_ring_bytes(largest_piece: usize) -> u64 {
    let buffers = Ahead { look_ahead: GRADIENTS_AHEAD, leases: 1 }.buffers() as u64;
    buffers * (4 * largest_piece as u64).next_multiple_of(ALIGN)
}

impl<'a> Updater<'a> {
    fn sizes(&self) -> Sizes<'a> {
        Sizes { layout: self.layout, config: self.config }
    }

    /// Applies `step` to all that this rank owns and refreshes every copy, the other ranks' parts included. `ring` has
    /// the buffers for state on a disk.
    pub(crate) fn run(
        &self,
        state: &mut OptimizerState,
        copies: &mut Copies,
        reduced: Reduced,
        step: &Step,
        ring: &mut [AlignedBuffer],
    ) -> Result<Throughput, Error> {
        let in_memory = state.in_memory();
        let on_disk = state.on_disk().map_or(Vec::new(), |(_, tiles)| tiles.to_vec());
        let tiles = on_disk.iter().map(|tile| (tile.unit, tile.range.clone()));
        let mut gradients = self.gradients(reduced, in_memory.iter().cloned().chain(tiles))?;
        for (unit, range) in in_memory {
            let gradient = gradients.piece(unit, &range)?;
            self.with_copy(copies, unit, &range, |copy| {
                state.update(self.layout, unit, &range, gradient.values(), step, copy);
            })?;
        }
        let mut moved = Throughput::default();
        if let Some((file, _)) = state.on_disk() {
            let ranges: Vec<Range<u64>> = on_disk.iter().map(|t| t.offset..t.offset + t.bytes).collect();
            moved = update_tiles(file, &ranges, ring, &mut |at, bytes| {
                let tile = &on_disk[at];
                let gradient = gradients.piece(tile.unit, &tile.range)?;
                self.with_copy(copies, tile.unit, &tile.range, |copy| {
                    state.update_tile(tile, bytes, gradient.values(), step, copy);
                })
            })?;
        }
        drop(gradients);
        self.exchange(copies)?;
        Ok(moved)
    }

    /// Lets `update` write the copy of a part of a unit: in place, or by way of a small buffer to the disk.
    fn with_copy(
        &self,
        copies: &mut Copies,
        unit: usize,
        range: &Range<usize>,
        update: impl FnOnce((&mut Flat, Range<usize>)),
    ) -> Result<(), Error> {
        let start = self.sizes().copy_start(unit);
        let part = range.start - start..range.end - start;
        if let Some(copy) = copies.memory_mut(unit) {
            update((copy, part));
            return Ok(());
        }
        let bytes = (range.len() * self.config.compute.bytes()) as u64;
        let _charge = self.ledger.charge(Tier::Host, Kind::Staging, self.sizes().writing_bytes(bytes))?;
        let mut fresh = Flat::zeros(self.config.compute, range.len());
        update((&mut fresh, 0..range.len()));
        copies.write(unit, part.start, &fresh)
    }

    /// Stages 1 and 2: every rank gets the partitions that the others updated.
    fn exchange(&self, copies: &mut Copies) -> Result<(), Error> {
        if self.comm.world_size() == 1 || !matches!(self.config.zero, 1 | 2) {
            return Ok(());
        }
        for unit in 0..self.layout.units().len() {
            let words = self.layout.partition_len(unit) * self.config.compute.bytes() / 4;
            let held = Operation::AllGather.held_bytes(self.comm.world_size(), 4 * words) as u64;
            let _charge = self.ledger.charge(Tier::Device, Kind::Staging, held)?;
            let mut own = vec![0u32; words];
            let range = self.layout.partition(unit);
            let bytes = range.len() * self.config.compute.bytes();
            copies.read(unit, range.start, &mut bytemuck::cast_slice_mut(&mut own)[..bytes])?;
            let all = self.comm.all_gather(own).wait()?;
            copies.set_bytes(unit, bytemuck::cast_slice(&all))?;
        }
        Ok(())
    }

    fn gradients(
        &self,
        reduced: Reduced,
        script: impl Iterator<Item = Piece>,
    ) -> Result<Gradients<'_>, Error> {
        let replicated = self.config.zero == 0 && self.comm.world_size() > 1;
        let mut ranges = Vec::new();
        if !replicated {
            for (unit, range) in script {
                if let Stored::Disk(slot) = &reduced.units[unit] {
                    let offset = self.spill.expect("a slot lies in a spill file").offset(unit, slot.number);
                    let at = offset + 4 * (range.start - self.partition_start(unit)) as u64;
                    ranges.push(at..at + 4 * range.len() as u64);
                }
            }
        }
        let prefetch = match (ranges.is_empty(), self.spill) {
            (false, Some(spill)) => Some(Prefetcher::new(
                spill.file.clone(),
                ranges,
                Ahead { look_ahead: GRADIENTS_AHEAD, leases: 1 },
                self.ledger,
                Tier::Host,
            )?),
            _ => None,
        };
        Ok(Gradients { updater: self, stored: reduced.units, prefetch, replicated, whole: None })
    }

    fn partition_start(&self, unit: usize) -> usize {
        self.layout.rank() * self.layout.partition_len(unit)
    }
}

/// The summed gradients, piece by piece in the order of the script.
struct Gradients<'a> {
    updater: &'a Updater<'a>,
    stored: Vec<Stored>,
    prefetch: Option<Prefetcher>,
    /// Stage 0 on several ranks: each updates everything, so each needs every partition.
    replicated: bool,
    whole: Option<(usize, Vec<f32>, Charge)>,
}

/// One piece's gradient.
enum Gradient<'a> {
    Slice(&'a [f32]),
    Lease(Lease),
}

impl Gradient<'_> {
    fn values(&self) -> &[f32] {
        match self {
            Gradient::Slice(values) => values,
            Gradient::Lease(lease) => lease.buffer().as_slice(),
        }
    }
}

impl Gradients<'_> {
    fn piece(&mut self, unit: usize, range: &Range<usize>) -> Result<Gradient<'_>, Error> {
        if self.replicated {
            self.gather(unit)?;
            let (_, whole, _) = self.whole.as_ref().expect("just gathered");
            return Ok(Gradient::Slice(&whole[range.clone()]));
        }
        let start = self.updater.partition_start(unit);
        match &self.stored[unit] {
            Stored::Memory(values, _) => Ok(Gradient::Slice(&values[range.start - start..range.end - start])),
            Stored::Disk(_) => {
                let prefetch = self.prefetch.as_mut().expect("gradients on a disk are read ahead");
                Ok(Gradient::Lease(prefetch.next()?.expect("the script has every piece")))
            }
        }
    }

    /// Gathers a unit's gradient, unless it is there.
    fn gather(&mut self, unit: usize) -> Result<(), Error> {
        if self.whole.as_ref().is_some_and(|(there, ..)| *there == unit) {
            return Ok(());
        }
        self.whole = None;
        let updater = self.updater;
        let len = updater.layout.partition_len(unit);
        let held = Operation::AllGather.held_bytes(updater.comm.world_size(), 4 * len) as u64;
        let charge = updater.ledger.charge(Tier::Device, Kind::Gradients, held)?;
        let own = match &self.stored[unit] {
            Stored::Memory(values, _) => values.clone(),
            Stored::Disk(slot) => {
                let spill = updater.spill.expect("a slot lies in a spill file");
                let mut values = vec![0.0; len];
                let offset = spill.offset(unit, slot.number);
                spill.file.read_at(offset, bytemuck::cast_slice_mut(&mut values))?;
                values
            }
        };
        let whole = updater.comm.all_gather(own).wait()?;
        self.whole = Some((unit, whole, charge));
        Ok(())
    }
}
