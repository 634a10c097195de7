//! Reading a tensor in another storage format than its own, a few rows at a time.

use crate::Error;
use crate::quant::{self, FormatRef};
use crate::source::{TensorMeta, TensorSource};
use rayon::prelude::*;
use std::borrow::Cow;

/// Elements re-encoded by one task; a multiple of every block length.
const CHUNK: usize = 1 << 15;

/// The format a tensor gets in a bundle or GGUF file when the user asks for `requested` (`None` = as it is).
///
/// - Vectors (norms, biases) are f32: they are tiny and everything is sensitive to them.
/// - Matrices get `requested`; but the embedding and the output head get `q8_0` when fewer than 8 bits are
///   asked for, since every token passes through them, and a matrix whose rows are not whole blocks keeps its
///   own float format.
pub fn storage_format(meta: &TensorMeta, requested: Option<FormatRef>) -> FormatRef {
    let Some(requested) = requested else { return meta.format };
    if meta.shape.len() != 2 {
        return quant::F32;
    }
    let outer = matches!(meta.name.as_str(), "model.embed_tokens.weight" | "lm_head.weight");
    // q8_0 takes 34 bytes for 32 elements.
    let small = requested.block_bytes() * 32 < 34 * requested.block_len();
    let wanted = if outer && small { quant::Q8_0 } else { requested };
    if meta.shape[1].is_multiple_of(wanted.block_len()) {
        return wanted;
    }
    if quant::is_float(meta.format) { meta.format } else { quant::F32 }
}

/// Appends the tensor's bytes in `format` to `out`. Bytes already in that format are copied unchanged.
///
/// Resident beside `out`: what the source needs to hand out the tensor, and a few rows per core; the source's own
/// pages are released before returning.
///
/// # Errors
/// Those of the source; [`Error::ReadOnlyFormat`]; [`Error::Tensor`] when rows are not whole blocks.
pub fn encode(
    source: &dyn TensorSource,
    name: &str,
    format: FormatRef,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let meta = source.meta(name)?;
    let bytes = source.bytes(name)?;
    if meta.format == format {
        match bytes {
            Cow::Owned(bytes) if out.is_empty() => *out = bytes,
            bytes => out.extend_from_slice(&bytes),
        }
        source.release(name);
        return Ok(());
    }
    if !quant::is_writable(format) {
        let writable = quant::names(quant::is_writable);
        return Err(Error::ReadOnlyFormat { format: format.name(), writable });
    }
    let total = quant::byte_len(format, &meta.shape).ok_or_else(|| {
        let what = format!("shape {:?} is not whole blocks of {}", meta.shape, format.name());
        Error::tensor(source.origin(), name, what)
    })?;
    let start = out.len();
    out.resize(start + total, 0);
    let from = meta.format;
    let from_chunk = CHUNK / from.block_len() * from.block_bytes();
    let to_chunk = CHUNK / format.block_len() * format.block_bytes();
    out[start..].par_chunks_mut(to_chunk).zip(bytes.par_chunks(from_chunk)).for_each(|(to, bytes)| {
        let mut values = vec![0f32; to.len() / format.block_bytes() * format.block_len()];
        from.dequantize(bytes, &mut values);
        format.quantize(&values, to);
    });
    source.release(name);
    Ok(())
}
