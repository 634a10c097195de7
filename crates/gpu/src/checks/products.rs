//! Products with quantized and dense matrices, and what follows the last of them.

use super::values::{Number, agree, near, numbers, same, wide};
use super::{Failure, On};
use half::{bf16, f16};
use hearth_cuda::ops::gemm::{ResultOf, Shape, gemm_nn, gemm_nt, gemm_tn};
use hearth_cuda::ops::loss;
use hearth_cuda::ops::quant::{self, FORMATS, Format, Matrix, PIECE, Quantized, Way};
use hearth_cuda::runtime::DeviceBuffer;
use hearth_kernels::cpu::gemm::{Elems, View, product};
use hearth_kernels::cpu::quant::activations::Int8Rows;
use hearth_kernels::{Activations, PackedMatrix};
use hearth_weights::source::decode;

/// Rows of activations on the card, as bytes.
struct Rows {
    quants: DeviceBuffer<i8>,
    scales: DeviceBuffer<f32>,
    sums: DeviceBuffer<u32>,
}

impl Rows {
    fn of<T: Number>(on: &On, x: &[T]) -> Result<Self, Failure> {
        let pieces = x.len() / PIECE;
        let mut rows = Rows { quants: on.room(x.len())?, scales: on.room(pieces)?, sums: on.room(pieces)? };
        quant::quantize_rows(&on.stream, on.up(x)?.all(), rows.all())?;
        Ok(rows)
    }

    fn all(&mut self) -> Quantized<'_> {
        Quantized { quants: self.quants.all_mut(), scales: self.scales.all_mut(), sums: self.sums.all_mut() }
    }
}

/// Blocks of arbitrary codes with small scales.
fn blocks(format: &Format, rows: usize, columns: usize) -> Vec<u8> {
    let len = format.bytes_of(rows, columns).expect("whole blocks");
    let mut bytes: Vec<u8> = (0..len).map(|i| (i * i * 31 + i * 7) as u8).collect();
    for (i, block) in bytes.chunks_exact_mut(format.bytes).enumerate() {
        let mut half = |at: usize, x: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
        half(if format.name == "q6_k" { 208 } else { 0 }, 0.011 + (i % 7) as f32 * 0.003);
        if matches!(format.name, "q4_1" | "q5_1" | "q4_k" | "q5_k") {
            half(2, (i % 5) as f32 * 0.02 - 0.05);
        }
    }
    bytes
}

pub fn quantized_rows(on: &On) -> Result<(), Failure> {
    fn one<T: Number>(on: &On) -> Result<(), Failure> {
        let x = numbers::<T>(1, 3 * 7 * PIECE);
        let (got, want) = (Rows::of(on, &x)?, Int8Rows::quantize(&wide(&x), 7 * PIECE));
        let sums: Vec<u32> =
            want.sums.iter().map(|[a, b]| u32::from(*a as u16) | u32::from(*b as u16) << 16).collect();
        same("quants", &on.down(&got.quants)?, &want.quants)?;
        same("scales", &on.down(&got.scales)?, &want.scales)?;
        same("sums", &on.down(&got.sums)?, &sums)
    }
    one::<f32>(on).and_then(|()| one::<bf16>(on)).and_then(|()| one::<f16>(on))
}

pub fn dequantized(on: &On) -> Result<(), Failure> {
    fn one<T: Number>(on: &On, w: Matrix<'_>, want: &[f32]) -> Result<(), Failure> {
        let mut y = on.room::<T>(w.rows * w.columns)?;
        quant::dequantize(&on.stream, w, y.all_mut())?;
        let rounded: Vec<f32> = want.iter().map(|&x| T::of(x).wide()).collect();
        same(&format!("{} in {}", w.format.name, T::NAME), &wide(&on.down(&y)?), &rounded)
    }
    let (rows, columns) = (3, 512);
    for format in FORMATS {
        let bytes = blocks(format, rows, columns);
        let reference = hearth_weights::quant::by_name(format.name).expect("every format is registered");
        let want = decode(reference, &bytes);
        let bytes = on.up(&bytes)?;
        let w = Matrix { bytes: bytes.all(), format, rows, columns };
        one::<f32>(on, w, &want)?;
        one::<bf16>(on, w, &want)?;
        one::<f16>(on, w, &want)?;
    }
    Ok(())
}

pub fn quantized(on: &On) -> Result<(), Failure> {
    let (rows, columns) = (21, 512);
    for format in FORMATS {
        let bytes = blocks(format, rows, columns);
        let packed = PackedMatrix::from_format(rows, columns, format.name, &bytes).expect("it has panels");
        let packed = packed.with_activations(Activations::Int8);
        let bytes = on.up(&bytes)?;
        let w = Matrix { bytes: bytes.all(), format, rows, columns };
        for (m, way) in [(1, Way::Gemv), (3, Way::Gemv), (8, Way::Gemv), (1, Way::Gemm), (13, Way::Gemm)] {
            let x = numbers::<f32>(m as u64, m * columns);
            let mut want = vec![0.0; m * rows];
            packed.multiply(&x, &mut want);
            let (mut x, mut y) = (Rows::of(on, &x)?, on.room::<f32>(m * rows)?);
            quant::product_by(&on.stream, way, w, &x.all(), m, y.all_mut())?;
            same(&format!("{m} rows by {way:?} with {}", format.name), &on.down(&y)?, &want)?;
        }
    }
    Ok(())
}

pub fn dense(on: &On) -> Result<(), Failure> {
    products::<f32, f32>(on)?;
    transposed::<f32>(on)?;
    products::<bf16, bf16>(on)?;
    products::<bf16, f32>(on)?;
    transposed::<bf16>(on)?;
    products::<f16, f16>(on)?;
    products::<f16, f32>(on)?;
    transposed::<f16>(on)
}

const SHAPE: Shape = Shape { m: 37, n: 29, k: 65 };

/// The CPU's product of views that make `[m, k]` and `[k, n]`.
fn on_cpu(a: View<'_>, b: View<'_>) -> Vec<f32> {
    product(SHAPE.m, SHAPE.n, SHAPE.k, a, b)
}

fn products<T: Number, Y: Number + ResultOf<T>>(on: &On) -> Result<(), Failure> {
    let Shape { m, n, k } = SHAPE;
    let (a, nt, nn) = (numbers::<T>(1, m * k), numbers::<T>(2, n * k), numbers::<T>(3, k * n));
    let (on_a, on_nt, on_nn) = (on.up(&a)?, on.up(&nt)?, on.up(&nn)?);
    let (mut y, mut z) = (on.room::<Y>(m * n)?, on.room::<Y>(m * n)?);
    gemm_nt(&on.stream, on_a.all(), on_nt.all(), SHAPE, false, y.all_mut())?;
    gemm_nn(&on.stream, on_a.all(), on_nn.all(), SHAPE, false, z.all_mut())?;
    let (a, nt, nn) = (wide(&a), wide(&nt), wide(&nn));
    let left = View::rows(Elems::F32(&a), k);
    let want = on_cpu(left, View::transposed(Elems::F32(&nt), k));
    compare::<T, Y>("a·bᵀ", &on.down(&y)?, &want)?;
    compare::<T, Y>("a·b", &on.down(&z)?, &on_cpu(left, View::rows(Elems::F32(&nn), n)))
}

/// Bits where nothing but f32 takes part: tensor cores add in an order of their own.
fn compare<T: Number, Y: Number>(what: &str, got: &[Y], want: &[f32]) -> Result<(), Failure> {
    if T::EXACT { agree(what, got, want) } else { near(what, &wide(got), want, Y::TOLERANCE) }
}

fn transposed<T: Number>(on: &On) -> Result<(), Failure>
where
    f32: ResultOf<T>,
{
    let Shape { m, n, k } = SHAPE;
    let (a, b) = (numbers::<T>(1, k * m), numbers::<T>(2, k * n));
    let (on_a, on_b) = (on.up(&a)?, on.up(&b)?);
    let mut y = on.up(&vec![0f32; m * n])?;
    gemm_tn(&on.stream, on_a.all(), on_b.all(), SHAPE, true, y.all_mut())?;
    let (a, b) = (wide(&a), wide(&b));
    let want = on_cpu(View::transposed(Elems::F32(&a), m), View::rows(Elems::F32(&b), n));
    compare::<T, f32>("aᵀ·b", &on.down(&y)?, &want)
}

pub fn cross_entropy(on: &On) -> Result<(), Failure> {
    fn one<T: Number>(on: &On) -> Result<(), Failure> {
        let (rows, vocab, targets) = (4, 515, [7, -1, 514, 0]);
        let logits: Vec<f32> = numbers::<f32>(1, rows * vocab).iter().map(|x| 6.0 * x).collect();
        let (mut nll, mut slopes) = (on.room::<f64>(rows)?, on.room::<T>(rows * vocab)?);
        let (on_logits, on_targets) = (on.up(&logits)?, on.up(&targets)?);
        loss::cross_entropy(
            &on.stream,
            on_logits.all(),
            on_targets.all(),
            nll.all_mut(),
            Some(slopes.all_mut()),
        )?;
        let (mut want_nll, mut want) = (Vec::new(), Vec::new());
        for (logits, &target) in logits.chunks(vocab).zip(&targets) {
            let most = logits.iter().copied().fold(f32::MIN, f32::max);
            let weights: Vec<f64> = logits.iter().map(|x| f64::from(x - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let Ok(target) = usize::try_from(target) else {
                want_nll.push(0.0);
                want.extend(vec![0.0; vocab]);
                continue;
            };
            want_nll.push((sum.ln() - f64::from(logits[target] - most)) as f32);
            want.extend(weights.iter().enumerate().map(|(i, w)| (w / sum - f64::from(i == target)) as f32));
        }
        let nll: Vec<f32> = on.down(&nll)?.iter().map(|&x| x as f32).collect();
        near("nll", &nll, &want_nll, 1e-5)?;
        near(&format!("slopes in {}", T::NAME), &wide(&on.down(&slopes)?), &want, T::TOLERANCE)
    }
    one::<f32>(on).and_then(|()| one::<bf16>(on)).and_then(|()| one::<f16>(on))
}
