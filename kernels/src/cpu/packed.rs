//! Frozen weight matrices in panel layout, dense or quantized, and their products.
//!
//! A panel holds 16 rows of the matrix side by side: for each column the 16 weights lie next to one another, so
//! a product streams memory front to back and needs no horizontal sums. Quantized panels hold the quants the same
//! way and are decoded, exactly as the format's reference does, a few hundred columns at a time into the
//! first-level cache. The arithmetic is that of [`super::gemm`]: one chain over ascending columns.

use super::decode::{BLOCK, decode_q4, decode_q4_min, decode_q8};
use super::gemm::{Elems, Output, View, gemm};
use super::simd::LANES;
use super::stored::Stored;
use half::{bf16, f16};
use rayon::prelude::*;

/// Columns decoded at a time, a multiple of [`BLOCK`]: four panels of it are half a first-level cache.
const STRIP: usize = 64;
/// Most rows of activations per micro-tile.
const MAX_TILE: usize = 6;

/// A weight matrix `[rows, columns]` = `[out, in]` in panel layout.
pub struct PackedMatrix {
    rows: usize,
    columns: usize,
    panels: Panels,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix[{} x {}, {} bytes]", self.rows, self.columns, self.bytes())
    }
}

/// Panel storage; `c` = columns, `p` = panels of 16 rows, zero-padded.
enum Panels {
    /// `[p][c][16]`.
    F32(Vec<f32>),
    /// `[p][c][16]`.
    F16(Vec<f16>),
    /// `[p][c][16]`.
    Bf16(Vec<bf16>),
    /// Quants `[p][c][16]`, scales `[p][c/32][16]`: `w = d·q`.
    Q8 { quants: Vec<i8>, scales: Vec<f16> },
    /// Nibbles `[p][c][8]` (row `r` low, row `r+8` high), scales `[p][c/32][16]`: `w = d·(q − 8)`.
    Q4 { quants: Vec<u8>, scales: Vec<f16> },
    /// As `Q4` with minima beside the scales: `w = d·q + m`.
    Q4Min { quants: Vec<u8>, scales: Vec<f16>, minima: Vec<f16> },
}

impl PackedMatrix {
    /// Packs row-major f32 weights.
    pub fn from_f32(rows: usize, columns: usize, values: &[f32]) -> Self {
        let panels = interleave(rows, columns, values, 1, |v| v[0]);
        Self { rows, columns, panels: Panels::F32(panels) }
    }

    /// Packs row-major weights stored as `f32`, `f16`, `bf16`, `q8_0`, `q4_0` or `q4_1`; `None` for a format
    /// without a panel layout, or if `bytes` are not exactly `rows × columns` weights.
    pub fn from_format(rows: usize, columns: usize, format: &str, bytes: &[u8]) -> Option<Self> {
        let blocks = columns / BLOCK;
        let fits = |bytes_per_row: usize| bytes.len() == rows * bytes_per_row;
        let whole = columns.is_multiple_of(BLOCK);
        let panels = match format {
            "f32" if fits(4 * columns) => Panels::F32(interleave(rows, columns, bytes, 4, |b| {
                f32::from_le_bytes(b.try_into().expect("4 bytes"))
            })),
            "f16" if fits(2 * columns) => Panels::F16(interleave(rows, columns, bytes, 2, half_at)),
            "bf16" if fits(2 * columns) => {
                Panels::Bf16(interleave(rows, columns, bytes, 2, |b| bf16::from_le_bytes([b[0], b[1]])))
            }
            "q8_0" if whole && fits(34 * blocks) => Panels::Q8 {
                quants: quants(rows, blocks, bytes, 34, |block, i| block[2 + i] as i8),
                scales: interleave(rows, blocks, bytes, 34, half_at),
            },
            "q4_0" if whole && fits(18 * blocks) => Panels::Q4 {
                quants: pair_nibbles(&quants(rows, blocks, bytes, 18, |block, i| nibble(&block[2..], i))),
                scales: interleave(rows, blocks, bytes, 18, half_at),
            },
            "q4_1" if whole && fits(20 * blocks) => Panels::Q4Min {
                quants: pair_nibbles(&quants(rows, blocks, bytes, 20, |block, i| nibble(&block[4..], i))),
                scales: interleave(rows, blocks, bytes, 20, half_at),
                minima: interleave(rows, blocks, bytes, 20, |block| half_at(&block[2..])),
            },
            _ => return None,
        };
        Some(Self { rows, columns, panels })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(x) => size_of_val(x.as_slice()),
            Panels::F16(x) => size_of_val(x.as_slice()),
            Panels::Bf16(x) => size_of_val(x.as_slice()),
            Panels::Q8 { quants, scales } => quants.len() + size_of_val(scales.as_slice()),
            Panels::Q4 { quants, scales } => quants.len() + size_of_val(scales.as_slice()),
            Panels::Q4Min { quants, scales, minima } => quants.len() + 2 * (scales.len() + minima.len()),
        }
    }

    /// Bytes that [`Self::from_format`] or [`Self::from_f32`] would hold: panels are padded to 16 rows.
    pub fn bytes_for(rows: usize, columns: usize, format: &str) -> usize {
        let (padded, blocks) = (rows.next_multiple_of(LANES), columns / BLOCK);
        match format {
            "f16" | "bf16" => 2 * padded * columns,
            "q8_0" if columns.is_multiple_of(BLOCK) => padded * blocks * 34,
            "q4_0" if columns.is_multiple_of(BLOCK) => padded * blocks * 18,
            "q4_1" if columns.is_multiple_of(BLOCK) => padded * blocks * 20,
            _ => 4 * padded * columns,
        }
    }

    /// Decodes row `row` into `out` (`columns` long).
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let mut strip = [0.0; STRIP * LANES];
        for (s, out) in out.chunks_mut(STRIP).enumerate() {
            self.decode(row / LANES, s * STRIP, &mut strip[..out.len() * LANES]);
            for (o, lanes) in out.iter_mut().zip(strip.chunks_exact(LANES)) {
                *o = lanes[row % LANES];
            }
        }
    }

    /// Decodes columns `from..` of a panel as `[columns][16]`.
    fn decode(&self, panel: usize, from: usize, out: &mut [f32]) {
        let at = (panel * self.columns + from) * LANES;
        let block = (panel * (self.columns / BLOCK) + from / BLOCK) * LANES;
        match &self.panels {
            Panels::F32(x) => out.copy_from_slice(&x[at..][..out.len()]),
            Panels::F16(x) => f16::widen_block(&x[at..][..out.len()], out),
            Panels::Bf16(x) => bf16::widen_block(&x[at..][..out.len()], out),
            Panels::Q8 { quants, scales } => decode_q8(&quants[at..][..out.len()], &scales[block..], out),
            Panels::Q4 { quants, scales } => {
                decode_q4(&quants[at / 2..][..out.len() / 2], &scales[block..], out);
            }
            Panels::Q4Min { quants, scales, minima } => {
                decode_q4_min(&quants[at / 2..][..out.len() / 2], &scales[block..], &minima[block..], out);
            }
        }
    }

    /// `y = x·wᵀ`. `x`: `[m, columns]`, `y`: `[m, rows]`.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let m = x.len() / self.columns.max(1);
        assert_eq!(y.len(), m * self.rows, "packed product: output size");
        y.fill(0.0);
        let packed = pack_activations(x, m, self.columns);
        let out = Output { ptr: y.as_mut_ptr(), columns: self.rows };
        // Four panels at a time keep enough independent chains in flight when there are few rows of x.
        let quads = self.rows.div_ceil(4 * LANES);
        let per_task = quads.div_ceil(8 * rayon::current_num_threads());
        let per_task = per_task.max((1 << 14) / (4 * LANES * self.columns * m).max(1)).max(1);
        (0..quads.div_ceil(per_task)).into_par_iter().with_max_len(1).for_each(|task| {
            let mut buffer = [0.0; 4 * STRIP * LANES];
            for quad in task * per_task..((task + 1) * per_task).min(quads) {
                self.multiply_quad(quad, &packed, m, &mut buffer, out);
            }
        });
    }

    fn multiply_quad(&self, quad: usize, x: &[f32], m: usize, buffer: &mut [f32], out: Output) {
        let first = quad * 4;
        let count = (self.rows.div_ceil(LANES) - first).min(4);
        for from in (0..self.columns).step_by(STRIP) {
            let len = STRIP.min(self.columns - from);
            let panels = self.strip(first, count, from, len, buffer);
            let strip = Strip { from, len, columns: self.columns, panels, count };
            strip.multiply(x, m, first * LANES, self.rows, out);
        }
    }

    /// `len` columns from `from` on of `count` panels: in place if stored as f32, else decoded into `buffer`.
    fn strip<'a>(
        &'a self,
        first: usize,
        count: usize,
        from: usize,
        len: usize,
        buffer: &'a mut [f32],
    ) -> [&'a [f32]; 4] {
        let mut panels: [&[f32]; 4] = [&[]; 4];
        if let Panels::F32(x) = &self.panels {
            for (p, panel) in panels[..count].iter_mut().enumerate() {
                *panel = &x[((first + p) * self.columns + from) * LANES..][..len * LANES];
            }
        } else {
            for (p, (panel, buffer)) in
                panels[..count].iter_mut().zip(buffer.chunks_mut(STRIP * LANES)).enumerate()
            {
                self.decode(first + p, from, &mut buffer[..len * LANES]);
                *panel = &buffer[..len * LANES];
            }
        }
        panels
    }

    /// `dx = dy·w`: a chain over ascending rows of `w`. `dy`: `[m, rows]`, `dx`: `[m, columns]`.
    pub fn multiply_transposed(&self, dy: &[f32], dx: &mut [f32]) {
        const CHUNK: usize = 32 * LANES;
        let m = dy.len() / self.rows.max(1);
        dx.fill(0.0);
        let mut chunk = vec![0.0; CHUNK.min(self.rows) * self.columns];
        for from in (0..self.rows).step_by(CHUNK) {
            let count = CHUNK.min(self.rows - from);
            let rows = &mut chunk[..count * self.columns];
            rows.par_chunks_mut(self.columns).enumerate().for_each(|(i, row)| self.read_row(from + i, row));
            let a = View::rows(Elems::F32(&dy[from..]), self.rows);
            gemm(m, self.columns, count, a, View::rows(Elems::F32(rows), self.columns), dx, true);
        }
    }
}

/// A strip of columns of up to four decoded panels.
struct Strip<'a> {
    from: usize,
    len: usize,
    columns: usize,
    panels: [&'a [f32]; 4],
    count: usize,
}

impl Strip<'_> {
    /// Adds the strip's share of `x·wᵀ` to columns `j..` of the output.
    fn multiply(&self, x: &[f32], m: usize, j: usize, limit: usize, out: Output) {
        for i in (0..m).step_by(MAX_TILE) {
            let rows = MAX_TILE.min(m - i);
            // Packed tiles are as wide as they have rows.
            let a = &x[i * self.columns + self.from * rows..][..self.len * rows];
            match rows {
                1 => self.tiles::<1, 4>(a, i, j, limit, out),
                2 => self.tiles::<2, 2>(a, i, j, limit, out),
                3 => self.tiles::<3, 2>(a, i, j, limit, out),
                4 => self.tiles::<4, 1>(a, i, j, limit, out),
                5 => self.tiles::<5, 1>(a, i, j, limit, out),
                _ => self.tiles::<6, 1>(a, i, j, limit, out),
            }
        }
    }

    /// `R` rows of `x` by all panels, `P` at a time.
    fn tiles<const R: usize, const P: usize>(
        &self,
        a: &[f32],
        i: usize,
        j: usize,
        limit: usize,
        out: Output,
    ) {
        let mut p = 0;
        while p < self.count {
            if p + P <= self.count {
                self.tile::<R, P>(p, a, i, j, limit, out);
                p += P;
            } else {
                self.tile::<R, 1>(p, a, i, j, limit, out);
                p += 1;
            }
        }
    }

    fn tile<const R: usize, const P: usize>(
        &self,
        p: usize,
        a: &[f32],
        i: usize,
        j: usize,
        limit: usize,
        out: Output,
    ) {
        let panels: [&[f32]; P] = self.panels[p..p + P].try_into().expect("P panels");
        let mut acc = [[[0.0; LANES]; P]; R];
        let column = |q: usize| j + (p + q) * LANES;
        for (r, acc) in acc.iter_mut().enumerate() {
            for (q, acc) in acc.iter_mut().enumerate() {
                let count = LANES.min(limit - column(q));
                // SAFETY: row `i + r`, columns of this task's own panels, clipped to the matrix.
                let y = unsafe {
                    std::slice::from_raw_parts(out.ptr.add((i + r) * out.columns + column(q)), count)
                };
                acc[..count].copy_from_slice(y);
            }
        }
        chains::<R, P>(a, panels, &mut acc);
        for (r, acc) in acc.iter().enumerate() {
            for (q, acc) in acc.iter().enumerate() {
                let count = LANES.min(limit - column(q));
                // SAFETY: as above; no other task touches these columns.
                let y = unsafe {
                    std::slice::from_raw_parts_mut(out.ptr.add((i + r) * out.columns + column(q)), count)
                };
                y.copy_from_slice(&acc[..count]);
            }
        }
    }
}

/// `R·P` groups of chains over the strip's columns, kept in registers.
fn chains<const R: usize, const P: usize>(a: &[f32], panels: [&[f32]; P], acc: &mut [[[f32; LANES]; P]; R]) {
    #[inline(always)]
    fn body<const R: usize, const P: usize>(
        a: &[f32],
        panels: [&[f32]; P],
        acc: &mut [[[f32; LANES]; P]; R],
    ) {
        let mut sums = *acc;
        for (k, a) in a.chunks_exact(R).enumerate() {
            for p in 0..P {
                let b: &[f32; LANES] = panels[p][k * LANES..][..LANES].try_into().expect("LANES");
                for r in 0..R {
                    for i in 0..LANES {
                        sums[r][p][i] = a[r].mul_add(b[i], sums[r][p][i]);
                    }
                }
            }
        }
        *acc = sums;
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2<const R: usize, const P: usize>(
        a: &[f32],
        panels: [&[f32]; P],
        acc: &mut [[[f32; LANES]; P]; R],
    ) {
        body(a, panels, acc);
    }

    #[cfg(target_arch = "x86_64")]
    if super::simd::avx2() {
        // SAFETY: the features were detected on this CPU.
        return unsafe { avx2(a, panels, acc) };
    }
    body(a, panels, acc);
}

/// `[m, columns]` → tiles of up to six rows, `[columns][rows of the tile]` each.
fn pack_activations(x: &[f32], m: usize, columns: usize) -> Vec<f32> {
    if m == 1 {
        return x.to_vec();
    }
    let mut packed = vec![0.0; m * columns];
    packed.par_chunks_mut(MAX_TILE * columns).zip(x.par_chunks(MAX_TILE * columns)).for_each(|(out, x)| {
        let rows = x.len() / columns;
        for (r, row) in x.chunks_exact(columns).enumerate() {
            for (k, v) in row.iter().enumerate() {
                out[k * rows + r] = *v;
            }
        }
    });
    packed
}

/// Row-major items of `size` source elements → `[panel][item][16]`, missing rows default.
fn interleave<S: Sync, T: Copy + Default + Send>(
    rows: usize,
    items: usize,
    source: &[S],
    size: usize,
    read: impl Fn(&[S]) -> T + Sync,
) -> Vec<T> {
    let mut out = vec![T::default(); rows.div_ceil(LANES) * items * LANES];
    out.par_chunks_mut((items * LANES).max(1)).enumerate().for_each(|(panel, out)| {
        for lane in 0..LANES.min(rows - panel * LANES) {
            let row = &source[(panel * LANES + lane) * items * size..][..items * size];
            for (i, item) in row.chunks_exact(size).enumerate() {
                out[i * LANES + lane] = read(item);
            }
        }
    });
    out
}

/// Quants of row-major blocks → `[panel][column][16]`.
fn quants<T: Copy + Default + Send>(
    rows: usize,
    blocks: usize,
    bytes: &[u8],
    block_bytes: usize,
    read: impl Fn(&[u8], usize) -> T + Sync,
) -> Vec<T> {
    let mut out = vec![T::default(); rows.div_ceil(LANES) * blocks * BLOCK * LANES];
    out.par_chunks_mut((blocks * BLOCK * LANES).max(1)).enumerate().for_each(|(panel, out)| {
        for lane in 0..LANES.min(rows - panel * LANES) {
            let row = &bytes[(panel * LANES + lane) * blocks * block_bytes..][..blocks * block_bytes];
            for (b, block) in row.chunks_exact(block_bytes).enumerate() {
                for i in 0..BLOCK {
                    out[(b * BLOCK + i) * LANES + lane] = read(block, i);
                }
            }
        }
    });
    out
}

/// ggml order: element `i < 16` in the low nibble of byte `i`, element `i + 16` in the high one.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }
}

/// `[..][16]` nibbles → `[..][8]` bytes, lane `i` low and lane `i + 8` high.
fn pair_nibbles(nibbles: &[u8]) -> Vec<u8> {
    nibbles.chunks_exact(LANES).flat_map(|n| (0..8).map(|i| n[i] | n[i + 8] << 4)).collect()
}

fn half_at(bytes: &[u8]) -> f16 {
    f16::from_le_bytes([bytes[0], bytes[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Random bytes with the half-precision fields of each block made finite.
    fn blocks(count: usize, block_bytes: usize, halves: usize, seed: u32) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            values(count * block_bytes, seed).iter().map(|v| ((v + 1.0) * 127.0) as u8).collect();
        for (i, block) in bytes.chunks_exact_mut(block_bytes).enumerate() {
            for h in 0..halves {
                let scale = f16::from_f32(0.01 + (i % 7) as f32 * 0.003 - h as f32 * 0.05);
                block[2 * h..2 * h + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        bytes
    }

    fn rows_of(matrix: &PackedMatrix) -> Vec<f32> {
        let mut out = vec![0.0; matrix.rows() * matrix.columns()];
        for (i, row) in out.chunks_exact_mut(matrix.columns()).enumerate() {
            matrix.read_row(i, row);
        }
        out
    }

    fn every_format(rows: usize, columns: usize) -> Vec<(&'static str, PackedMatrix)> {
        let dense = values(rows * columns, 9);
        let halves: Vec<u8> = dense.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let brains: Vec<u8> = dense.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let n = rows * columns / BLOCK;
        let of =
            |format, bytes: &[u8]| (format, PackedMatrix::from_format(rows, columns, format, bytes).unwrap());
        vec![
            ("f32", PackedMatrix::from_f32(rows, columns, &dense)),
            of("f16", &halves),
            of("bf16", &brains),
            of("q8_0", &blocks(n, 34, 1, 1)),
            of("q4_0", &blocks(n, 18, 1, 2)),
            of("q4_1", &blocks(n, 20, 2, 3)),
        ]
    }

    #[test]
    fn products_equal_the_dense_product_bit_for_bit_in_every_format_and_row_count() {
        let (rows, columns) = (150, 320);
        for (format, matrix) in every_format(rows, columns) {
            let w = rows_of(&matrix);
            for m in [1, 2, 3, 4, 5, 6, 7, 8, 13] {
                let x = values(m * columns, m as u32);
                let (mut got, mut want) = (vec![1.0; m * rows], vec![0.0; m * rows]);
                matrix.multiply(&x, &mut got);
                let a = View::rows(Elems::F32(&x), columns);
                gemm(m, rows, columns, a, View::transposed(Elems::F32(&w), columns), &mut want, false);
                assert_eq!(got, want, "{format}, {m} rows");
            }
        }
    }

    #[test]
    fn backward_products_equal_the_dense_ones_bit_for_bit() {
        let (rows, columns, m) = (1030, 64, 5);
        for (format, matrix) in every_format(rows, columns) {
            let (w, dy) = (rows_of(&matrix), values(m * rows, 77));
            let (mut got, mut want) = (vec![0.0; m * columns], vec![0.0; m * columns]);
            matrix.multiply_transposed(&dy, &mut got);
            let a = View::rows(Elems::F32(&dy), rows);
            gemm(m, columns, rows, a, View::rows(Elems::F32(&w), columns), &mut want, false);
            assert_eq!(got, want, "{format}");
        }
    }

    #[test]
    fn decoding_follows_the_block_formats() {
        let bytes = blocks(1, 18, 1, 5);
        let matrix = PackedMatrix::from_format(1, 32, "q4_0", &bytes).unwrap();
        let d = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        let want: Vec<f32> = (0..32).map(|i| d * (nibble(&bytes[2..], i) as f32 - 8.0)).collect();
        assert_eq!(rows_of(&matrix), want);
    }

    #[test]
    fn odd_widths_and_short_buffers_are_refused() {
        assert!(PackedMatrix::from_format(2, 33, "q8_0", &[0; 70]).is_none());
        assert!(PackedMatrix::from_format(2, 32, "q8_0", &[0; 67]).is_none());
        assert!(PackedMatrix::from_format(2, 32, "q6_k", &[0; 70]).is_none());
    }

    #[test]
    fn predicted_bytes_are_held_bytes() {
        for (format, matrix) in every_format(150, 320) {
            assert_eq!(PackedMatrix::bytes_for(150, 320, format), matrix.bytes(), "{format}");
        }
    }
}
