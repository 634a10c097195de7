//! Storage formats: how a row of numbers lies in bytes. One file each, one line in [`FORMATS`].
//!
//! The scalar code here is the reference: bit-equal to `gguf.quants` of the `gguf` Python package. Faster
//! kernels live elsewhere and are tested against it.

mod bf16;
mod f16;
mod f32;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

use crate::Error;

/// Full precision.
pub static F32: FormatRef = &f32::F32;
/// IEEE half precision.
pub static F16: FormatRef = &f16::F16;
/// Upper half of an f32.
pub static BF16: FormatRef = &bf16::Bf16;
/// 8-bit blocks of 32 with one f16 scale.
pub static Q8_0: FormatRef = &q8_0::Q8_0;
/// 4-bit blocks of 32 with one f16 scale.
pub static Q4_0: FormatRef = &q4_0::Q4_0;
/// 4-bit blocks of 32 with f16 scale and minimum.
pub static Q4_1: FormatRef = &q4_1::Q4_1;

/// A storage format. Rows are stored one after another; a row is a whole number of blocks.
pub trait Format: Send + Sync + 'static {
    /// Lower-case name as users type it: `f32`, `bf16`, `q8_0`, `q4_k`.
    fn name(&self) -> &'static str;
    /// ggml type number in GGUF files.
    fn ggml_type(&self) -> u32;
    /// Elements per block (1 for plain floats).
    fn block_len(&self) -> usize;
    /// Bytes per block.
    fn block_bytes(&self) -> usize;
    /// Decodes whole blocks. `bytes.len() / block_bytes * block_len == out.len()`.
    fn dequantize(&self, bytes: &[u8], out: &mut [f32]);
    /// Encodes whole blocks by round-to-nearest; `false` when the format is read-only here.
    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool;
}

/// A registered format.
pub type FormatRef = &'static dyn Format;

impl std::fmt::Debug for dyn Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl PartialEq for dyn Format {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for dyn Format {}

/// Every format hearth reads.
pub static FORMATS: &[FormatRef] = &[
    &f32::F32,
    &f16::F16,
    &bf16::Bf16,
    &q8_0::Q8_0,
    &q4_0::Q4_0,
    &q4_1::Q4_1,
    &q5_0::Q5_0,
    &q5_1::Q5_1,
    &q4_k::Q4K,
    &q5_k::Q5K,
    &q6_k::Q6K,
];

/// The format called `name`, in any letter case.
///
/// # Errors
/// [`Error::UnknownFormat`] with the nearest name and the list of all.
pub fn by_name(name: &str) -> Result<FormatRef, Error> {
    let lower = name.to_ascii_lowercase();
    if let Some(format) = FORMATS.iter().find(|f| f.name() == lower) {
        return Ok(*format);
    }
    let nearest = FORMATS
        .iter()
        .map(|f| (strsim::damerau_levenshtein(&lower, f.name()), f.name()))
        .min()
        .filter(|(distance, _)| *distance <= 2);
    Err(Error::UnknownFormat {
        name: name.to_owned(),
        hint: nearest.map(|(_, n)| format!(", did you mean {n:?}?")).unwrap_or_default(),
        known: names(|_| true),
    })
}

/// The format with this ggml type number, if hearth reads it.
pub fn by_ggml_type(ggml_type: u32) -> Option<FormatRef> {
    FORMATS.iter().copied().find(|f| f.ggml_type() == ggml_type)
}

/// Whether the format can be written as well as read.
pub fn is_writable(format: FormatRef) -> bool {
    let values = vec![0.0; format.block_len()];
    format.quantize(&values, &mut vec![0; format.block_bytes()])
}

/// Whether the format stores each number by itself, as a float.
pub fn is_float(format: FormatRef) -> bool {
    format.block_len() == 1
}

/// Bytes a tensor of this shape takes, or `None` when a row is not whole blocks or the size overflows.
pub fn byte_len(format: FormatRef, shape: &[usize]) -> Option<usize> {
    let row = shape.last().copied().unwrap_or(1);
    if row % format.block_len() != 0 {
        return None;
    }
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    (elements / format.block_len()).checked_mul(format.block_bytes())
}

/// Names of the formats for which `keep` holds, for messages.
pub(crate) fn names(keep: impl Fn(FormatRef) -> bool) -> String {
    let names: Vec<_> = FORMATS.iter().filter(|f| keep(**f)).map(|f| f.name()).collect();
    names.join(", ")
}

/// The little-endian f16 at byte `at`, as f32.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Writes `value` rounded to f16 at byte `at`.
fn put_half(out: &mut [u8], at: usize, value: f32) {
    out[at..at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
}

/// `1 / d`, or 0 for a block of zeros.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of largest magnitude with its sign; the first among equals.
fn signed_extreme(values: &[f32]) -> f32 {
    let mut extreme = values[0];
    for &v in &values[1..] {
        if v.abs() > extreme.abs() {
            extreme = v;
        }
    }
    extreme
}

/// Smallest and largest value.
fn range(values: &[f32]) -> (f32, f32) {
    let mut range = (values[0], values[0]);
    for &v in &values[1..] {
        range = (range.0.min(v), range.1.max(v));
    }
    range
}

/// The fifth bits of 32 quants, packed little-endian.
fn fifth_bits(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Packs 32 five-bit quants: four bytes of high bits, then 16 bytes of nibbles, element `i` beside `i + 16`.
fn pack_five_bits(quants: &[u8; 32], out: &mut [u8]) {
    let high = quants.iter().enumerate().fold(0u32, |bits, (i, q)| bits | (u32::from(q >> 4) << i));
    out[..4].copy_from_slice(&high.to_le_bytes());
    for i in 0..16 {
        out[4 + i] = (quants[i] & 0x0f) | (quants[i + 16] << 4);
    }
}

/// Eight 6-bit (scale, minimum) pairs from the 12 bytes Q4_K and Q5_K share.
fn k_scales(packed: &[u8]) -> [(u8, u8); 8] {
    std::array::from_fn(|i| {
        if i < 4 {
            (packed[i] & 0x3f, packed[i + 4] & 0x3f)
        } else {
            let low = packed[i + 4];
            ((low & 0x0f) | ((packed[i - 4] >> 2) & 0x30), (low >> 4) | ((packed[i] >> 2) & 0x30))
        }
    })
}
