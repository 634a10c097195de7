//! Attention over packed documents and through the paged cache.

use super::values::{Number, close, near, numbers, same, wide};
use super::{Failure, On};
use half::{bf16, f16};
use hearth_cuda::ops::attention::{self as ops, Inputs, Shape, Upstream, tiles_of};
use hearth_cuda::ops::paged::{
    self, Cache, CacheElement, Query, Stretch, attention_paged, attention_prompt, write_kv,
};
use hearth_kernels::cpu::attention::{AttentionSpec, SequenceRows, attend};
use hearth_kernels::cpu::attention_backward::{self as backward, attend_backward};
use hearth_kernels::cpu::kv::{KV_BLOCK, KvLayout};
use std::sync::Arc;

pub fn packed(on: &On) -> Result<(), Failure> {
    for d in [24, 72] {
        documents::<f32>(on, d)?;
        documents::<bf16>(on, d)?;
        documents::<f16>(on, d)?;
    }
    Ok(())
}

/// The CPU's attention, a document after another. `k` and `v` as they are after the cache's rounding.
fn on_cpu(
    documents: &[usize],
    layout: KvLayout,
    heads: usize,
    spec: AttentionSpec,
    [q, k, v]: [&[f32]; 3],
) -> Vec<f32> {
    let (width, mut row, mut block) = (layout.kv_heads * layout.head_dim, 0, 0);
    let blocks: usize = documents.iter().map(|len| len.div_ceil(KV_BLOCK)).sum();
    let (mut data, mut sequences) = (vec![0.0; blocks * layout.block_len()], Vec::new());
    for &len in documents {
        let table: Arc<[u32]> = (block..block + len.div_ceil(KV_BLOCK)).map(|b| b as u32).collect();
        let part = row * width..(row + len) * width;
        layout.write(&mut data, &table, 0, &k[part.clone()], &v[part]);
        block += table.len();
        sequences.push(SequenceRows { rows: row..row + len, first_position: 0, table });
        row += len;
    }
    let mut y = vec![0.0; q.len()];
    attend(layout, &data, &sequences, q, heads, spec, &mut y);
    y
}

fn documents<T: Number>(on: &On, d: usize) -> Result<(), Failure> {
    let (lengths, heads, kv_heads, window) = ([5, 70], 2, 1, 40);
    let rows = lengths.iter().sum();
    let scale = (d as f32).powf(-0.5);
    let shape = Shape { rows, heads, kv_heads, d, scale, window };
    let (q_len, kv_len) = (rows * heads * d, rows * kv_heads * d);
    let (q, k, v) = (numbers::<T>(1, q_len), numbers::<T>(2, kv_len), numbers::<T>(3, kv_len));
    let dy = numbers::<T>(4, q_len);
    let (on_q, on_k, on_v, on_dy) = (on.up(&q)?, on.up(&k)?, on.up(&v)?, on.up(&dy)?);
    let tiles = on.up(&tiles_of(&lengths))?;
    let x = Inputs { q: on_q.all(), k: on_k.all(), v: on_v.all(), tiles: tiles.all() };
    let (mut y, mut logs) = (on.room::<T>(q_len)?, on.room::<f32>(rows * heads)?);
    ops::attention(&on.stream, x, shape, y.all_mut(), logs.all_mut())?;
    let (q, k, v, dy) = (wide(&q), wide(&k), wide(&v), wide(&dy));
    let layout = KvLayout { kv_heads, head_dim: d };
    let spec = AttentionSpec { scale, window: Some(window) };
    close("y", &on.down(&y)?, &on_cpu(&lengths, layout, heads, spec, [&q, &k, &v]))?;
    let (mut dq, mut dk, mut dv) = (on.room::<T>(q_len)?, on.room::<T>(kv_len)?, on.room::<T>(kv_len)?);
    let mut deltas = on.room::<f32>(rows * heads)?;
    let up = Upstream { y: y.all(), logs: logs.all(), dy: on_dy.all(), deltas: deltas.all_mut() };
    ops::attention_backward(&on.stream, x, up, shape, dq.all_mut(), (dk.all_mut(), dv.all_mut()))?;
    let (mut want_q, mut want_k, mut want_v) = (vec![0.0; q_len], vec![0.0; kv_len], vec![0.0; kv_len]);
    let inputs = backward::Inputs { q: &q, k: &k, v: &v, dy: &dy };
    let gradients = backward::Gradients { dq: &mut want_q, dk: &mut want_k, dv: &mut want_v };
    attend_backward(backward::Shape { heads, layout }, &lengths, spec, inputs, gradients);
    close("dq", &on.down(&dq)?, &want_q)?;
    close("dk", &on.down(&dk)?, &want_k)?;
    close("dv", &on.down(&dv)?, &want_v)
}

/// A type of cache and what it makes of a vector.
trait Stored: CacheElement + super::values::Plain {
    fn rounded(vector: &[f32]) -> Vec<f32>;
}
impl Stored for f32 {
    fn rounded(vector: &[f32]) -> Vec<f32> {
        vector.to_vec()
    }
}
impl Stored for f16 {
    fn rounded(vector: &[f32]) -> Vec<f32> {
        vector.iter().map(|&x| f16::from_f32(x).to_f32()).collect()
    }
}
impl Stored for bf16 {
    fn rounded(vector: &[f32]) -> Vec<f32> {
        vector.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
    }
}
impl Stored for i8 {
    fn rounded(vector: &[f32]) -> Vec<f32> {
        let most = vector.iter().fold(0f32, |most, x| most.max(x.abs()));
        vector.iter().map(|&x| (x * (127.0 / most)).round_ties_even() * (most / 127.0)).collect()
    }
}

pub fn paged(on: &On) -> Result<(), Failure> {
    for (group, d) in [(2, 48), (3, 80), (2, 136), (6, 48), (6, 80)] {
        decoded::<f32>(on, group, d)?;
        decoded::<f16>(on, group, d)?;
        decoded::<bf16>(on, group, d)?;
        decoded::<i8>(on, group, d)?;
    }
    Ok(())
}

/// A sequence written to the cache at once and its last rows attended, on both sides of the first split: one by one and as a
/// piece of a prompt.
fn decoded<T: Stored>(on: &On, group: usize, d: usize) -> Result<(), Failure> {
    let (kv_heads, length, context, first) = (1, 259, 512, 254);
    let heads = kv_heads * group;
    let shape = paged::Shape { heads, kv_heads, d, scale: (d as f32).powf(-0.5), window: 0 };
    let (k, v) = (numbers::<f32>(1, length * kv_heads * d), numbers::<f32>(2, length * kv_heads * d));
    let q = numbers::<f32>(3, length * heads * d);
    let blocks = length.div_ceil(KV_BLOCK);
    let tables: Vec<u32> = (0..blocks as u32).rev().collect();
    let queries: Vec<Query> = (0..length as u32).map(|position| Query { position, table: 0 }).collect();
    let mut data = on.room::<T>(blocks * shape.block_len())?;
    let mut scales = on.room::<f32>(blocks * shape.block_scales())?;
    let mut cache = Cache { data: data.all_mut(), scales: T::SCALED.then(|| scales.all_mut()) };
    let (on_k, on_v) = (on.up(&k)?, on.up(&v)?);
    let (on_queries, on_tables) = (on.up(&queries)?, on.up(&tables)?);
    let all = paged::Rows { queries: on_queries.all(), tables: on_tables.all() };
    write_kv(&on.stream, on_k.all(), on_v.all(), all, shape, &mut cache)?;
    let rows = length - first;
    let (on_q, on_picked) = (on.up(&q[first * heads * d..])?, on.up(&queries[first..])?);
    let (mut y, mut parts) =
        (on.room::<f32>(rows * heads * d)?, on.room::<f32>(shape.parts_len(rows, context))?);
    let picked = paged::Rows { queries: on_picked.all(), tables: on_tables.all() };
    let into = (parts.all_mut(), y.all_mut());
    attention_paged(&on.stream, on_q.all(), picked, shape, &mut cache, context, into)?;
    let round = |x: &[f32]| -> Vec<f32> { x.chunks(d).flat_map(T::rounded).collect() };
    let layout = KvLayout { kv_heads, head_dim: d };
    let spec = AttentionSpec { scale: shape.scale, window: None };
    let want = on_cpu(&[length], layout, heads, spec, [&q, &round(&k), &round(&v)]);
    let what = format!("{group} heads of {d} over a cache of {}", T::NAME);
    let alone = on.down(&y)?;
    near(&what, &alone, &want[first * heads * d..], 2e-5)?;
    let stretch = |number: usize| Stretch {
        row: 0,
        rows: rows as u32,
        position: first as u32,
        table: 0,
        first: (number * shape.queries_at_once()) as u32,
    };
    let stretches: Vec<Stretch> = (0..shape.stretches(rows)).map(stretch).collect();
    let (on_stretches, mut y) = (on.up(&stretches)?, on.room::<f32>(rows * heads * d)?);
    let stretches = (on_stretches.all(), on_tables.all());
    attention_prompt(&on.stream, on_q.all(), stretches, shape, &mut cache, y.all_mut())?;
    same(&format!("{what}, as a prompt"), &on.down(&y)?, &alone)
}
