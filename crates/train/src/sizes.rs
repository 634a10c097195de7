//! What every part of the training state takes, in bytes. The trainer charges these numbers before it allocates, and
//! the planner adds up the same numbers: that is why a plan can be a contract.

use crate::config::{Compute, Place, TrainConfig};
use crate::gradients::NORM_CHUNK;
use crate::layout::Layout;
use hearth_collective::Operation;
use hearth_memory::Tier;
use hearth_model::Group;
use std::ops::Range;

/// Elements of a tile: what the optimizer reads, updates and writes at a time when its state lies on a disk.
pub const TILE: usize = 1 << 19;
/// Tiles' parts start at multiples of this, as direct I/O wants.
pub const ALIGN: u64 = 4096;
/// Most bytes copied to an aligned buffer at a time on their way to the disk.
pub const BOUNCE: usize = 8 << 20;
/// Tiles of state on a disk that are under way at once: one computed, the others read ahead and written back.
pub const RING: usize = 8;
/// The same where memory is to spare: a busy disk gives more of its speed the more it is asked for.
pub const DEEP_RING: usize = 24;

impl Place {
    /// The tier it is charged to.
    pub fn tier(self) -> Tier {
        match self {
            Place::Device => Tier::Device,
            Place::Cpu => Tier::Host,
            Place::Nvme => Tier::Nvme,
        }
    }
}

/// How the optimizer's f32 masters are kept, where they lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masters {
    /// The copy the model is computed with is the master.
    Copy,
    /// The copy is the upper half of the master, the lower half lies beside it: exact, at no more than f32 takes. See
    /// [`hearth_kernels::cpu::halves`].
    Low,
    /// On their own.
    Whole,
}

impl Masters {
    /// Bytes of an element beside the copy.
    pub fn bytes(self) -> usize {
        match self {
            Masters::Copy => 0,
            Masters::Low => size_of::<i16>(),
            Masters::Whole => size_of::<f32>(),
        }
    }
}

/// A run's sizes: one rank's layout and what the configuration makes of it.
#[derive(Clone, Copy)]
pub struct Sizes<'a> {
    /// Who owns what.
    pub layout: &'a Layout,
    /// Where it lies.
    pub config: &'a TrainConfig,
}

impl Sizes<'_> {
    /// What of a unit this rank's optimizer updates.
    pub fn owned(&self, unit: usize) -> Range<usize> {
        match self.config.zero {
            0 => 0..self.layout.units()[unit].len,
            _ => self.layout.partition(unit),
        }
    }

    /// The parts of [`Sizes::owned`] by where their optimizer state lies.
    pub fn segments(&self, unit: usize) -> Vec<(Range<usize>, Place)> {
        let owned = self.owned(unit);
        let away = self.config.offload.optim;
        let stays = if away == Place::Device { 1.0 } else { 1.0 - self.config.offload.ratio };
        let chunks = owned.len().div_ceil(NORM_CHUNK);
        let cut = (owned.start + (stays * chunks as f64).round() as usize * NORM_CHUNK).min(owned.end);
        let parts = [(owned.start..cut, Place::Device), (cut..owned.end, away)];
        parts.into_iter().filter(|(range, _)| !range.is_empty()).collect()
    }

    /// How the masters of state in memory are kept.
    pub fn masters(&self) -> Masters {
        let o = &self.config.offload;
        let together = o.params == o.optim && (o.optim == Place::Device || o.ratio == 1.0);
        match self.config.compute {
            _ if !together || o.params == Place::Nvme => Masters::Whole,
            Compute::F32 => Masters::Copy,
            Compute::Bf16 if self.config.optim.elementwise() => Masters::Low,
            Compute::Bf16 | Compute::F16 => Masters::Whole,
        }
    }

    /// Elements of a unit's copy as it is kept.
    pub fn copy_len(&self, unit: usize) -> usize {
        if self.partitioned() { self.layout.partition_len(unit) } else { self.layout.units()[unit].len }
    }

    /// Bytes of a unit's copy as it is kept.
    pub fn copy_bytes(&self, unit: usize) -> u64 {
        let bytes = (self.copy_len(unit) * self.config.compute.bytes()) as u64;
        if self.config.offload.params == Place::Nvme { bytes.next_multiple_of(ALIGN) } else { bytes }
    }

    /// What is kept of a unit, of its (padded) elements.
    pub(crate) fn copy_range(&self, unit: usize) -> Range<usize> {
        let start = self.copy_start(unit);
        start..start + self.copy_len(unit)
    }

    /// Bytes that reading a unit's weights takes: its exact values, and its largest tensor.
    pub(crate) fn loading_bytes(&self, unit: usize) -> u64 {
        let params = &self.layout.params()[self.layout.units()[unit].params.clone()];
        let largest = params.iter().map(|param| param.range.len()).max().unwrap_or(0);
        4 * (self.layout.padded_len(unit) + largest) as u64
    }

    /// The unit's element with which its copy begins.
    pub(crate) fn copy_start(&self, unit: usize) -> usize {
        if self.partitioned() { self.layout.rank() * self.layout.partition_len(unit) } else { 0 }
    }

    /// Whether each rank keeps only its partition of the parameters.
    pub fn partitioned(&self) -> bool {
        self.config.zero == 3 && self.layout.world() > 1
    }

    /// Whether each unit is updated as soon as its gradient is there, beside the backward pass: where all state lies on
    /// the disk, there is one micro-batch, so that nothing is summed, and neither clipping nor a loss scale asks for the
    /// whole gradient first.
    pub fn beside(&self) -> bool {
        let (config, offload) = (self.config, &self.config.offload);
        let on_disk = offload.params == Place::Nvme && offload.optim == Place::Nvme && offload.ratio == 1.0;
        let at_once = config.micro_batches() == 1 && config.clip_norm == 0.0 && config.loss_scale.is_none();
        on_disk && at_once && config.optim.elementwise()
    }

    /// Whether a unit's update waits for the next step's forward pass. The backward pass makes the last units' gradients
    /// first: of those, every second one, so that the disk has the others to update meanwhile.
    pub(crate) fn late(&self, unit: usize) -> bool {
        let before = self.layout.units().len() - 1 - unit;
        self.beside() && before % 2 == 1 && before / 2 < self.config.offload.late
    }

    /// Units whose update is worth making late: about as much as fits beside a forward pass, a fifth of the model.
    pub fn most_late(&self) -> usize {
        let units = self.layout.units().len();
        if self.beside() { units.div_ceil(5).min(units / 2) } else { 0 }
    }

    /// Whether summed gradients are kept on the disk.
    pub(crate) fn spills(&self) -> bool {
        self.config.offload.grads == Place::Nvme && !self.beside()
    }

    /// Whether a copy must be brought before it is used.
    pub fn fetched(&self) -> bool {
        self.partitioned() || self.config.offload.params != Place::Device
    }

    /// Bytes of a unit as the model is computed with, when it was fetched; 0 when it is used where it lies.
    pub fn view_bytes(&self, unit: usize) -> u64 {
        let len = match (self.fetched(), self.partitioned()) {
            (false, _) => 0,
            (true, false) => self.layout.units()[unit].len,
            (true, true) => self.layout.padded_len(unit),
        };
        (len * self.config.compute.bytes()) as u64
    }

    /// Bytes of optimizer state for `range` of a unit, at `place`.
    pub fn optimizer_bytes(&self, unit: usize, range: &Range<usize>, place: Place) -> u64 {
        match place {
            Place::Nvme => tiles(range).map(|tile| self.tile_bytes(tile.len())).sum(),
            _ => {
                let master = self.masters().bytes() * range.len();
                let state = self.config.state_dtype.bytes_of(self.state_len(unit, range));
                (master + self.config.optim.states().len() * state) as u64
            }
        }
    }

    /// Elements of each of the optimizer's states for `range` of a unit.
    pub fn state_len(&self, unit: usize, range: &Range<usize>) -> usize {
        if self.config.optim.elementwise() {
            return range.len();
        }
        let params = &self.layout.params()[self.layout.units()[unit].params.clone()];
        params.iter().map(|param| self.config.optim.state_len(&param.shape)).sum()
    }

    /// Bytes of a tile of `len` elements: master and states one after another, each aligned.
    pub fn tile_bytes(&self, len: usize) -> u64 {
        let state = self.config.state_dtype.bytes_of(len) as u64;
        let states = self.config.optim.states().len() as u64;
        ((4 * len) as u64).next_multiple_of(ALIGN) + states * state.next_multiple_of(ALIGN)
    }

    /// The precision a unit's gradient is kept in: that of one micro-batch's, if it is the only one, else f32. The
    /// embedding's may be a sum of two.
    pub fn gradient_precision(&self, unit: usize) -> Compute {
        let sum = self.config.micro_batches() > 1 || self.layout.units()[unit].group == Group::Embedding;
        if sum { Compute::F32 } else { self.config.compute }
    }

    /// Bytes of an element of it.
    pub fn gradient_width(&self, unit: usize) -> usize {
        self.gradient_precision(unit).bytes()
    }

    /// Bytes of a unit's whole gradient while it is put together.
    pub fn gradient_bytes(&self, unit: usize) -> u64 {
        (self.gradient_width(unit) * self.layout.padded_len(unit)) as u64
    }

    /// Bytes of this rank's partition of a unit's gradient.
    pub fn partition_bytes(&self, unit: usize) -> u64 {
        (self.gradient_width(unit) * self.layout.partition_len(unit)) as u64
    }

    /// Bytes an operation holds beside its input of `input` bytes, from its call until its result is taken.
    pub fn exchange_bytes(&self, operation: Operation, input: u64) -> u64 {
        (operation.held_bytes(self.layout.world(), input as usize)) as u64 - input
    }

    /// Bytes that writing `bytes` to the disk takes, themselves included.
    pub(crate) fn writing_bytes(&self, bytes: u64) -> u64 {
        bytes + bytes.min(BOUNCE as u64).next_multiple_of(ALIGN)
    }

    /// Pieces in which a unit is updated: tiles, or the whole unit where its optimizer wants that.
    pub(crate) fn pieces(&self, unit: usize) -> Vec<(Range<usize>, Place)> {
        let cut = |(range, place): (Range<usize>, Place)| match self.config.optim.elementwise() {
            true => tiles(&range).map(|tile| (tile, place)).collect::<Vec<_>>(),
            false => vec![(range, place)],
        };
        self.segments(unit).into_iter().flat_map(cut).collect()
    }

    /// Elements of the largest piece whose gradient is kept in 16 bits and widened for the update.
    pub(crate) fn widened(&self) -> usize {
        let narrow = (0..self.layout.units().len()).filter(|unit| self.gradient_width(*unit) < 4);
        narrow.flat_map(|unit| self.pieces(unit)).map(|(range, _)| range.len()).max().unwrap_or(0)
    }

    /// Bytes of the buffers that a tile of state on a disk passes through: its state, its gradient and its copy, as far
    /// as these are on the disk too. All zero if no state is there.
    pub(crate) fn ring_parts(&self) -> [usize; 3] {
        let (mut parts, offload) = ([0; 3], &self.config.offload);
        let replicated = self.config.zero == 0 && self.layout.world() > 1;
        for unit in 0..self.layout.units().len() {
            for (range, _) in self.pieces(unit).iter().filter(|(_, place)| *place == Place::Nvme) {
                let gradient = match self.spills() && !replicated {
                    true => range.len() * self.gradient_width(unit),
                    false => 0,
                };
                let copy = if offload.params == Place::Nvme { range.len() } else { 0 };
                let copy = (copy * self.config.compute.bytes()).next_multiple_of(ALIGN as usize);
                let tile = [self.tile_bytes(range.len()) as usize, gradient, copy];
                parts = std::array::from_fn(|at| parts[at].max(tile[at]));
            }
        }
        parts
    }
}

/// A segment cut into tiles.
pub fn tiles(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let (start, end) = (range.start, range.end);
    (start..end).step_by(TILE).map(move |at| at..(at + TILE).min(end))
}
