//! Read, change, write back.

use crate::nvme::{Direction, Done, NvmeFile, Queue, Transfer};
use crate::{AlignedBuffer, Error};
use std::ops::Range;
use std::time::Instant;

/// What a pass over a file moved, and where its time went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Throughput {
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written back.
    pub bytes_written: u64,
    /// Seconds from the first request to the last answer.
    pub wall_s: f64,
    /// Seconds in which the caller's thread had nothing to compute on.
    pub io_wait_s: f64,
    /// Seconds in the caller's function.
    pub compute_s: f64,
}

impl Throughput {
    /// Bytes moved both ways, in 10⁹ per second.
    pub fn gb_s(&self) -> f64 {
        (self.bytes_read + self.bytes_written) as f64 / self.wall_s / 1e9
    }

    /// Adds another pass.
    pub fn add(&mut self, other: &Throughput) {
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        self.wall_s += other.wall_s;
        self.io_wait_s += other.io_wait_s;
        self.compute_s += other.compute_s;
    }
}

/// Fewest buffers with which reading, computing and writing overlap.
const FEWEST_SLOTS: usize = 3;

/// What happens to a tile: its number, and its bytes to change in place.
pub type Update<'a, E> = dyn FnMut(usize, &mut [u8]) -> Result<(), E> + 'a;

/// What happens to a tile of several parts: its number, and a buffer for each part.
pub type UpdateParts<'a, E> = dyn FnMut(usize, &mut [AlignedBuffer]) -> Result<(), E> + 'a;

/// Told of every tile whose changes have reached the file.
pub type Written<'a> = dyn FnMut(usize) + 'a;

/// What is done with a part of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read, and written back after the update.
    Change,
    /// It is read.
    Read,
    /// It is written after the update; the update finds any bytes.
    Write,
}

/// A part of a tile: bytes of one file.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The file.
    pub file: &'a NvmeFile,
    /// Its bytes; none = the tile has no such part.
    pub range: Range<u64>,
    /// What is done with them.
    pub access: Access,
}

impl Part<'_> {
    fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }
}

/// Calls `update(i, bytes)` for every tile of the file in order, with the tile's bytes to change in place. While it
/// runs on tile `i`, the next tiles are read and the previous ones written back.
///
/// Four buffers of 16 MiB, or three of 64, reach the disk's mixed speed; buffers of 4 MiB reach two thirds to nine tenths of
/// it, since fewer huge pages fit into them. At most 128 MiB travel at once; a ring beyond that only waits.
///
/// Tiles must not overlap. Those that begin at a multiple of [`crate::buffer::ALIGNMENT`] pass the page cache. After an
/// error, tiles before the failed one may or may not have reached the file, and those after it are as they were;
/// the content of the ring is of no meaning.
///
/// # Errors
/// [`Error::Ring`] when there are fewer than three buffers or a tile exceeds one; [`Error::Range`] when the file
/// does not hold a tile; [`Error::Io`] when the disk fails; and whatever `update` returns.
pub fn update_tiles<E: From<Error>>(
    file: &NvmeFile,
    tiles: &[Range<u64>],
    ring: &mut [AlignedBuffer],
    update: &mut Update<'_, E>,
) -> Result<Throughput, E> {
    let part = |range: &Range<u64>| [Part { file, range: range.clone(), access: Access::Change }];
    let tiles: Vec<[Part<'_>; 1]> = tiles.iter().map(part).collect();
    update_parts(&tiles, ring, &mut |tile, buffers| update(tile, &mut buffers[0]), &mut |_| ())
}

/// [`update_tiles`] for tiles whose parts lie in several files, in one queue: whatever arrives, the next request goes
/// out. `ring` has `N` buffers for each tile under way, one after another. `written` is told of each tile once its changes
/// can be read from the files, on the caller's thread and while other tiles are waited for.
///
/// # Errors
/// As [`update_tiles`].
pub fn update_parts<const N: usize, E: From<Error>>(
    tiles: &[[Part<'_>; N]],
    ring: &mut [AlignedBuffer],
    update: &mut UpdateParts<'_, E>,
    written: &mut Written<'_>,
) -> Result<Throughput, E> {
    check(tiles, ring)?;
    let Some(first) = tiles.first() else { return Ok(Throughput::default()) };
    let begun = Instant::now();
    let mut pass = Pass::new(first[0].file, tiles, ring, written)?;
    for tile in 0..tiles.len() {
        pass.read_ahead(tile);
        pass.wait_for(tile)?;
        let computing = Instant::now();
        let buffers = pass.buffers(tile);
        update(tile, &mut pass.ring[buffers])?;
        pass.moved.compute_s += computing.elapsed().as_secs_f64();
        pass.write_back(tile);
    }
    pass.finish()?;
    pass.moved.wall_s = begun.elapsed().as_secs_f64();
    Ok(pass.moved)
}

fn check<const N: usize>(tiles: &[[Part<'_>; N]], ring: &[AlignedBuffer]) -> Result<(), Error> {
    if ring.len() < FEWEST_SLOTS * N {
        let why = format!("{} buffers, reading, computing and writing need {}", ring.len(), FEWEST_SLOTS * N);
        return Err(Error::Ring { why });
    }
    for at in 0..N {
        let smallest = ring[at..].iter().step_by(N).map(AlignedBuffer::capacity).min().unwrap_or(0) as u64;
        for part in tiles.iter().map(|tile| &tile[at]) {
            let len = part.len();
            part.file.check(part.range.start, len)?;
            if len > smallest {
                let why = format!("a tile of {len} bytes exceeds a buffer of {smallest}");
                return Err(Error::Ring { why });
            }
        }
    }
    Ok(())
}

/// What a buffer's bytes are.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Free,
    InFlight,
    Ready,
}

/// A pass over the tiles. Tile `i` passes through slot `i % slots`, which has a buffer for each part.
struct Pass<'a, const N: usize> {
    tiles: &'a [[Part<'a>; N]],
    ring: &'a mut [AlignedBuffer],
    states: Vec<State>,
    slots: usize,
    /// The tile that each slot holds.
    held: Vec<usize>,
    written: &'a mut Written<'a>,
    queue: Box<dyn Queue>,
    next_read: usize,
    moved: Throughput,
    failure: Option<Error>,
}

impl<'a, const N: usize> Pass<'a, N> {
    fn new(
        file: &NvmeFile,
        tiles: &'a [[Part<'a>; N]],
        ring: &'a mut [AlignedBuffer],
        written: &'a mut Written<'a>,
    ) -> Result<Self, Error> {
        let (queue, slots) = (file.queue()?, ring.len() / N);
        Ok(Self {
            tiles,
            states: vec![State::Free; slots * N],
            slots,
            held: vec![0; slots],
            ring,
            written,
            queue,
            next_read: 0,
            moved: Throughput::default(),
            failure: None,
        })
    }

    /// The buffers that a tile passes through.
    fn buffers(&self, tile: usize) -> Range<usize> {
        let first = tile % self.slots * N;
        first..first + N
    }

    fn all(&self, tile: usize, state: State) -> bool {
        self.states[self.buffers(tile)].iter().all(|is| *is == state)
    }

    /// Begins every read whose slot is free, up to one ring from the tile at work.
    fn read_ahead(&mut self, current: usize) {
        while let Some(done) = self.queue.poll() {
            self.settle(done);
        }
        let end = self.tiles.len().min(current + self.slots);
        while self.next_read < end && self.all(self.next_read, State::Free) {
            let tile = self.next_read;
            self.held[tile % self.slots] = tile;
            for (part, buffer) in self.buffers(tile).enumerate() {
                let Part { range, access, .. } = &self.tiles[tile][part];
                self.ring[buffer].set_len((range.end - range.start.min(range.end)) as usize);
                match *access != Access::Write && !range.is_empty() {
                    true => self.begin(tile, part, Direction::Read),
                    false => self.states[buffer] = State::Ready,
                }
            }
            self.next_read += 1;
        }
    }

    fn begin(&mut self, tile: usize, part: usize, direction: Direction) {
        let at = self.buffers(tile).start + part;
        self.states[at] = State::InFlight;
        let buffer = std::mem::take(&mut self.ring[at]);
        let Part { file, range, .. } = &self.tiles[tile][part];
        let (file, offset) = (file.handles().clone(), range.start);
        self.queue.submit(Transfer { tag: at, direction, file, offset, buffer });
    }

    fn wait_for(&mut self, tile: usize) -> Result<(), Error> {
        let waiting = Instant::now();
        while !self.all(tile, State::Ready) {
            match self.queue.wait() {
                Some(done) => self.settle(done),
                None => unreachable!("tile {tile} was neither read nor begun"),
            }
            self.failure.take().map_or(Ok(()), Err)?;
            self.read_ahead(tile);
        }
        self.moved.io_wait_s += waiting.elapsed().as_secs_f64();
        Ok(())
    }

    fn write_back(&mut self, tile: usize) {
        for (part, buffer) in self.buffers(tile).enumerate() {
            let Part { range, access, .. } = &self.tiles[tile][part];
            match *access != Access::Read && !range.is_empty() {
                true => self.begin(tile, part, Direction::Write),
                false => self.states[buffer] = State::Free,
            }
        }
        self.tell(tile);
    }

    /// Tells of a tile that was written back and has left its slot.
    fn tell(&mut self, tile: usize) {
        if self.failure.is_none() && self.all(tile, State::Free) {
            (self.written)(tile);
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        let waiting = Instant::now();
        self.drain();
        self.moved.io_wait_s += waiting.elapsed().as_secs_f64();
        self.failure.take().map_or(Ok(()), Err)
    }

    fn drain(&mut self) {
        while let Some(done) = self.queue.wait() {
            self.settle(done);
        }
    }

    /// Takes a buffer back; keeps the first error.
    fn settle(&mut self, done: Done) {
        let bytes = done.buffer.len() as u64;
        self.ring[done.tag] = done.buffer;
        self.states[done.tag] = match done.direction {
            Direction::Read => State::Ready,
            Direction::Write => State::Free,
        };
        match (done.result, done.direction) {
            (Ok(()), Direction::Read) => self.moved.bytes_read += bytes,
            (Ok(()), Direction::Write) => self.moved.bytes_written += bytes,
            (Err(error), _) => self.failure = self.failure.take().or(Some(error)),
        }
        if done.direction == Direction::Write {
            self.tell(self.held[done.tag / N]);
        }
    }
}

impl<const N: usize> Drop for Pass<'_, N> {
    /// An error or a panic of the caller's function leaves transfers behind: their buffers come home first.
    fn drop(&mut self) {
        self.drain();
    }
}
