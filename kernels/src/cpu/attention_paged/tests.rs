use super::*;
use crate::cpu::attention;
use crate::cpu::simd::Level;
use crate::cpu::simd::limit;
use half::f16;

const SHAPES: [(usize, usize, usize); 5] = [(9, 3, 64), (4, 4, 16), (8, 1, 24), (5, 1, 32), (20, 2, 48)];

fn wave(n: usize, f: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * f).sin()).collect()
}

fn plain<T>(layout: KvLayout, data: &[T]) -> Blocks<'_, T> {
    Blocks { layout, data, scales: &[] }
}

/// One row each of many sequences, a prompt, and a row that ends a long sequence.
fn batches(blocks: usize) -> Vec<Vec<SequenceRows>> {
    let table: std::sync::Arc<[u32]> = (0..blocks as u32).rev().collect();
    let one = |row: usize, position: usize| SequenceRows {
        rows: row..row + 1,
        first_position: position,
        table: table.clone(),
    };
    let decode = |positions: &[usize]| positions.iter().enumerate().map(|(i, p)| one(i, *p)).collect();
    let prompt = SequenceRows { rows: 0..150, first_position: 37, table: table.clone() };
    // Enough of them to fill the shared scores more than once, too.
    vec![decode(&[0, 15, 16, 300, 777].repeat(20)), vec![prompt, one(150, 700)], decode(&[900])]
}

#[test]
fn rows_cut_for_inference_have_the_bits_of_the_plain_attention() {
    for (heads, kv_heads, head_dim) in SHAPES {
        let layout = KvLayout { kv_heads, head_dim };
        let data = wave(60 * layout.block_len(), 0.37);
        for sequences in batches(60) {
            let rows: usize = sequences.iter().map(|s| s.rows.len()).sum();
            let q = wave(rows * heads * head_dim, 0.11);
            for window in [None, Some(100)] {
                let spec = AttentionSpec { scale: 0.2, window };
                let (mut got, mut want) = (vec![0.0; q.len()], vec![1.0; q.len()]);
                attend(plain(layout, &data), &sequences, &q, heads, spec, &mut Scratch::default(), &mut got);
                attention::attend(layout, &data, &sequences, &q, heads, spec, &mut want);
                assert_eq!(got, want, "{heads} {kv_heads} {head_dim} {window:?} {rows}");
            }
        }
    }
}

#[test]
fn a_cache_of_halves_gives_the_bits_of_its_widened_numbers_in_every_instruction_set() {
    for (heads, kv_heads, head_dim) in SHAPES {
        let layout = KvLayout { kv_heads, head_dim };
        let halves: Vec<f16> = wave(60 * layout.block_len(), 0.37).into_iter().map(f16::from_f32).collect();
        let wide: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
        for sequences in batches(60) {
            let rows: usize = sequences.iter().map(|s| s.rows.len()).sum();
            let q = wave(rows * heads * head_dim, 0.11);
            let spec = AttentionSpec { scale: 0.2, window: None };
            let mut want = vec![1.0; q.len()];
            attend(plain(layout, &wide), &sequences, &q, heads, spec, &mut Scratch::default(), &mut want);
            for level in Level::present() {
                limit(Some(level));
                let mut got = vec![0.0; q.len()];
                attend(
                    plain(layout, &halves),
                    &sequences,
                    &q,
                    heads,
                    spec,
                    &mut Scratch::default(),
                    &mut got,
                );
                assert_eq!(got, want, "{heads} {kv_heads} {head_dim} {level:?}");
            }
            limit(None);
        }
    }
}

#[test]
fn a_cache_of_bytes_gives_the_bits_of_its_scaled_numbers_in_every_instruction_set() {
    for (heads, kv_heads, head_dim) in SHAPES {
        let layout = KvLayout { kv_heads, head_dim };
        let bytes: Vec<i8> =
            wave(60 * layout.block_len(), 0.37).into_iter().map(|x| i8::narrow(x * 127.0)).collect();
        // With powers of two it makes no difference where a scale is multiplied with.
        let scale = |i: usize| [0.5, 2.0, 1.0, 0.125][i % 4];
        let scales: Vec<f32> = (0..60 * layout.scales_len()).map(scale).collect();
        let mut wide: Vec<f32> = bytes.iter().map(|q| q.widen()).collect();
        for (tile, scales) in wide.chunks_exact_mut(layout.tile_len()).zip(scales.chunks_exact(2 * KV_BLOCK))
        {
            let (keys, values) = tile.split_at_mut(KV_BLOCK * head_dim);
            keys.iter_mut().enumerate().for_each(|(i, k)| *k *= scales[i % KV_BLOCK]);
            let token = |i: usize| KV_BLOCK + i / layout.padded();
            values.iter_mut().enumerate().for_each(|(i, v)| *v *= scales[token(i)]);
        }
        for sequences in batches(60) {
            let rows: usize = sequences.iter().map(|s| s.rows.len()).sum();
            let q = wave(rows * heads * head_dim, 0.11);
            let spec = AttentionSpec { scale: 0.2, window: None };
            let mut want = vec![1.0; q.len()];
            attend(plain(layout, &wide), &sequences, &q, heads, spec, &mut Scratch::default(), &mut want);
            for level in Level::present() {
                limit(Some(level));
                let mut got = vec![0.0; q.len()];
                let kv = Blocks { layout, data: &bytes, scales: &scales };
                attend(kv, &sequences, &q, heads, spec, &mut Scratch::default(), &mut got);
                assert_eq!(got, want, "{heads} {kv_heads} {head_dim} {level:?}");
            }
            limit(None);
        }
    }
}

#[test]
fn what_a_row_does_not_see_may_be_anything() {
    let layout = KvLayout { kv_heads: 1, head_dim: 32 };
    let mut data = wave(4 * layout.block_len(), 0.3);
    let sequences = [SequenceRows { rows: 0..3, first_position: 20, table: [2, 1].into() }];
    let q = wave(3 * 64, 0.1);
    let spec = AttentionSpec { scale: 0.2, window: Some(9) };
    let run = |data: &[f32]| {
        let mut out = vec![0.0; q.len()];
        attend(plain(layout, data), &sequences, &q, 2, spec, &mut Scratch::default(), &mut out);
        out
    };
    let want = run(&data);
    for position in (0..12).chain(23..32) {
        let (block, slot) = ([2, 1][position / 16], position % 16);
        let values = block * layout.block_len() + 16 * 32 + slot * layout.padded();
        data[values..values + 32].fill(f32::NAN);
    }
    assert_eq!(run(&data), want);
}
