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
    check(file, tiles, ring)?;
    let begun = Instant::now();
    let mut pass = Pass::new(file, tiles, ring)?;
    for tile in 0..tiles.len() {
        pass.read_ahead(tile);
        pass.wait_for(tile)?;
        let computing = Instant::now();
        let slot = tile % pass.ring.len();
        update(tile, &mut pass.ring[slot])?;
        pass.moved.compute_s += computing.elapsed().as_secs_f64();
        pass.write_back(tile);
    }
    pass.finish()?;
    pass.moved.wall_s = begun.elapsed().as_secs_f64();
    Ok(pass.moved)
}

fn check(file: &NvmeFile, tiles: &[Range<u64>], ring: &[AlignedBuffer]) -> Result<(), Error> {
    if ring.len() < FEWEST_SLOTS {
        let why = format!("{} buffers, reading, computing and writing need {FEWEST_SLOTS}", ring.len());
        return Err(Error::Ring { why });
    }
    let smallest = ring.iter().map(AlignedBuffer::capacity).min().unwrap_or(0) as u64;
    for tile in tiles {
        let len = tile.end.saturating_sub(tile.start);
        file.check(tile.start, len)?;
        if len > smallest {
            let why = format!("a tile of {len} bytes exceeds a buffer of {smallest}");
            return Err(Error::Ring { why });
        }
    }
    Ok(())
}

/// What a slot's bytes are.
#[derive(Clone, Copy, PartialEq)]
enum Slot {
    Free,
    InFlight,
    Ready,
}

/// A pass over the tiles. Tile `i` passes through slot `i % ring.len()`.
struct Pass<'a> {
    file: &'a NvmeFile,
    tiles: &'a [Range<u64>],
    ring: &'a mut [AlignedBuffer],
    slots: Vec<Slot>,
    queue: Box<dyn Queue>,
    next_read: usize,
    moved: Throughput,
    failure: Option<Error>,
}

impl<'a> Pass<'a> {
    fn new(
        file: &'a NvmeFile,
        tiles: &'a [Range<u64>],
        ring: &'a mut [AlignedBuffer],
    ) -> Result<Self, Error> {
        let (queue, slots) = (file.queue()?, vec![Slot::Free; ring.len()]);
        Ok(Self {
            file,
            tiles,
            ring,
            slots,
            queue,
            next_read: 0,
            moved: Throughput::default(),
            failure: None,
        })
    }

    /// Begins every read whose slot is free, up to one ring from the tile at work.
    fn read_ahead(&mut self, current: usize) {
        while let Some(done) = self.queue.poll() {
            self.settle(done);
        }
        let end = self.tiles.len().min(current + self.ring.len());
        while self.next_read < end && self.slots[self.next_read % self.ring.len()] == Slot::Free {
            let len = self.bytes(self.next_read);
            self.ring[self.next_read % self.slots.len()].set_len(len as usize);
            self.begin(self.next_read, Direction::Read);
            self.next_read += 1;
        }
    }

    fn bytes(&self, tile: usize) -> u64 {
        self.tiles[tile].end.saturating_sub(self.tiles[tile].start)
    }

    fn begin(&mut self, tile: usize, direction: Direction) {
        let slot = tile % self.ring.len();
        self.slots[slot] = Slot::InFlight;
        let buffer = std::mem::take(&mut self.ring[slot]);
        let (file, offset) = (self.file.handles().clone(), self.tiles[tile].start);
        self.queue.submit(Transfer { tag: slot, direction, file, offset, buffer });
    }

    fn wait_for(&mut self, tile: usize) -> Result<(), Error> {
        let waiting = Instant::now();
        while self.slots[tile % self.ring.len()] != Slot::Ready {
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
        self.begin(tile, Direction::Write);
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
        self.slots[done.tag] = match done.direction {
            Direction::Read => Slot::Ready,
            Direction::Write => Slot::Free,
        };
        match (done.result, done.direction) {
            (Ok(()), Direction::Read) => self.moved.bytes_read += bytes,
            (Ok(()), Direction::Write) => self.moved.bytes_written += bytes,
            (Err(error), _) => self.failure = self.failure.take().or(Some(error)),
        }
    }
}

impl Drop for Pass<'_> {
    /// An error or a panic of the caller's function leaves transfers behind: their buffers come home first.
    fn drop(&mut self) {
        self.drain();
    }
}
