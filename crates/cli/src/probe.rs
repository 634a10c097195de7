//! What this machine can do at most: the yardstick of every figure `bench` and `doctor` print.

use hearth_kernels::cpu::simd::{LANES, Lanes, fma, load};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Measured peaks of this machine.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Peaks {
    /// Floating-point operations per second, f32, all threads: independent chains of fused multiply-adds.
    pub flops: f64,
    /// Gigabytes (10⁹) per second read from memory by all threads.
    pub read_gb_s: f64,
}

/// Chains side by side: enough to hide the latency of a fused multiply-add on two ports, few enough for the
/// sixteen registers of AVX2.
const CHAINS: usize = 6;

/// Bytes read by the bandwidth probe: far more than any cache of a small machine.
const READ_BYTES: usize = 256 << 20;

/// Measures for a fraction of a second. The best of several runs counts: a peak is what nothing disturbed.
pub fn peaks() -> Peaks {
    Peaks { flops: flops(), read_gb_s: read_gb_s(crate::machine::threads()) }
}

/// The peak of arithmetic alone: operations per second.
pub fn flops() -> f64 {
    let threads = crate::machine::threads();
    best(5, || multiply_adds(threads))
}

fn best(runs: usize, mut measure: impl FnMut() -> f64) -> f64 {
    (0..runs).map(|_| measure()).fold(0.0, f64::max)
}

fn multiply_adds(threads: usize) -> f64 {
    const ROUNDS: usize = 2_000_000;
    let seconds = all_threads(threads, |i| {
        let mut chains = std::hint::black_box([[1.0 + i as f32 * 1e-3; LANES]; CHAINS]);
        multiply_add(&mut chains, 0.999, 1e-3, ROUNDS);
        std::hint::black_box(chains);
    });
    (threads * ROUNDS * CHAINS * LANES * 2) as f64 / seconds.as_secs_f64()
}

fn read_gb_s(threads: usize) -> f64 {
    let values = vec![1.0f32; READ_BYTES / 4];
    let share = values.len().div_ceil(threads);
    let parts: Vec<&[f32]> = values.chunks(share).collect();
    best(4, || {
        let seconds = all_threads(parts.len(), |i| {
            std::hint::black_box(sum(parts[i]));
        });
        READ_BYTES as f64 / seconds.as_secs_f64() / 1e9
    })
}

/// Time from the first start to the last end of `work(i)` on thread `i`.
fn all_threads(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for i in 0..threads {
            let work = &work;
            scope.spawn(move || work(i));
        }
    });
    start.elapsed()
}

hearth_kernels::multiversion! {
    /// `chain ← chain·a + b`, over and over.
    fn multiply_add(chains: &mut [Lanes; CHAINS], a: f32, b: f32, rounds: usize) {
        // A local copy and index loops: the form that stays in registers throughout.
        let mut local = *chains;
        for _ in 0..rounds {
            for c in 0..CHAINS {
                for i in 0..LANES {
                    local[c][i] = local[c][i].mul_add(a, b);
                }
            }
        }
        *chains = local;
    }
}

hearth_kernels::multiversion! {
    fn sum(values: &[f32]) -> f32 {
        let mut sums: [Lanes; 4] = [[0.0; LANES]; 4];
        for part in values.chunks_exact(4 * LANES) {
            for (sum, lanes) in sums.iter_mut().zip(part.chunks_exact(LANES)) {
                *sum = fma(load(lanes), [1.0; LANES], *sum);
            }
        }
        sums.iter().flatten().sum()
    }
}

/// Gigabytes per second written to a new file in `folder` and made durable, and read back (which the page cache
/// usually serves). The file has no name and is gone afterwards.
///
/// # Errors
/// When the folder cannot be written.
pub fn disk_gb_s(folder: &Path) -> std::io::Result<(f64, f64)> {
    const BYTES: usize = 64 << 20;
    const CHUNK: usize = 4 << 20;
    let mut file: File = tempfile::tempfile_in(folder)?;
    let mut chunk: Vec<u8> = (0..CHUNK).map(|i| (i * 31 % 251) as u8).collect();
    let start = Instant::now();
    for _ in 0..BYTES / CHUNK {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let written = BYTES as f64 / start.elapsed().as_secs_f64() / 1e9;
    file.seek(SeekFrom::Start(0))?;
    let start = Instant::now();
    for _ in 0..BYTES / CHUNK {
        file.read_exact(&mut chunk)?;
    }
    Ok((written, BYTES as f64 / start.elapsed().as_secs_f64() / 1e9))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_peaks_of_any_machine_are_positive() {
        let peaks = super::peaks();
        assert!(peaks.flops > 1e8 && peaks.read_gb_s > 0.01, "{peaks:?}");
    }
}
