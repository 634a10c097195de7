//! Products with matrices in the block formats of GGUF, as they lie in files.

use super::{Float, Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};

/// Values of a piece: what one scale of the activations stands for.
pub const PIECE: usize = 32;
/// Most rows of activations that the kernels for decoding take.
const MOST_ROWS_OF_GEMV: usize = 8;

/// A block format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// As in `hearth-weights` and as kernels are named: `q4_k`.
    pub name: &'static str,
    /// Values of a block.
    pub values: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

/// Every format with kernels.
pub const FORMATS: &[Format] = &[
    Format { name: "q8_0", values: 32, bytes: 34 },
    Format { name: "q4_0", values: 32, bytes: 18 },
    Format { name: "q4_1", values: 32, bytes: 20 },
    Format { name: "q5_0", values: 32, bytes: 22 },
    Format { name: "q5_1", values: 32, bytes: 24 },
    Format { name: "q4_k", values: 256, bytes: 144 },
    Format { name: "q5_k", values: 256, bytes: 176 },
    Format { name: "q6_k", values: 256, bytes: 210 },
];

impl Format {
    /// The format of this name.
    pub fn by_name(name: &str) -> Option<&'static Format> {
        FORMATS.iter().find(|format| format.name == name)
    }

    /// Bytes of a matrix; `None` when rows are not whole blocks.
    pub fn bytes_of(&self, rows: usize, columns: usize) -> Option<usize> {
        columns.is_multiple_of(self.values).then(|| rows * (columns / self.values) * self.bytes)
    }
}

/// Rows of activations as bytes, on the card.
pub struct Quantized<'a> {
    /// `[rows, columns]`.
    pub quants: ViewMut<'a, i8>,
    /// `[rows, columns / 32]`.
    pub scales: ViewMut<'a, f32>,
    /// Sums of the quants of each piece's halves, 16 bits each: `[rows, columns / 32]`.
    pub sums: ViewMut<'a, u32>,
}

impl Quantized<'_> {
    /// The same rows for a shorter time.
    pub fn again(&mut self) -> Quantized<'_> {
        Quantized { quants: self.quants.again(), scales: self.scales.again(), sums: self.sums.again() }
    }
}

/// Rows of activations as pieces of 32 bytes with a scale each: the CPU's, bit for bit. `x`: whole pieces.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn quantize_rows<T: Float>(stream: &Stream, x: View<'_, T>, into: Quantized<'_>) -> Result<(), Error> {
    let op = Op("quantize_rows");
    let n = x.len();
    let pieces = op.rows("x", n, PIECE)?;
    op.takes("x", &x, n)?;
    op.gives("quants", &into.quants, n)?;
    op.gives("scales", &into.scales, pieces)?;
    op.gives("sums", &into.sums, pieces)?;
    if n == 0 {
        return Ok(());
    }
    let arguments = arguments![x, n as i64, into.quants, into.scales, into.sums];
    let grid = op.line(n.div_ceil(4 * 256), 256)?;
    stream.launch("quantize_rows.cu", &format!("quantize_rows_{}", T::NAME), grid, arguments)
}

/// A matrix in a block format, on the card.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Blocks, row by row.
    pub bytes: View<'a, u8>,
    /// Their format.
    pub format: &'static Format,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
}

/// Which kernel multiplies. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// dp4a, for up to eight rows of activations.
    Gemv,
    /// Integer tensor cores, for any number.
    Gemm,
}

/// `y = x·wᵀ` with activations of [`quantize_rows`], the way that suits their number. `y`: `[m, rows]`.
///
/// # Errors
/// As [`quantize_rows`].
pub fn product(
    stream: &Stream,
    w: Matrix<'_>,
    x: &Quantized<'_>,
    m: usize,
    y: ViewMut<'_, f32>,
) -> Result<(), Error> {
    product_by(stream, if m <= MOST_ROWS_OF_GEMV { Way::Gemv } else { Way::Gemm }, w, x, m, y)
}

/// [`product`], this way.
///
/// # Errors
/// As [`quantize_rows`]; [`Error::Value`] for more than eight rows by [`Way::Gemv`].
pub fn product_by(
    stream: &Stream,
    way: Way,
    w: Matrix<'_>,
    x: &Quantized<'_>,
    m: usize,
    y: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let op = Op("linear_quantized");
    let Matrix { bytes, format, rows, columns } = w;
    let needed = format.bytes_of(rows, columns);
    let needed =
        needed.ok_or_else(|| op.wrong("columns", columns, &format!("a multiple of {}", format.values)))?;
    let pieces = columns / PIECE;
    op.takes("w", &bytes, needed)?;
    op.gives("quants", &x.quants, m * columns)?;
    op.gives("scales", &x.scales, m * pieces)?;
    op.gives("sums", &x.sums, m * pieces)?;
    op.gives("y", &y, m * rows)?;
    if m * rows == 0 {
        return Ok(());
    }
    let (n, count, ms) = (op.int("rows", rows)?, op.int("columns", pieces)?, op.int("m", m)?);
    let arguments = arguments![bytes, x.quants, x.scales, x.sums, n, count, ms, y];
    match way {
        Way::Gemv => {
            let most = match m {
                1 => 1,
                2..=4 => 4,
                5..=MOST_ROWS_OF_GEMV => 8,
                _ => return Err(op.wrong("rows of x", m, "at most 8")),
            };
            let name = format!("quant_gemv_{}_{most}", format.name);
            stream.launch("quant_gemv.cu", &name, op.line(rows.div_ceil(8), 256)?, arguments)
        }
        Way::Gemm => {
            let name = format!("quant_gemm_{}", format.name);
            let grid = op.grid([rows.div_ceil(64), m.div_ceil(64), 1], 128, 0)?;
            stream.launch("quant_gemm.cu", &name, grid, arguments)
        }
    }
}

/// A matrix as numbers: f32 exactly as the reference, or rounded to 16 bits. `y`: `[rows, columns]`.
///
/// # Errors
/// As [`quantize_rows`].
pub fn dequantize<T: Float>(stream: &Stream, w: Matrix<'_>, y: ViewMut<'_, T>) -> Result<(), Error> {
    let op = Op("dequantize");
    let values = w.rows * w.columns;
    let needed = w.format.bytes_of(w.rows, w.columns);
    let limit = format!("a multiple of {}", w.format.values);
    op.takes("w", &w.bytes, needed.ok_or_else(|| op.wrong("columns", w.columns, &limit))?)?;
    op.gives("y", &y, values)?;
    if values == 0 {
        return Ok(());
    }
    let name = format!("dequantize_{}_{}", w.format.name, T::NAME);
    let grid = op.line(values.div_ceil(8 * 256), 256)?;
    stream.launch("dequantize.cu", &name, grid, arguments![w.bytes, values as i64, y])
}
