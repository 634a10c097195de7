//! What the block formats of ggml say. A format is a reader, its inverse, and one line in [`FORMATS`].

use super::{BLOCK, SUPER};

/// A block format as it lies in files and how it lies in panels.
pub struct QuantFormat {
    /// Lower-case name: `q8_0`, `q4_k`.
    pub name: &'static str,
    /// Bits of a code.
    pub bits: u8,
    /// The code that stands for zero before scaling.
    pub zero: u8,
    /// Weights per file block: 32, or 256 for the K formats.
    pub block: usize,
    /// Bytes per file block.
    pub block_bytes: usize,
    /// How scales lie in a panel.
    pub scales: ScaleKind,
    /// Reads 32 weights, number `inner`, of a file block.
    pub read: fn(&[u8], usize) -> Content,
    /// Writes them into a file block that is zero there.
    pub write: fn(&mut [u8], usize, &Content),
}

/// Scales of a panel: each entry has a value for each of its 16 rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleKind {
    /// Per block of 32: an f16 scale.
    Half,
    /// Per block of 32: an f16 scale, an f16 minimum.
    HalfMin,
    /// Per 256: an f16 scale and an f16 minimum; per block of 32 an unsigned factor of each. The minimum is subtracted.
    SuperMin,
    /// Per 256: an f16 scale; per 16 a signed factor of it.
    SuperSigned,
}

impl ScaleKind {
    /// Whether a minimum is added to scaled codes.
    pub fn has_minimum(self) -> bool {
        matches!(self, Self::HalfMin | Self::SuperMin)
    }

    /// Byte at which the record that covers block `b` begins; for the number of blocks, the length of all.
    pub(super) fn record(self, b: usize) -> usize {
        match self {
            Self::Half => 32 * b,
            Self::HalfMin => 64 * b,
            Self::SuperMin => (64 + 8 * 32) * (b * BLOCK / SUPER),
            Self::SuperSigned => (32 + 8 * 32) * (b * BLOCK / SUPER),
        }
    }

    /// Byte at which the record that covers block `b` ends.
    pub(super) fn end(self, b: usize) -> usize {
        match self {
            Self::Half | Self::HalfMin => self.record(b + 1),
            Self::SuperMin | Self::SuperSigned => self.record(b + SUPER / BLOCK),
        }
    }
}

/// Thirty-two weights of a row.
pub struct Content {
    /// Unsigned codes.
    pub codes: [u8; BLOCK],
    /// f16 scale, little-endian.
    pub d: [u8; 2],
    /// f16 minimum, little-endian.
    pub m: [u8; 2],
    /// Inner factors: scale and minimum (`SuperMin`), or of the first and second 16 (`SuperSigned`).
    pub inner: [u8; 2],
}

/// Every format with a panel layout.
pub static FORMATS: &[QuantFormat] = &[
    QuantFormat {
        name: "q8_0",
        bits: 8,
        zero: 128,
        block: BLOCK,
        block_bytes: 34,
        scales: ScaleKind::Half,
        read: |block, _| content(block, None, |i| block[2 + i] ^ 0x80),
        write: |block, _, from| {
            put_scales(block, None, from);
            from.codes.iter().zip(&mut block[2..]).for_each(|(code, byte)| *byte = code ^ 0x80);
        },
    },
    QuantFormat {
        name: "q4_0",
        bits: 4,
        zero: 8,
        block: BLOCK,
        block_bytes: 18,
        scales: ScaleKind::Half,
        read: |block, _| content(block, None, |i| nibble(&block[2..], i)),
        write: |block, _, from| {
            put_scales(block, None, from);
            put_nibbles(&mut block[2..], from);
        },
    },
    QuantFormat {
        name: "q4_1",
        bits: 4,
        zero: 0,
        block: BLOCK,
        block_bytes: 20,
        scales: ScaleKind::HalfMin,
        read: |block, _| content(block, Some(2), |i| nibble(&block[4..], i)),
        write: |block, _, from| {
            put_scales(block, Some(2), from);
            put_nibbles(&mut block[4..], from);
        },
    },
    QuantFormat {
        name: "q5_0",
        bits: 5,
        zero: 16,
        block: BLOCK,
        block_bytes: 22,
        scales: ScaleKind::Half,
        read: |block, _| content(block, None, |i| five_bits(&block[2..], i)),
        write: |block, _, from| {
            put_scales(block, None, from);
            put_five_bits(&mut block[2..], from);
        },
    },
    QuantFormat {
        name: "q5_1",
        bits: 5,
        zero: 0,
        block: BLOCK,
        block_bytes: 24,
        scales: ScaleKind::HalfMin,
        read: |block, _| content(block, Some(2), |i| five_bits(&block[4..], i)),
        write: |block, _, from| {
            put_scales(block, Some(2), from);
            put_five_bits(&mut block[4..], from);
        },
    },
    QuantFormat {
        name: "q4_k",
        bits: 4,
        zero: 0,
        block: SUPER,
        block_bytes: 144,
        scales: ScaleKind::SuperMin,
        read: |block, inner| Content {
            inner: k_scales(&block[4..16], inner),
            ..content(block, Some(2), |i| k_nibble(&block[16..], inner, i))
        },
        write: |block, inner, from| {
            put_scales(block, Some(2), from);
            put_k_scales(&mut block[4..16], inner, from.inner);
            put_k_nibbles(&mut block[16..], inner, from);
        },
    },
    QuantFormat {
        name: "q5_k",
        bits: 5,
        zero: 0,
        block: SUPER,
        block_bytes: 176,
        scales: ScaleKind::SuperMin,
        read: |block, inner| Content {
            inner: k_scales(&block[4..16], inner),
            ..content(block, Some(2), |i| {
                k_nibble(&block[48..], inner, i) | ((block[16 + i] >> inner) & 1) << 4
            })
        },
        write: |block, inner, from| {
            put_scales(block, Some(2), from);
            put_k_scales(&mut block[4..16], inner, from.inner);
            put_k_nibbles(&mut block[48..], inner, from);
            from.codes.iter().zip(&mut block[16..]).for_each(|(code, byte)| *byte |= (code >> 4) << inner);
        },
    },
    QuantFormat {
        name: "q6_k",
        bits: 6,
        zero: 32,
        block: SUPER,
        block_bytes: 210,
        scales: ScaleKind::SuperSigned,
        read: read_q6_k,
        write: write_q6_k,
    },
];

/// The format called `name`, if it has a panel layout.
pub fn by_name(name: &str) -> Option<&'static QuantFormat> {
    FORMATS.iter().find(|f| f.name == name)
}

impl QuantFormat {
    /// Bytes of a row in a file, or `None` if it is not whole blocks.
    pub(super) fn row_bytes(&self, columns: usize) -> Option<usize> {
        columns.is_multiple_of(self.block).then(|| columns / self.block * self.block_bytes)
    }

    /// Bytes of a panel's codes per block of 32 columns.
    pub(super) const fn block_codes(&self) -> usize {
        64 * self.bits as usize
    }
}

/// Scale at the block's start, minimum at byte `m`, codes by index.
fn content(block: &[u8], m: Option<usize>, code: impl Fn(usize) -> u8) -> Content {
    let half = |at: usize| [block[at], block[at + 1]];
    Content { codes: std::array::from_fn(code), d: half(0), m: m.map_or([0; 2], half), inner: [0; 2] }
}

/// ggml order: element `i < 16` in the low nibble of byte `i`, element `i + 16` in the high one.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }
}

/// Four bytes of fifth bits, then nibbles.
fn five_bits(bytes: &[u8], i: usize) -> u8 {
    nibble(&bytes[4..], i) | ((bytes[i / 8] >> (i % 8)) & 1) << 4
}

/// Blocks of 32 in pairs: the even one in the low nibbles of 32 bytes, the odd one in the high ones.
fn k_nibble(bytes: &[u8], inner: usize, i: usize) -> u8 {
    (bytes[inner / 2 * 32 + i] >> (inner % 2 * 4)) & 15
}

/// 6-bit scale and minimum number `i` of the eight in 12 bytes.
fn k_scales(packed: &[u8], i: usize) -> [u8; 2] {
    if i < 4 {
        return [packed[i] & 63, packed[i + 4] & 63];
    }
    let low = packed[i + 4];
    [(low & 15) | ((packed[i - 4] >> 2) & 48), (low >> 4) | ((packed[i] >> 2) & 48)]
}

/// Low nibbles, upper bit pairs, 16 signed factors, scale. Each half of 128 weights is four groups of 32.
fn read_q6_k(block: &[u8], inner: usize) -> Content {
    let (low, high, factors) = (&block[..128], &block[128..192], &block[192..208]);
    let (half, group) = (inner / 4, inner % 4);
    Content {
        codes: std::array::from_fn(|i| {
            let nibble = (low[half * 64 + group % 2 * 32 + i] >> (group / 2 * 4)) & 15;
            nibble | ((high[half * 32 + i] >> (group * 2)) & 3) << 4
        }),
        d: [block[208], block[209]],
        m: [0; 2],
        inner: [factors[2 * inner], factors[2 * inner + 1]],
    }
}

/// The inverse of [`content`], codes left out.
fn put_scales(block: &mut [u8], m: Option<usize>, from: &Content) {
    block[..2].copy_from_slice(&from.d);
    if let Some(m) = m {
        block[m..m + 2].copy_from_slice(&from.m);
    }
}

/// The inverse of [`nibble`], on zeros; higher bits are left out.
fn put_nibbles(bytes: &mut [u8], from: &Content) {
    for (i, code) in from.codes.iter().enumerate() {
        bytes[i % 16] |= (code & 15) << (i / 16 * 4);
    }
}

/// The inverse of [`five_bits`], on zeros.
fn put_five_bits(bytes: &mut [u8], from: &Content) {
    for (i, code) in from.codes.iter().enumerate() {
        bytes[i / 8] |= (code >> 4) << (i % 8);
    }
    put_nibbles(&mut bytes[4..], from);
}

/// The inverse of [`k_nibble`], on zeros; higher bits are left out.
fn put_k_nibbles(bytes: &mut [u8], inner: usize, from: &Content) {
    for (i, code) in from.codes.iter().enumerate() {
        bytes[inner / 2 * 32 + i] |= (code & 15) << (inner % 2 * 4);
    }
}

/// The inverse of [`k_scales`], on zeros.
fn put_k_scales(packed: &mut [u8], i: usize, [scale, minimum]: [u8; 2]) {
    if i < 4 {
        packed[i] |= scale & 63;
        packed[i + 4] |= minimum & 63;
        return;
    }
    packed[i + 4] |= (scale & 15) | (minimum & 15) << 4;
    packed[i - 4] |= (scale >> 4) << 6;
    packed[i] |= (minimum >> 4) << 6;
}

/// The inverse of [`read_q6_k`], on zeros.
fn write_q6_k(block: &mut [u8], inner: usize, from: &Content) {
    let (half, group) = (inner / 4, inner % 4);
    for (i, code) in from.codes.iter().enumerate() {
        block[half * 64 + group % 2 * 32 + i] |= (code & 15) << (group / 2 * 4);
        block[128 + half * 32 + i] |= (code >> 4) << (group * 2);
    }
    block[192 + 2 * inner..][..2].copy_from_slice(&from.inner);
    block[208..210].copy_from_slice(&from.d);
}
