//! Copies within the card, products of one row with quantized matrices, AdamW.

use super::{Against, Bench, Speed, speed};
use crate::Error;
use half::bf16;
use hearth_cuda::ops::optimizer as ops;
use hearth_cuda::ops::quant::{FORMATS, Matrix, PIECE, Quantized, product};
use hearth_cuda::runtime::DeviceBuffer;
use hearth_kernels::cpu::adamw::AdamWRule;
use hearth_memory::Kind;

/// What everything on the card is held against.
pub fn copy(bench: &Bench) -> Result<Speed, Error> {
    let len = bench.extent.pick(1 << 30, 1 << 12);
    let seconds = copy_seconds(bench, len)?;
    let what = "copy within the card".to_owned();
    Ok(Speed { what, bytes: 2 * len as u64, seconds, against: Against::CardCopy, share: 1.0, goal: None })
}

/// What so many bytes take from one place on the card to another.
pub fn copy_seconds(bench: &Bench, len: usize) -> Result<f64, Error> {
    let from = DeviceBuffer::<u8>::from_host(&bench.stream, Kind::Activations, &noise(len))?;
    let mut to = DeviceBuffer::<u8>::new(bench.card(), Kind::Activations, len)?;
    bench.time(|| Ok(to.copy_from(&bench.stream, &from)?))
}

/// Bytes that look like weights: a card is faster with zeros.
fn noise(len: usize) -> Vec<u8> {
    let piece: Vec<u8> = (0..1u32 << 16).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    let mut all = piece.repeat(len.div_ceil(piece.len()));
    all.truncate(len);
    all
}

/// Every format, one row and eight.
pub fn products(bench: &Bench, base: f64, found: &mut dyn FnMut(Speed)) -> Result<(), Error> {
    // Matrices of hundreds of MB: no cache holds them.
    let n = bench.extent.pick(16384, 256);
    for format in FORMATS {
        let len = format.bytes_of(n, n).unwrap_or_default();
        let bytes = DeviceBuffer::<u8>::from_host(&bench.stream, Kind::Weights, &noise(len))?;
        for m in [1, 8] {
            let mut quants = DeviceBuffer::<i8>::zeros(&bench.stream, Kind::Activations, m * n)?;
            let mut scales = DeviceBuffer::<f32>::zeros(&bench.stream, Kind::Activations, m * n / PIECE)?;
            let mut sums = DeviceBuffer::<u32>::zeros(&bench.stream, Kind::Activations, m * n / PIECE)?;
            let mut y = DeviceBuffer::<f32>::new(bench.card(), Kind::Activations, m * n)?;
            let x = Quantized { quants: quants.all_mut(), scales: scales.all_mut(), sums: sums.all_mut() };
            let w = Matrix { bytes: bytes.all(), format, rows: n, columns: n };
            let seconds = bench.time(|| Ok(product(&bench.stream, w, &x, m, y.all_mut())?))?;
            found(speed(format!("{} product, {m} rows", format.name), len, seconds, base, 0.7));
        }
    }
    Ok(())
}

/// The update of a step: f32 states, read and written, with a bf16 copy out are 30 bytes a parameter.
pub fn adamw(bench: &Bench, base: f64) -> Result<Speed, Error> {
    let n = bench.extent.pick(1 << 27, 1 << 12);
    let zeros = || DeviceBuffer::<f32>::zeros(&bench.stream, Kind::Optimizer, n);
    let (mut p, mut m, mut v, g) = (zeros()?, zeros()?, zeros()?, zeros()?);
    let mut copy = DeviceBuffer::<bf16>::new(bench.card(), Kind::Optimizer, n)?;
    let rule = AdamWRule {
        keep: 0.999,
        one_minus_beta1: 0.1,
        beta2: 0.95,
        one_minus_beta2: 0.05,
        step_size: 1e-3,
        root_correction2: 1.0,
        eps: 1e-8,
        gradient_scale: 1.0,
    };
    let seconds = bench.time(|| {
        let states = (m.all_mut(), v.all_mut());
        Ok(ops::adamw(&bench.stream, rule, p.all_mut(), states, g.all(), Some(copy.all_mut()))?)
    })?;
    Ok(speed("AdamW, f32 states, bf16 copy".into(), 30 * n, seconds, base, 0.85))
}
