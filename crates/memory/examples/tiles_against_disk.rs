//! How close does a tiled update come to what the disk can do?
//!
//! `cargo run --release -p hearth-memory --example tiles_against_disk -- DIR [MIB] [COMPUTE_MS]` prints, for several
//! tile sizes and every backend, bytes per second against the mixed probe of the same run. `COMPUTE_MS` is spent in each
//! tile of 64 MiB, and less in smaller ones, to show whether computing hides behind the disk.

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
    let disk = probe::disk(directory.as_ref(), bytes)?;
    println!(
        "disk: read {:.2}, write {:.2}, mixed {:.2} GB/s ({})",
        disk.read_gb_s, disk.write_gb_s, disk.mixed_gb_s, disk.backend
    );
    for backend in &BACKENDS {
        for tile in [4 * MIB, 16 * MIB, 64 * MIB] {
            let compute = Duration::from_micros(compute_ms * 1000 * tile / (64 * MIB));
            let best = pass(directory.as_ref(), backend, bytes, tile, compute)?;
            println!(
                "{:20} tiles of {:2} MiB: {:.2} GB/s, {:.2} of the probe; waited {:.2} s, computed {:.2} of {:.2} s",
                backend.name,
                tile / MIB,
                best.gb_s(),
                best.gb_s() / disk.mixed_gb_s,
                best.io_wait_s,
                best.compute_s,
                best.wall_s
            );
        }
    }
    Ok(())
}

/// The median of three passes, after one that gives the file its blocks.
fn pass(
    directory: &Path,
    backend: &'static Backend,
    bytes: u64,
    tile: u64,
    compute: Duration,
) -> Result<Throughput, Error> {
    let path = directory.join("tiles");
    let file = NvmeFile::create_with(std::slice::from_ref(backend), &path, bytes, None)?;
    std::fs::remove_file(&path).map_err(|_| Error::Ring { why: "the file vanished".into() })?;
    let tiles: Vec<_> = (0..bytes / tile).map(|i| i * tile..(i + 1) * tile).collect();
    // The same memory whatever the tile.
    let slots = (192 * MIB / tile).min(16) as usize;
    let mut ring: Vec<_> = (0..slots).map(|_| AlignedBuffer::new(tile as usize)).collect();
    let mut passes = (0..4)
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
    Ok(passes[1])
}
