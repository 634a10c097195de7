//! The optimizer's update of everything a rank owns: state in memory where it lies, state on a disk tile by tile with
//! reads ahead and writes behind; then the copies that the ranks owe each other.

use crate::Error;
use crate::config::{Compute, TrainConfig};
use crate::copies::Copies;
use crate::disk::Waited;
use crate::flat::{copy_out, floats};
use crate::layout::Layout;
use crate::optim::{CopyOut, Step};
use crate::reduce::{Reduced, Spill, Stored};
use crate::sizes::{ALIGN, Sizes};
use crate::state::{OptimizerState, Tile};
use hearth_collective::{Operation, Ordered};
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::nvme::NvmeFile;
use hearth_memory::stream::{Access, Ahead, Lease, Part, Prefetcher, Throughput, WriteBehind, update_parts};
use hearth_memory::{Charge, Kind, Ledger, Tier};
use std::ops::Range;

/// Bytes of gradients that are read ahead of the update, and of copies that are written behind it.
const UNDER_WAY: usize = 16 << 20;

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

/// How far gradients on a disk are read ahead, in pieces of which the largest has so many bytes.
fn ahead(largest_piece: usize) -> Ahead {
    Ahead { look_ahead: (UNDER_WAY / largest_piece.max(1)).clamp(2, 8), leases: 1 }
}

/// Bytes of the buffers in which gradients come back from a disk, in pieces of which the largest has so many.
pub(crate) fn gradient_ring_bytes(largest_piece: usize) -> u64 {
    ahead(largest_piece).buffers() as u64 * (largest_piece as u64).next_multiple_of(ALIGN)
}

/// Buffers in which copies go to a disk, and the bytes of each.
pub(crate) fn copy_buffers(largest_piece: usize, compute: Compute) -> (usize, usize) {
    let bytes = (largest_piece * compute.bytes()).next_multiple_of(ALIGN as usize);
    ((UNDER_WAY / bytes.max(1)).clamp(1, 8), bytes)
}

/// Where the copy of a tile lies in the copies' file; the room of a unit's last piece ends with its page.
pub(crate) fn copy_range(sizes: &Sizes<'_>, tile: &Tile, copies: &Copies) -> Range<u64> {
    let start = copies.offset(tile.unit, tile.range.start - sizes.copy_start(tile.unit));
    start..start + ((tile.range.len() * sizes.config.compute.bytes()) as u64).next_multiple_of(ALIGN)
}

/// The copy of a tile in the buffer that is written to the disk.
pub(crate) fn copy_of<'b>(compute: Compute, tile: &Tile, buffer: &'b mut [u8]) -> CopyOut<'b> {
    let (values, rest) = buffer.split_at_mut(tile.range.len() * compute.bytes());
    rest.fill(0);
    copy_out(compute, values)
}

/// What state on a disk, and what travels with it, passes through.
pub(crate) fn ring(sizes: &Sizes<'_>, ledger: &Ledger) -> Result<Vec<AlignedBuffer>, Error> {
    let parts = sizes.ring_parts();
    let buffer =
        |at: usize| AlignedBuffer::charged(ledger, Tier::Host, Kind::Staging, parts[at % parts.len()]);
    Ok((0..sizes.config.offload.ring * parts.len()).map(buffer).collect::<Result<_, _>>()?)
}

impl<'a> Updater<'a> {
    fn sizes(&self) -> Sizes<'a> {
        Sizes { layout: self.layout, config: self.config }
    }

    /// Applies `step` to all that this rank owns and refreshes every copy, the other ranks' parts included.
    pub(crate) fn run(
        &self,
        state: &mut OptimizerState,
        copies: &mut Copies,
        reduced: Reduced,
        step: &Step,
    ) -> Result<Throughput, Error> {
        let mut gradients = Gradients::new(self, reduced)?;
        let mut moved = self.in_memory(state, copies, &mut gradients, step)?;
        moved.add(&self.on_disk(state, copies, &mut gradients, step)?);
        drop(gradients);
        self.exchange(copies)?;
        Ok(moved)
    }

    /// Updates the state that is in memory. Its gradients may come from a disk, and its copies go there.
    fn in_memory(
        &self,
        state: &mut OptimizerState,
        copies: &mut Copies,
        gradients: &mut Gradients<'_>,
        step: &Step,
    ) -> Result<Throughput, Error> {
        let script = state.in_memory();
        let mut fresh = self.fresh(copies, &script)?;
        gradients.read_ahead(&script)?;
        for (unit, range) in script {
            let gradient = gradients.piece(unit, &range)?;
            fresh.with(copies, unit, &range, |copy| {
                state.update(self.layout, unit, &range, gradient, step, copy);
            })?;
        }
        gradients.prefetch = None;
        let io_wait_s = gradients.waited.take_s() + fresh.finish()?;
        Ok(Throughput { io_wait_s, ..Throughput::default() })
    }

    /// Updates the state that is on a disk, tile by tile. Gradients and copies that are there travel with it.
    fn on_disk(
        &self,
        state: &OptimizerState,
        copies: &mut Copies,
        gradients: &mut Gradients<'_>,
        step: &Step,
    ) -> Result<Throughput, Error> {
        let Some((file, tiles)) = state.on_disk() else { return Ok(Throughput::default()) };
        let sizes = self.sizes();
        let copied = copies.file().cloned();
        let files = (&**file, copied.as_deref());
        let gradient = |tile: &Tile| gradients.on_disk(tile.unit, &tile.range);
        let parts: Vec<[Part<'_>; 3]> =
            tiles.iter().map(|tile| self.parts(tile, copies, files, gradient(tile))).collect();
        let mut ring = ring(&sizes, self.ledger)?;
        let form = state.tile_form();
        let update = &mut |at: usize, buffers: &mut [AlignedBuffer]| {
            let tile = &tiles[at];
            let [bytes, gradient, copy] = buffers else { panic!("a buffer for each part") };
            let gradient = match gradient.is_empty() {
                true => gradients.piece(tile.unit, &tile.range)?,
                false => floats(sizes.gradient_precision(tile.unit), gradient, &mut gradients.scratch),
            };
            let copy = match copies.memory_mut(tile.unit) {
                Some(values) => {
                    let start = sizes.copy_start(tile.unit);
                    values.part_mut(tile.range.start - start..tile.range.end - start)
                }
                None => copy_of(self.config.compute, tile, copy),
            };
            form.update(tile, bytes, gradient, step, copy);
            Ok::<_, Error>(())
        };
        update_parts(&parts, &mut ring, update, &mut |_| ())
    }

    /// A tile of state, its gradient and its copy, as far as they are on a disk. `files`: of the state and of the copies.
    fn parts<'f>(
        &self,
        tile: &Tile,
        copies: &Copies,
        (file, copied): (&'f NvmeFile, Option<&'f NvmeFile>),
        gradient: Option<(&'f NvmeFile, Range<u64>)>,
    ) -> [Part<'f>; 3] {
        let none = Part { file, range: 0..0, access: Access::Read };
        let copy = copied.map(|file| {
            let range = copy_range(&self.sizes(), tile, copies);
            Part { file, range, access: Access::Write }
        });
        let gradient = gradient.map(|(file, range)| Part { file, range, access: Access::Read });
        let state = Part { file, range: tile.offset..tile.offset + tile.bytes, access: Access::Change };
        [state, gradient.unwrap_or_else(|| none.clone()), copy.unwrap_or(none)]
    }

    fn fresh(&self, copies: &Copies, script: &[Piece]) -> Result<Fresh<'a>, Error> {
        let longest = script.iter().map(|(_, range)| range.len()).max().unwrap_or(0);
        let (buffers, bytes) = copy_buffers(longest, self.config.compute);
        let behind = match copies.file() {
            Some(file) if longest > 0 => {
                Some(WriteBehind::new(file.clone(), buffers, bytes, self.ledger, Tier::Host)?)
            }
            _ => None,
        };
        Ok(Fresh { sizes: self.sizes(), behind })
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
    /// Where a piece that is kept in 16 bits is widened.
    scratch: Vec<f32>,
    _widening: Charge,
    /// The last piece that came from the disk.
    lease: Option<Lease>,
    waited: Waited,
}

/// The copies of what is updated: in place, or on their way to the disk.
struct Fresh<'a> {
    sizes: Sizes<'a>,
    behind: Option<WriteBehind>,
}

impl Fresh<'_> {
    /// Lets `update` write the copy of a part of a unit.
    fn with(
        &mut self,
        copies: &mut Copies,
        unit: usize,
        range: &Range<usize>,
        update: impl FnOnce(CopyOut<'_>),
    ) -> Result<(), Error> {
        let start = self.sizes.copy_start(unit);
        if let Some(copy) = copies.memory_mut(unit) {
            update(copy.part_mut(range.start - start..range.end - start));
            return Ok(());
        }
        let behind = self.behind.as_mut().expect("copies that are not in memory are on a disk");
        let compute = self.sizes.config.compute;
        let bytes = range.len() * compute.bytes();
        // The room of the last piece ends with its page.
        let mut buffer = behind.buffer(bytes.next_multiple_of(ALIGN as usize))?;
        update(copy_out(compute, &mut buffer[..bytes]));
        buffer[bytes..].fill(0);
        Ok(behind.write(copies.offset(unit, range.start - start), buffer)?)
    }

    /// Waits for the last copies; seconds that were waited in all.
    fn finish(&mut self) -> Result<f64, Error> {
        let Some(behind) = &mut self.behind else { return Ok(0.0) };
        behind.finish()?;
        Ok(behind.waited_s())
    }
}

impl<'a> Gradients<'a> {
    fn new(updater: &'a Updater<'a>, reduced: Reduced) -> Result<Self, Error> {
        let sizes = updater.sizes();
        let wide = 4 * sizes.widened();
        let _widening = updater.ledger.charge(Tier::Host, Kind::Staging, wide as u64)?;
        Ok(Self {
            updater,
            stored: reduced.units,
            prefetch: None,
            replicated: updater.config.zero == 0 && updater.comm.world_size() > 1,
            whole: None,
            scratch: vec![0.0; wide / 4],
            _widening,
            lease: None,
            waited: Waited::default(),
        })
    }

    /// Where a piece lies on the disk, if that is where it is updated from.
    fn on_disk(&self, unit: usize, range: &Range<usize>) -> Option<(&'a NvmeFile, Range<u64>)> {
        let Stored::Disk(slot) = &self.stored[unit] else { return None };
        let spill = self.updater.spill.filter(|_| !self.replicated)?;
        let width = self.updater.sizes().gradient_width(unit);
        let start = range.start - self.updater.partition_start(unit);
        let at = spill.offset(unit, slot.number) + (width * start) as u64;
        Some((&spill.file, at..at + (width * range.len()) as u64))
    }

    /// Begins to read the pieces of a script that are on a disk.
    fn read_ahead(&mut self, script: &[Piece]) -> Result<(), Error> {
        let ranges = script.iter().filter_map(|(unit, range)| Some(self.on_disk(*unit, range)?.1));
        let ranges: Vec<Range<u64>> = ranges.collect();
        let longest = ranges.iter().map(|range| range.end - range.start).max().unwrap_or(0);
        if let (1.., Some(spill)) = (longest, self.updater.spill) {
            let (file, ledger) = (spill.file.clone(), self.updater.ledger);
            self.prefetch = Some(Prefetcher::new(file, ranges, ahead(longest as usize), ledger, Tier::Host)?);
        }
        Ok(())
    }

    /// The next piece's gradient.
    fn piece(&mut self, unit: usize, range: &Range<usize>) -> Result<&[f32], Error> {
        if self.replicated {
            self.gather(unit)?;
            let (_, whole, _) = self.whole.as_ref().expect("just gathered");
            return Ok(&whole[range.clone()]);
        }
        let start = self.updater.partition_start(unit);
        let precision = self.updater.sizes().gradient_precision(unit);
        match &self.stored[unit] {
            Stored::Memory(values, _) => {
                Ok(values.floats(range.start - start..range.end - start, &mut self.scratch))
            }
            Stored::Given => panic!("a gradient that was handed over is used up"),
            Stored::Disk(_) => {
                let prefetch = self.prefetch.as_mut().expect("gradients on a disk are read ahead");
                self.lease = None;
                self.lease = self.waited.time(|| prefetch.next())?;
                let lease = self.lease.as_ref().expect("the script has every piece");
                Ok(floats(precision, lease.buffer(), &mut self.scratch))
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
            Stored::Memory(values, _) => values.clone().into_f32(),
            Stored::Given => panic!("a gradient that was handed over is used up"),
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
