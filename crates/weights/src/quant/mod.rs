//! Storage formats: how a row of numbers lies in bytes. One file each, one line in [`FORMATS`].

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

/// Every format hearth reads.
pub static FORMATS: &[FormatRef] = &[];
