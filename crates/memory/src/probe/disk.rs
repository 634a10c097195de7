//! The disk, through the same code that training uses.

use super::{Figure, RUNS};
use crate::nvme::{Direction, NvmeFile, Queue, Transfer};
use crate::{AlignedBuffer, Error};
use std::path::Path;
use std::time::Instant;

/// Bytes per transfer, and transfers in flight each way: 64 MiB under way.
const TILE_BYTES: u64 = 8 << 20;
const IN_FLIGHT: usize = 8;

/// What a disk does for long transfers.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskSpeed {
    /// Reading alone.
    pub read_gb_s: f64,
    /// Writing alone, over bytes that were written before.
    pub write_gb_s: f64,
    /// Reading and writing at once, in equal parts and counted together: what an optimizer whose state lies on this disk
    /// is bound by.
    pub mixed_gb_s: f64,
    /// Whether the page cache was passed.
    pub direct: bool,
    /// How the disk was reached.
    pub backend: &'static str,
    /// The figures with their samples: read, write, mixed.
    pub figures: [Figure; 3],
}

/// Measures the disk under `directory` with a temporary file of `bytes`.
///
/// # Errors
/// [`Error::DiskFull`], [`Error::File`] or [`Error::Io`] when the disk does not do it.
pub fn disk(directory: &Path, bytes: u64) -> Result<DiskSpeed, Error> {
    let tiles = (bytes / TILE_BYTES).max(2);
    let file = NvmeFile::temporary(&directory.join(".hearth-probe"), tiles * TILE_BYTES, None)?;
    let mut probe = Probe::new(&file)?;
    let half = tiles / 2;
    // The first pass gives the file its blocks; later ones write over them, as training does.
    probe.pass(0, tiles, &[Direction::Write])?;
    let mut figure = |tiles, ways: &[Direction]| -> Result<Figure, Error> {
        (0..RUNS).map(|_| probe.pass(0, tiles, ways)).collect::<Result<_, _>>().map(Figure::of)
    };
    let read = figure(tiles, &[Direction::Read])?;
    let write = figure(tiles, &[Direction::Write])?;
    let mixed = figure(half, &[Direction::Read, Direction::Write])?;
    Ok(DiskSpeed {
        read_gb_s: read.gb_s,
        write_gb_s: write.gb_s,
        mixed_gb_s: mixed.gb_s,
        direct: file.direct(),
        backend: file.backend().name,
        figures: [read, write, mixed],
    })
}

struct Probe<'a> {
    file: &'a NvmeFile,
    queue: Box<dyn Queue>,
    buffers: Vec<AlignedBuffer>,
}

impl<'a> Probe<'a> {
    fn new(file: &'a NvmeFile) -> Result<Self, Error> {
        let buffer = |_| {
            let mut buffer = AlignedBuffer::new(TILE_BYTES as usize);
            // Zeros are what some disks are suspiciously fast at.
            buffer
                .as_mut_slice::<u64>()
                .iter_mut()
                .zip(1u64..)
                .for_each(|(word, i)| *word = i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            buffer
        };
        Ok(Self { file, queue: file.queue()?, buffers: (0..2 * IN_FLIGHT).map(buffer).collect() })
    }

    /// Moves `tiles` tiles each way, the ways side by side in halves of the file; 10⁹ bytes per second.
    fn pass(&mut self, first: u64, tiles: u64, ways: &[Direction]) -> Result<f64, Error> {
        let begun = Instant::now();
        let mut next = vec![first; ways.len()];
        for (way, _) in ways.iter().enumerate() {
            for _ in 0..IN_FLIGHT {
                self.begin(way, ways, &mut next, tiles);
            }
        }
        while let Some(done) = self.queue.wait() {
            self.buffers.push(done.buffer);
            done.result?;
            self.begin(done.tag, ways, &mut next, tiles);
        }
        Ok((tiles * TILE_BYTES * ways.len() as u64) as f64 / begun.elapsed().as_secs_f64() / 1e9)
    }

    fn begin(&mut self, way: usize, ways: &[Direction], next: &mut [u64], tiles: u64) {
        if next[way] == tiles {
            return;
        }
        let Some(buffer) = self.buffers.pop() else { return };
        let offset = (way as u64 * tiles + next[way]) * TILE_BYTES;
        next[way] += 1;
        let file = self.file.handles().clone();
        self.queue.submit(Transfer { tag: way, direction: ways[way], file, offset, buffer });
    }
}
