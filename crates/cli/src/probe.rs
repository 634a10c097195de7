//! What this machine can do at most: the yardstick of every figure `bench` and `doctor` print.

use hearth_kernels::cpu::simd::{LANES, Lanes};
use hearth_memory::probe;
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

/// Measures for about a second. Of arithmetic the best of several runs counts, of memory the median.
pub fn peaks() -> Peaks {
    Peaks { flops: flops(), read_gb_s: probe::memory().read_gb_s }
}

/// The peak of arithmetic alone: operations per second, of the run that nothing disturbed.
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

#[cfg(test)]
mod tests {
    #[test]
    fn the_peaks_of_any_machine_are_positive() {
        let peaks = super::peaks();
        assert!(peaks.flops > 1e8 && peaks.read_gb_s > 0.01, "{peaks:?}");
    }
}
