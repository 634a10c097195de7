//! The optimizer's state: masters and moments of what this rank updates, in memory or on a disk.

use crate::Error;
use crate::config::Place;
use crate::copies::Copies;
use crate::flat::{Flat, part_of};
use crate::layout::Layout;
use crate::optim::{CopyOut, HalvedSpan, OptimConfig, Span, StateDtype, Step};
use crate::sizes::{ALIGN, Masters, Sizes, tiles};
use crate::state_values::{OnDisk, StateValues};
use half::bf16;
use hearth_kernels::cpu::halves;
use hearth_memory::nvme::NvmeFile;
use hearth_memory::{Charge, Kind, Ledger};
use std::ops::Range;
use std::sync::Arc;

/// Masters in two halves that are joined at a time: they stay in the first-level cache.
const JOINED: usize = 1024;

/// Which of a parameter's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Its f32 master.
    Master,
    /// The optimizer's state of this place in [`crate::optim::OptimConfig::states`].
    State(usize),
}

/// A part of a unit whose state lies in one place.
struct Segment {
    unit: usize,
    range: Range<usize>,
    held: Held,
}

enum Held {
    Memory {
        master: Master,
        states: Vec<Arc<StateValues>>,
        _charge: Charge,
    },
    /// Tiles of the file, in order.
    Disk(Range<usize>),
}

/// Masters in memory, as [`Masters`] says.
#[derive(Clone)]
enum Master {
    Copy,
    Low(Arc<Vec<i16>>),
    Whole(Arc<Vec<f32>>),
}

/// A piece of state on the disk: master and states of `range`, one after another.
#[derive(Clone, Debug)]
pub(crate) struct Tile {
    pub(crate) unit: usize,
    pub(crate) range: Range<usize>,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// How a tile lies in its bytes: its master, then the optimizer's states.
#[derive(Clone, Copy)]
pub(crate) struct TileForm {
    optim: OptimConfig,
    dtype: StateDtype,
}

impl TileForm {
    /// Updates a tile that was read into `bytes`, and its part of the copy.
    pub(crate) fn update(
        &self,
        tile: &Tile,
        bytes: &mut [u8],
        gradient: &[f32],
        step: &Step,
        copy: CopyOut<'_>,
    ) {
        let len = tile.range.len();
        let (master, mut rest) = bytes.split_at_mut(aligned(4 * len));
        let mut states = Vec::new();
        for at in 0..self.optim.states().len() {
            let (state, after) = rest.split_at_mut(aligned(self.dtype.bytes_of(len)));
            rest = after;
            let form = OnDisk { dtype: self.dtype, signed: self.optim.signed(at), len };
            states.push(form.values(state, step.draws(tile.unit, at, tile.range.start)));
        }
        let master = bytemuck::cast_slice_mut(&mut master[..4 * len]);
        step.apply(Span { master, states, gradient, copy: Some(copy) });
    }
}

/// Masters and moments of what this rank updates.
pub(crate) struct OptimizerState {
    segments: Vec<Segment>,
    tiles: Vec<Tile>,
    dtype: StateDtype,
    optim: OptimConfig,
    /// The optimizer updates whole parameters only: a segment is a unit.
    whole: bool,
    file: Option<Arc<NvmeFile>>,
}

impl OptimizerState {
    /// Zeros, charged.
    pub(crate) fn new(sizes: &Sizes<'_>, ledger: &Ledger) -> Result<Self, Error> {
        let config = sizes.config;
        let (optim, dtype) = (config.optim, config.state_dtype);
        let (mut segments, mut all_tiles, mut offset) = (Vec::new(), Vec::new(), 0);
        for unit in 0..sizes.layout.units().len() {
            for (range, place) in sizes.segments(unit) {
                let bytes = sizes.optimizer_bytes(unit, &range, place);
                let held = if place == Place::Nvme {
                    let first = all_tiles.len();
                    for range in tiles(&range) {
                        let bytes = sizes.tile_bytes(range.len());
                        all_tiles.push(Tile { unit, range, offset, bytes });
                        offset += bytes;
                    }
                    Held::Disk(first..all_tiles.len())
                } else {
                    let _charge = ledger.charge(place.tier(), Kind::Optimizer, bytes)?;
                    let master = match sizes.masters() {
                        Masters::Copy => Master::Copy,
                        Masters::Low => Master::Low(Arc::new(vec![0; range.len()])),
                        Masters::Whole => Master::Whole(Arc::new(vec![0.0; range.len()])),
                    };
                    let len = sizes.state_len(unit, &range);
                    let zeros = |at| Arc::new(StateValues::zeros(dtype, len, optim.signed(at)));
                    let states = (0..optim.states().len()).map(zeros).collect();
                    Held::Memory { master, states, _charge }
                };
                segments.push(Segment { unit, range, held });
            }
        }
        let file = match offset {
            0 => None,
            bytes => Some(Arc::new(crate::disk::file(sizes, "optimizer", bytes, Kind::Optimizer, ledger)?)),
        };
        Ok(Self { segments, tiles: all_tiles, dtype, optim, whole: !optim.elementwise(), file })
    }

    /// The file and its tiles in order, if any state is on a disk.
    pub(crate) fn on_disk(&self) -> Option<(&Arc<NvmeFile>, &[Tile])> {
        self.file.as_ref().map(|file| (file, self.tiles.as_slice()))
    }

    /// Pieces of at most [`crate::sizes::TILE`] elements of the state that is in memory, in order.
    pub(crate) fn in_memory(&self) -> Vec<(usize, Range<usize>)> {
        let memory = self.segments.iter().filter(|s| matches!(s.held, Held::Memory { .. }));
        if self.whole {
            return memory.map(|s| (s.unit, s.range.clone())).collect();
        }
        memory.flat_map(|s| tiles(&s.range).map(|range| (s.unit, range))).collect()
    }

    /// Updates a piece of [`OptimizerState::in_memory`], and its part of the copy if that is not the master itself.
    pub(crate) fn update(
        &mut self,
        layout: &Layout,
        unit: usize,
        range: &Range<usize>,
        gradient: &[f32],
        step: &Step,
        copy: CopyOut<'_>,
    ) {
        let mut segments = self.segments.iter_mut();
        let segment = segments.find(|s| s.unit == unit && contains(&s.range, range));
        let segment = segment.expect("a piece of a segment");
        let Held::Memory { master, states, .. } = &mut segment.held else { panic!("a piece in memory") };
        let exclusive = "nothing reads the state while it is updated";
        let at = range.start - segment.range.start..range.end - segment.range.start;
        let draws = |state| step.draws(unit, state, range.start);
        let mut states: Vec<&mut StateValues> =
            states.iter_mut().map(|s| Arc::get_mut(s).expect(exclusive)).collect();
        let (master, mut copy) = match (master, copy) {
            (Master::Whole(master), copy) => {
                (&mut Arc::get_mut(master).expect(exclusive)[at.clone()], Some(copy))
            }
            (Master::Copy, CopyOut::F32(copy)) => (copy, None),
            (Master::Low(low), CopyOut::High(high)) => {
                let low = &mut Arc::get_mut(low).expect(exclusive)[at.clone()];
                let parts = states.iter_mut().enumerate();
                let states = parts.map(|(i, s)| s.part_mut(at.clone(), draws(i))).collect();
                return step.apply_halved(HalvedSpan { high, low, states, gradient });
            }
            (Master::Copy | Master::Low(_), _) => panic!("the copy is not of the master's kind"),
        };
        if !self.whole {
            let parts = states.iter_mut().enumerate();
            let states = parts.map(|(i, s)| s.part_mut(at.clone(), draws(i))).collect();
            return step.apply(Span { master, states, gradient, copy });
        }
        let mut state_at = 0;
        for param in &layout.params()[layout.units()[unit].params.clone()] {
            let state = state_at..state_at + self.optim.state_len(&param.shape);
            state_at = state.end;
            let parts = states.iter_mut().enumerate();
            let states = parts.map(|(i, s)| s.part_mut(state.clone(), draws(i))).collect();
            let copy = copy.as_mut().map(|copy| part_of(copy, param.range.clone()));
            let (master, gradient) = (&mut master[param.range.clone()], &gradient[param.range.clone()]);
            step.apply_whole(&param.shape, Span { master, states, gradient, copy });
        }
    }

    /// How a tile lies in its bytes.
    pub(crate) fn tile_form(&self) -> TileForm {
        TileForm { optim: self.optim, dtype: self.dtype }
    }

    /// What a background save reads: shares everything, copies nothing.
    pub(crate) fn reader(&self, copies: &Copies, copy_starts: Vec<usize>) -> StateReader {
        let units = 0..copy_starts.len();
        let masters = units.map(|unit| (copies.memory(unit).cloned(), copy_starts[unit])).collect();
        let segments = self.segments.iter().map(|s| ReadSegment {
            unit: s.unit,
            range: s.range.clone(),
            state_range: if self.whole { 0..s.held.state_len() } else { s.range.clone() },
            held: match &s.held {
                Held::Memory { master, states, .. } => {
                    ReadHeld::Memory { master: master.clone(), states: states.clone() }
                }
                Held::Disk(tiles) => ReadHeld::Disk(self.tiles[tiles.clone()].to_vec()),
            },
        });
        let form = self.tile_form();
        StateReader { segments: segments.collect(), masters, form, file: self.file.clone() }
    }

    /// Sets elements `start..` of a unit: where a run begins, or goes on. What this rank does not hold is passed over.
    pub(crate) fn set(
        &mut self,
        which: Which,
        unit: usize,
        start: usize,
        values: &[f32],
    ) -> Result<(), Error> {
        let whole = self.whole && which != Which::Master;
        let form = self.tile_form();
        for segment in self.segments.iter_mut().filter(|s| s.unit == unit) {
            let range = if whole { 0..segment.held.state_len() } else { segment.range.clone() };
            let common = range.start.max(start)..range.end.min(start + values.len());
            if common.is_empty() {
                continue;
            }
            let values = &values[common.start - start..common.end - start];
            match &mut segment.held {
                Held::Memory { master, states, .. } => {
                    let at = common.start - range.start;
                    let exclusive = "nothing reads the state while it is set";
                    match which {
                        Which::Master => master.set(at, values),
                        Which::State(i) => {
                            Arc::get_mut(&mut states[i]).expect(exclusive).set(at, values);
                        }
                    }
                }
                Held::Disk(tiles) => {
                    let file = self.file.as_ref().expect("tiles lie in a file");
                    for tile in &self.tiles[tiles.clone()] {
                        let part = tile.range.start.max(common.start)..tile.range.end.min(common.end);
                        if part.is_empty() {
                            continue;
                        }
                        let values = &values[part.start - common.start..part.end - common.start];
                        let (offset, lies) = form.place(tile, which);
                        let at = part.start - tile.range.start..part.end - tile.range.start;
                        for (place, bytes) in lies.parts(&at).iter().zip(lies.encode(values)) {
                            file.write_at(offset + place.start as u64, &bytes)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl Master {
    /// Sets elements `at..`, as far as the copy does not hold them.
    fn set(&mut self, at: usize, values: &[f32]) {
        let exclusive = "nothing reads the state while it is set";
        match self {
            Master::Copy => {}
            Master::Low(low) => {
                let low = &mut Arc::get_mut(low).expect(exclusive)[at..][..values.len()];
                low.iter_mut().zip(values).for_each(|(low, value)| *low = halves::split(*value).1);
            }
            Master::Whole(master) => {
                Arc::get_mut(master).expect(exclusive)[at..][..values.len()].copy_from_slice(values);
            }
        }
    }

    /// The bytes of elements `at..` as f32, as many as `out` takes. `copy`: the copy's elements from the same one on.
    fn read<'c>(&self, at: usize, copy: impl FnOnce() -> &'c [u8], out: &mut [u8]) {
        match self {
            Master::Copy => out.copy_from_slice(&copy()[..out.len()]),
            Master::Whole(master) => {
                out.copy_from_slice(&bytemuck::cast_slice(master)[4 * at..][..out.len()])
            }
            Master::Low(low) => {
                let high: &[bf16] = bytemuck::cast_slice(copy());
                let parts = high.chunks(JOINED).zip(low[at..].chunks(JOINED)).zip(out.chunks_mut(4 * JOINED));
                for ((high, low), out) in parts {
                    let (mut joined, len) = ([0.0; JOINED], out.len() / 4);
                    halves::join_block(&high[..len], &low[..len], &mut joined[..len]);
                    out.copy_from_slice(bytemuck::cast_slice(&joined[..len]));
                }
            }
        }
    }
}

impl Held {
    /// Elements of each state in memory.
    fn state_len(&self) -> usize {
        match self {
            Held::Memory { states, .. } => states.first().map_or(0, |s| s.len()),
            Held::Disk(_) => 0,
        }
    }
}

impl TileForm {
    /// Where in the file a part of the tile begins, and how it lies there.
    fn place(&self, tile: &Tile, which: Which) -> (u64, OnDisk) {
        let len = tile.range.len();
        match which {
            Which::Master => (tile.offset, OnDisk { dtype: StateDtype::F32, signed: true, len }),
            Which::State(i) => {
                let before = aligned(4 * len) + i * aligned(self.dtype.bytes_of(len));
                let lies = OnDisk { dtype: self.dtype, signed: self.optim.signed(i), len };
                (tile.offset + before as u64, lies)
            }
        }
    }
}

/// The state as a background save, or a comparison, reads it.
pub(crate) struct StateReader {
    segments: Vec<ReadSegment>,
    /// Copies that may be masters or half of them, each with its first element.
    masters: Vec<(Option<Arc<Flat>>, usize)>,
    form: TileForm,
    file: Option<Arc<NvmeFile>>,
}

struct ReadSegment {
    unit: usize,
    range: Range<usize>,
    /// The same in elements of the states.
    state_range: Range<usize>,
    held: ReadHeld,
}

enum ReadHeld {
    Memory { master: Master, states: Vec<Arc<StateValues>> },
    Disk(Vec<Tile>),
}

impl StateReader {
    /// Bytes of an element in a checkpoint.
    pub(crate) fn width(&self, which: Which) -> usize {
        match which {
            Which::Master => 4,
            Which::State(_) => self.form.dtype.saved().bytes() as usize,
        }
    }

    /// Elements `start..` of a unit as a checkpoint has them, as many as `out` takes. All must be this rank's; in 8 bits
    /// they begin with a block.
    pub(crate) fn read(
        &self,
        which: Which,
        unit: usize,
        start: usize,
        out: &mut [u8],
    ) -> Result<(), hearth_memory::Error> {
        let width = self.width(which);
        let wanted = start..start + out.len() / width;
        for segment in self.segments.iter().filter(|s| s.unit == unit) {
            let range = if which == Which::Master { &segment.range } else { &segment.state_range };
            let common = range.start.max(wanted.start)..range.end.min(wanted.end);
            if common.is_empty() {
                continue;
            }
            let out = &mut out[(common.start - start) * width..(common.end - start) * width];
            match &segment.held {
                ReadHeld::Memory { master, states } => {
                    let at = common.start - range.start;
                    let copy = || {
                        let (copy, first) = &self.masters[unit];
                        let copy = copy.as_ref().expect("a copy that is the master, or half of it");
                        &copy.as_bytes()[(common.start - first) * copy.precision().bytes()..]
                    };
                    match which {
                        Which::State(i) => states[i].read(at, out),
                        Which::Master => master.read(at, copy, out),
                    }
                }
                ReadHeld::Disk(tiles) => {
                    let file = self.file.as_ref().expect("tiles lie in a file");
                    for tile in tiles {
                        let part = tile.range.start.max(common.start)..tile.range.end.min(common.end);
                        if !part.is_empty() {
                            let (offset, lies) = self.form.place(tile, which);
                            let at = part.start - tile.range.start..part.end - tile.range.start;
                            let to = (part.start - common.start) * width..(part.end - common.start) * width;
                            let read = |place: Range<usize>| {
                                let mut bytes = vec![0; place.len()];
                                file.read_at(offset + place.start as u64, &mut bytes).map(|()| bytes)
                            };
                            let parts =
                                lies.parts(&at).into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
                            lies.decode(&parts, &mut out[to]);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN as usize)
}

fn contains(whole: &Range<usize>, part: &Range<usize>) -> bool {
    whole.start <= part.start && part.end <= whole.end
}
