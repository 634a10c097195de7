//! The optimizer's state: masters and moments of what this rank updates, in memory or on a disk.

use crate::Error;
use crate::config::Place;
use crate::copies::Copies;
use crate::flat::{Flat, part_of};
use crate::layout::Layout;
use crate::optim::{CopyOut, HalvedSpan, OptimConfig, Span, StateDtype, Step, Values};
use crate::sizes::{ALIGN, Masters, Sizes, tiles};
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

/// Values of one optimizer state.
#[derive(Clone, Debug)]
pub(crate) enum StateValues {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
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

/// How a tile lies in its bytes: its master, then so many states.
#[derive(Clone, Copy)]
pub(crate) struct TileForm {
    states: usize,
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
        let mut states = Vec::with_capacity(self.states);
        for _ in 0..self.states {
            let used = len * self.dtype.bytes();
            let (state, after) = rest.split_at_mut(aligned(used));
            rest = after;
            states.push(match self.dtype {
                StateDtype::F32 => Values::F32(bytemuck::cast_slice_mut(&mut state[..used])),
                StateDtype::Bf16 => Values::Bf16(bytemuck::cast_slice_mut(&mut state[..used])),
            });
        }
        let master = bytemuck::cast_slice_mut(&mut master[..4 * len]);
        step.apply(Span { master, states, gradient, copy: Some(copy) });
    }
}

/// Masters and moments of what this rank updates.
pub(crate) struct OptimizerState {
    segments: Vec<Segment>,
    tiles: Vec<Tile>,
    states: usize,
    dtype: StateDtype,
    optim: OptimConfig,
    /// The optimizer updates whole parameters only: a segment is a unit.
    whole: bool,
    file: Option<Arc<NvmeFile>>,
}

impl StateValues {
    fn zeros(dtype: StateDtype, len: usize) -> Self {
        match dtype {
            StateDtype::F32 => StateValues::F32(vec![0.0; len]),
            StateDtype::Bf16 => StateValues::Bf16(vec![bf16::ZERO; len]),
        }
    }

    fn len(&self) -> usize {
        match self {
            StateValues::F32(values) => values.len(),
            StateValues::Bf16(values) => values.len(),
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            StateValues::F32(values) => bytemuck::cast_slice(values),
            StateValues::Bf16(values) => bytemuck::cast_slice(values),
        }
    }

    fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            StateValues::F32(values) => bytemuck::cast_slice_mut(values),
            StateValues::Bf16(values) => bytemuck::cast_slice_mut(values),
        }
    }

    fn part_mut(&mut self, range: Range<usize>) -> Values<'_> {
        match self {
            StateValues::F32(values) => Values::F32(&mut values[range]),
            StateValues::Bf16(values) => Values::Bf16(&mut values[range]),
        }
    }
}

impl OptimizerState {
    /// Zeros, charged.
    pub(crate) fn new(sizes: &Sizes<'_>, ledger: &Ledger) -> Result<Self, Error> {
        let config = sizes.config;
        let (states, dtype) = (config.optim.states().len(), config.state_dtype);
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
                    let zeros = |_| Arc::new(StateValues::zeros(dtype, len));
                    Held::Memory { master, states: (0..states).map(zeros).collect(), _charge }
                };
                segments.push(Segment { unit, range, held });
            }
        }
        let file = match offset {
            0 => None,
            bytes => Some(Arc::new(crate::disk::file(sizes, "optimizer", bytes, Kind::Optimizer, ledger)?)),
        };
        let (optim, whole) = (config.optim, !config.optim.elementwise());
        Ok(Self { segments, tiles: all_tiles, states, dtype, optim, whole, file })
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
        let mut states: Vec<&mut StateValues> =
            states.iter_mut().map(|s| Arc::get_mut(s).expect(exclusive)).collect();
        let (master, mut copy) = match (master, copy) {
            (Master::Whole(master), copy) => {
                (&mut Arc::get_mut(master).expect(exclusive)[at.clone()], Some(copy))
            }
            (Master::Copy, CopyOut::F32(copy)) => (copy, None),
            (Master::Low(low), CopyOut::High(high)) => {
                let low = &mut Arc::get_mut(low).expect(exclusive)[at.clone()];
                let states = states.iter_mut().map(|s| s.part_mut(at.clone())).collect();
                return step.apply_halved(HalvedSpan { high, low, states, gradient });
            }
            (Master::Copy | Master::Low(_), _) => panic!("the copy is not of the master's kind"),
        };
        if !self.whole {
            let states = states.iter_mut().map(|s| s.part_mut(at.clone())).collect();
            return step.apply(Span { master, states, gradient, copy });
        }
        let mut state_at = 0;
        for param in &layout.params()[layout.units()[unit].params.clone()] {
            let state = state_at..state_at + self.optim.state_len(&param.shape);
            state_at = state.end;
            let states = states.iter_mut().map(|s| s.part_mut(state.clone())).collect();
            let copy = copy.as_mut().map(|copy| part_of(copy, param.range.clone()));
            let (master, gradient) = (&mut master[param.range.clone()], &gradient[param.range.clone()]);
            step.apply_whole(&param.shape, Span { master, states, gradient, copy });
        }
    }

    /// How a tile lies in its bytes.
    pub(crate) fn tile_form(&self) -> TileForm {
        TileForm { states: self.states, dtype: self.dtype }
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
        StateReader { segments: segments.collect(), masters, dtype: self.dtype, file: self.file.clone() }
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
                            let bytes = encode(self.dtype, values);
                            let to = Arc::get_mut(&mut states[i]).expect(exclusive).as_bytes_mut();
                            to[at * self.dtype.bytes()..][..bytes.len()].copy_from_slice(&bytes);
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
                        let (offset, width) = tile.place(which, self.dtype);
                        let at = offset + (width * (part.start - tile.range.start)) as u64;
                        match which {
                            Which::Master => file.write_at(at, bytemuck::cast_slice(values))?,
                            Which::State(_) => file.write_at(at, &encode(self.dtype, values))?,
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

impl Tile {
    /// Where in the file a part of the tile begins, and the bytes of its elements.
    fn place(&self, which: Which, dtype: StateDtype) -> (u64, usize) {
        let len = self.range.len();
        match which {
            Which::Master => (self.offset, 4),
            Which::State(i) => {
                let before = aligned(4 * len) + i * aligned(dtype.bytes() * len);
                (self.offset + before as u64, dtype.bytes())
            }
        }
    }
}

/// The state as a background save, or a comparison, reads it.
pub(crate) struct StateReader {
    segments: Vec<ReadSegment>,
    /// Copies that may be masters or half of them, each with its first element.
    masters: Vec<(Option<Arc<Flat>>, usize)>,
    dtype: StateDtype,
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
    /// Bytes of an element.
    pub(crate) fn width(&self, which: Which) -> usize {
        match which {
            Which::Master => 4,
            Which::State(_) => self.dtype.bytes(),
        }
    }

    /// Elements `start..` of a unit as they are held, as many as `out` takes. All must be this rank's.
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
                        Which::State(i) => {
                            out.copy_from_slice(&states[i].as_bytes()[at * width..][..out.len()]);
                        }
                        Which::Master => master.read(at, copy, out),
                    }
                }
                ReadHeld::Disk(tiles) => {
                    let file = self.file.as_ref().expect("tiles lie in a file");
                    for tile in tiles {
                        let part = tile.range.start.max(common.start)..tile.range.end.min(common.end);
                        if !part.is_empty() {
                            let (offset, _) = tile.place(which, self.dtype);
                            let at = offset + (width * (part.start - tile.range.start)) as u64;
                            let to = (part.start - common.start) * width..(part.end - common.start) * width;
                            file.read_at(at, &mut out[to])?;
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

fn encode(dtype: StateDtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        StateDtype::F32 => bytemuck::cast_slice(values).to_vec(),
        StateDtype::Bf16 => {
            let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            bytemuck::cast_slice(&rounded).to_vec()
        }
    }
}
