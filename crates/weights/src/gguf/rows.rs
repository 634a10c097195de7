//! What lies otherwise in GGUF files: the row order of q and k in `llama`, the norms of `gemma`.
//!
//! Within each head of `d` rows, GGUF row `2j + s` is canonical row `s·d/2 + j` (`s` = 0, 1). Rows are whole
//! blocks, so quantized bytes move as they are. Norms that are larger by one are f32 on both sides here: in 16 bits the
//! one would swallow their digits.

use crate::config::ModelConfig;
use crate::key_map::Form;
use crate::quant::{self, FormatRef};
use crate::source::decode;
use std::borrow::Cow;

/// How a tensor's bytes change between canonical files and GGUF.
#[derive(Clone, Copy)]
pub(super) enum Change {
    None,
    /// Rows of so many heads change places.
    Heads(usize),
    /// Values stored in this format on the other side become f32, larger or smaller by one.
    PlusOne(FormatRef),
}

impl Change {
    /// For a tensor in `format`; what is wrong with its number of rows, if it cannot be made.
    pub(super) fn new(
        form: Form,
        config: &ModelConfig,
        format: FormatRef,
        rows: usize,
    ) -> Result<Change, String> {
        let heads = match form {
            Form::Same => return Ok(Change::None),
            Form::PlusOne => return Ok(Change::PlusOne(format)),
            Form::QueryHeads => config.num_heads,
            Form::KeyHeads => config.num_kv_heads,
        };
        match rows.is_multiple_of(2 * heads) {
            true => Ok(Change::Heads(heads)),
            false => Err(format!("{rows} rows are not {heads} heads of an even width")),
        }
    }

    /// What a tensor in `format` is in after the change.
    pub(super) fn format(self, format: FormatRef) -> FormatRef {
        if matches!(self, Change::PlusOne(_)) { quant::F32 } else { format }
    }

    /// GGUF bytes of a tensor of `rows` rows → canonical ones.
    pub(super) fn canonical(self, bytes: &[u8], rows: usize) -> Cow<'_, [u8]> {
        match self {
            Change::None => Cow::Borrowed(bytes),
            Change::Heads(heads) => Cow::Owned(to_canonical(bytes, heads, bytes.len() / rows)),
            Change::PlusOne(format) => Cow::Owned(shifted(format, bytes, -1.0)),
        }
    }

    /// Canonical bytes of a tensor of `rows` rows → GGUF ones.
    pub(super) fn gguf(self, bytes: &[u8], rows: usize) -> Cow<'_, [u8]> {
        match self {
            Change::None => Cow::Borrowed(bytes),
            Change::Heads(heads) => Cow::Owned(to_gguf(bytes, heads, bytes.len() / rows)),
            Change::PlusOne(format) => Cow::Owned(shifted(format, bytes, 1.0)),
        }
    }
}

/// Every value plus `by`, in f32.
fn shifted(format: FormatRef, bytes: &[u8], by: f32) -> Vec<u8> {
    decode(format, bytes).iter().flat_map(|x| (x + by).to_le_bytes()).collect()
}

/// Interleaved (GGUF) rows → canonical order. `bytes` is `heads` equal heads; a row is `row_bytes`.
fn to_canonical(bytes: &[u8], heads: usize, row_bytes: usize) -> Vec<u8> {
    reorder(bytes, heads, row_bytes, |row, half| (row % half) * 2 + row / half)
}

/// Canonical rows → interleaved (GGUF) order.
fn to_gguf(bytes: &[u8], heads: usize, row_bytes: usize) -> Vec<u8> {
    reorder(bytes, heads, row_bytes, |row, half| (row % 2) * half + row / 2)
}

/// Row `r` of each head comes from row `source(r, head_rows / 2)`.
fn reorder(bytes: &[u8], heads: usize, row_bytes: usize, source: impl Fn(usize, usize) -> usize) -> Vec<u8> {
    let head_bytes = bytes.len() / heads;
    let head_rows = head_bytes / row_bytes;
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(head_bytes) {
        for row in 0..head_rows {
            out.extend_from_slice(&head[source(row, head_rows / 2) * row_bytes..][..row_bytes]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_heads_of_four_rows() {
        let canonical: Vec<u8> = (0..16).collect();
        let gguf = to_gguf(&canonical, 2, 2);
        assert_eq!(gguf, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        assert_eq!(to_canonical(&gguf, 2, 2), canonical);
    }
}
