//! How fast this machine's AdamW is, against how fast its memory is.

use super::{AdamW, CopyOut, OptimConfig, Span, StateDtype, Values};
use half::bf16;
use hearth_kernels::cpu::pages::with_capacity_on_huge_pages;
use rayon::prelude::*;
use std::time::Instant;

/// Timed passes.
const SAMPLES: usize = 9;
/// Elements one task of the stream handles, as in the optimizer.
const CHUNK: usize = 1 << 14;

/// What [`adam_bandwidth`] measured. A step and a plain stream alternate, so that both see the same machine.
#[derive(Clone, Debug)]
pub struct AdamBandwidth {
    /// Bytes read and written per parameter.
    pub bytes_per_parameter: usize,
    /// Median bandwidth of the step: bytes read and written per second, in 10⁹.
    pub gb_s: f64,
    /// Median bandwidth of a stream that reads and writes like the step does, with next to no arithmetic.
    pub stream_gb_s: f64,
    /// Seconds of each step.
    pub samples: Vec<f64>,
    /// Seconds of each stream pass.
    pub stream_samples: Vec<f64>,
}

impl AdamBandwidth {
    /// Share of the stream's bandwidth that the step reaches.
    pub fn of_peak(&self) -> f64 {
        self.gb_s / self.stream_gb_s
    }
}

/// Times AdamW on `elements` parameters with moments of `state`, with or without a bf16 copy.
///
/// # Panics
/// For states in 8 bits, whose traffic is not that of the plain stream beside it.
pub fn adam_bandwidth(elements: usize, state: StateDtype, copy: bool) -> AdamBandwidth {
    match state {
        StateDtype::F32 => measure(elements, copy, 0f32, |m| Values::F32(m)),
        StateDtype::Bf16 => measure(elements, copy, bf16::ZERO, |m| Values::Bf16(m)),
        StateDtype::F8 => panic!("states in 8 bits are not measured"),
    }
}

fn measure<S: Copy + Send + Sync>(
    elements: usize,
    copy: bool,
    zero: S,
    values: fn(&mut [S]) -> Values,
) -> AdamBandwidth {
    let (mut p, g) = (spread(0, 0.5f32, elements), spread(1, 1e-3f32, elements));
    let (mut m, mut v) = (spread(2, zero, elements), spread(3, zero, elements));
    let mut copied = spread(4, bf16::ZERO, if copy { elements } else { 0 });
    let optim = OptimConfig::AdamW(AdamW { weight_decay: 0.1, ..AdamW::default() });
    let (mut samples, mut stream_samples) = (Vec::new(), Vec::new());
    for t in 0..=SAMPLES as u64 {
        let start = Instant::now();
        optim.step(t + 1, 1e-4, 0.5).apply(Span {
            master: &mut p,
            states: vec![values(&mut m), values(&mut v)],
            gradient: &g,
            copy: copy.then_some(CopyOut::Bf16(&mut copied)),
        });
        let step = start.elapsed().as_secs_f64();
        let start = Instant::now();
        stream(&mut p, &mut m, &mut v, &g, &mut copied);
        // The first pass of each touches cold pages.
        if t > 0 {
            samples.push(step);
            stream_samples.push(start.elapsed().as_secs_f64());
        }
    }
    let bytes_per_parameter = 3 * size_of::<f32>() + 4 * size_of::<S>() + if copy { 2 } else { 0 };
    let gb_s = |samples: &[f64]| (bytes_per_parameter * elements) as f64 / median(samples) / 1e9;
    AdamBandwidth {
        bytes_per_parameter,
        gb_s: gb_s(&samples),
        stream_gb_s: gb_s(&stream_samples),
        samples,
        stream_samples,
    }
}

/// `len` values. Buffers of equal length would lie at equal distances, which halves the bandwidth where their size is a
/// power of two (their addresses fall together in the first-level cache's way predictor); so each is a little longer.
fn spread<T: Copy>(index: usize, value: T, len: usize) -> Vec<T> {
    const SKEW: usize = 37 * 4096;
    let mut buffer = with_capacity_on_huge_pages(len + index * SKEW);
    buffer.resize(len, value);
    buffer
}

/// Reads `p, m, v, g`, writes `p, m, v` and, if it is there, `copy`. Values stay what they are: `p`'s last bit is flipped
/// where `g`'s is set, `m` and `v` change places.
fn stream<S: Copy + Send + Sync>(p: &mut [f32], m: &mut [S], v: &mut [S], g: &[f32], copy: &mut [bf16]) {
    let body = |p: &mut [f32], m: &mut [S], v: &mut [S], g: &[f32]| {
        for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
            *p = f32::from_bits(p.to_bits() ^ (g.to_bits() & 1));
            std::mem::swap(m, v);
        }
    };
    let tasks = p
        .par_chunks_mut(CHUNK)
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK))
        .zip(g.par_chunks(CHUNK));
    if copy.is_empty() {
        return tasks.for_each(|(((p, m), v), g)| body(p, m, v, g));
    }
    tasks.zip(copy.par_chunks_mut(CHUNK)).for_each(|((((p, m), v), g), copy)| {
        body(p, m, v, g);
        for (copy, p) in copy.iter_mut().zip(p) {
            *copy = bf16::from_bits((p.to_bits() >> 16) as u16);
        }
    });
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
