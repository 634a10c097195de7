//! Main memory, with all processors at once.

use super::{Figure, RUNS};
use std::hint::black_box;
use std::time::Instant;

/// Numbers per stream: seven streams of 64 MiB exceed every cache in use.
const NUMBERS: usize = 16 << 20;

/// What main memory does for long streams.
#[derive(Clone, Debug, PartialEq)]
pub struct MemorySpeed {
    /// Reading alone.
    pub read_gb_s: f64,
    /// Copying; bytes read and bytes written both count.
    pub copy_gb_s: f64,
    /// Four streams read and three of them written back, as AdamW does with parameter, gradient and two moments: 28
    /// bytes a number.
    pub adam_gb_s: f64,
    /// Threads that ran.
    pub threads: usize,
    /// The figures with their samples: read, copy, adam.
    pub figures: [Figure; 3],
}

/// Measures main memory; takes 256 MiB of it for about a second.
pub fn memory() -> MemorySpeed {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut streams: [Vec<f32>; 4] = std::array::from_fn(|i| vec![i as f32 + 0.5; NUMBERS]);
    let bytes = NUMBERS * size_of::<f32>();
    let [read, copy, adam] = [
        figure(bytes, || on_all(threads, &mut streams, |[a, _, _, _]| read(a))),
        figure(2 * bytes, || on_all(threads, &mut streams, |[a, b, _, _]| b.copy_from_slice(a))),
        figure(7 * bytes, || on_all(threads, &mut streams, |[p, g, m, v]| step(p, g, m, v))),
    ];
    black_box(&streams);
    MemorySpeed {
        read_gb_s: read.gb_s,
        copy_gb_s: copy.gb_s,
        adam_gb_s: adam.gb_s,
        threads,
        figures: [read, copy, adam],
    }
}

fn figure(bytes: usize, mut run: impl FnMut()) -> Figure {
    run();
    let sample = |_| {
        let begun = Instant::now();
        run();
        bytes as f64 / begun.elapsed().as_secs_f64() / 1e9
    };
    Figure::of((0..RUNS).map(sample).collect())
}

/// Gives each thread its part of every stream.
fn on_all(threads: usize, streams: &mut [Vec<f32>; 4], work: impl Fn([&mut [f32]; 4]) + Sync) {
    let part = NUMBERS.div_ceil(threads);
    let [a, b, c, d] = streams.each_mut().map(|stream| stream.chunks_mut(part));
    std::thread::scope(|scope| {
        for (((a, b), c), d) in a.zip(b).zip(c).zip(d) {
            let work = &work;
            scope.spawn(move || work([a, b, c, d]));
        }
    });
}

/// Folds the stream in independent lanes, so that memory and not one chain of additions sets the pace.
fn read(stream: &[f32]) {
    let mut lanes = [0u32; 64];
    for chunk in stream.chunks_exact(64) {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane ^= number.to_bits();
        }
    }
    black_box(lanes);
}

/// The memory traffic of an optimizer step with arithmetic too small to matter.
fn step(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *m += 0.1 * (g - *m);
        *v += 0.05 * (g * g - *v);
        *p -= 1e-3 * *m;
    }
}
