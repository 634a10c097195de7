//! Row order of q and k in `llama` GGUF files.
//!
//! Within each head of `d` rows, GGUF row `2j + s` is canonical row `s·d/2 + j` (`s` = 0, 1). Rows are whole
//! blocks, so quantized bytes move as they are.

/// Interleaved (GGUF) rows → canonical order. `bytes` is `heads` equal heads; a row is `row_bytes`.
pub(super) fn to_canonical(bytes: &[u8], heads: usize, row_bytes: usize) -> Vec<u8> {
    reorder(bytes, heads, row_bytes, |row, half| (row % half) * 2 + row / half)
}

/// Canonical rows → interleaved (GGUF) order.
pub(super) fn to_gguf(bytes: &[u8], heads: usize, row_bytes: usize) -> Vec<u8> {
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
