//! How close does a tiled update come to what the disk can do?
//!
//! `cargo run --release -p hearth-memory --example tiles_against_disk -- DIR [MIB] [COMPUTE_MS] [1]` prints, for several
//! shapes of the ring and both direct backends (with a final `1` the buffered ones as well), bytes per second against
//! the mixed probe beside it. `COMPUTE_MS` is spent in each tile of 64 MiB, and less in smaller ones, to show whether
//! computing hides behind the disk.

use hearth_memory::nvme::{BACKENDS, Backend};
use hearth_memory::stream::{Throughput, update_tiles};
use hearth_memory::{AlignedBuffer, Error, NvmeFile, probe};
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap_or_else(|| ".".into());
    let mut number = |default| arguments.next().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (bytes, compute_ms): (u64, u64) = (number(1024) * MIB, number(0));
    let buffered = number(0) != 0;
    for backend in &BACKENDS[..if buffered { 4 } else { 2 }] {
        for (tile, slots) in [(4 * MIB, 16), (4 * MIB, 48), (16 * MIB, 4), (16 * MIB, 12), (64 * MIB, 3)] {
            let compute = Duration::from_micros(compute_ms * 1000 * tile / (64 * MIB));
            // A disk that others use, too, changes its mind: the limit is measured beside each figure.
            let disk = probe::disk(directory.as_ref(), bytes / 2)?;
            let pass = pass(directory.as_ref(), backend, bytes, tile, slots, compute)?;
            println!(
                "{:20} {:2} buffers of {:2} MiB: {:.2} GB/s, {:.2} of the probe's {:.2} (read {:.2}, write {:.2}); \
                 waited {:.2} s, computed {:.2} of {:.2} s",
                backend.name,
                slots,
                tile / MIB,
                pass.gb_s(),
                pass.gb_s() / disk.mixed_gb_s,
                disk.mixed_gb_s,
                disk.read_gb_s,
                disk.write_gb_s,
                pass.io_wait_s,
                pass.compute_s,
                pass.wall_s
            );
        }
    }
    Ok(())
}

/// The median of five passes, after one that gives the file its blocks.
fn pass(
    directory: &Path,
    backend: &'static Backend,
    bytes: u64,
    tile: u64,
    slots: usize,
    compute: Duration,
) -> Result<Throughput, Error> {
    let path = directory.join("tiles");
    let file = NvmeFile::create_with(std::slice::from_ref(backend), &path, bytes, None)?;
    std::fs::remove_file(&path).map_err(|_| Error::Ring { why: "the file vanished".into() })?;
    let tiles: Vec<_> = (0..bytes / tile).map(|i| i * tile..(i + 1) * tile).collect();
    let mut ring: Vec<_> = (0..slots).map(|_| AlignedBuffer::new(tile as usize)).collect();
    let mut passes = (0..6)
        .map(|_| {
            update_tiles(&file, &tiles, &mut ring, &mut |_, bytes: &mut [u8]| {
                let begun = Instant::now();
                bytes[0] = bytes[0].wrapping_add(1);
                while begun.elapsed() < compute {
                    std::hint::spin_loop();
                }
                Ok::<_, Error>(())
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    passes.remove(0);
    passes.sort_by(|a, b| a.wall_s.total_cmp(&b.wall_s));
    Ok(passes[2])
}
