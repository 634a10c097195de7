//! The ops on Burn's CPU backend: tensors → slices, without copies where they are contiguous f32.

use crate::cpu::activation::{self, Activation};
use crate::cpu::attention::{AttentionSpec, SequenceRows};
use crate::cpu::attention_backward::{Gradients, Inputs, Shape, attend_backward};
use crate::cpu::attention_paged::{Blocks, Scratch, attend};
use crate::cpu::gemm;
use crate::cpu::gemm::{Elems, View};
use crate::cpu::kv::{KV_BLOCK, KvLayout};
use crate::cpu::layer_norm;
use crate::cpu::loss::{HeadWeights, Problem, cross_entropy};
use crate::cpu::packed::PackedMatrix;
use crate::cpu::pointwise;
use crate::cpu::rope::{RotaryTable, rope};
use crate::cpu::stored::{Stored, narrowed, widened};
use crate::ops::FusedOps;
use burn::backend::Flex;
use burn::tensor::{Bytes, DType};
use burn_flex::{FlexTensor, Layout};
use half::{bf16, f16};
use std::borrow::Cow;
use std::sync::Arc;

/// A contiguous view of a float tensor's elements.
fn elems(x: &FlexTensor) -> Elems<'_> {
    match x.dtype() {
        DType::F32 => Elems::F32(x.as_slice().expect("contiguous f32")),
        DType::BF16 => Elems::Bf16(x.as_slice().expect("contiguous bf16")),
        DType::F16 => Elems::F16(x.as_slice().expect("contiguous f16")),
        other => panic!("fused ops take f32, bf16 or f16 tensors, not {other:?}"),
    }
}

/// The elements as f32: borrowed, or widened.
fn floats(x: &FlexTensor) -> Cow<'_, [f32]> {
    match elems(x) {
        Elems::F32(x) => Cow::Borrowed(x),
        Elems::Bf16(x) => Cow::Owned(widened(x)),
        Elems::F16(x) => Cow::Owned(widened(x)),
    }
}

/// A tensor of `dtype` from f32 results, rounded to nearest even.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], dtype: DType) -> FlexTensor {
    let bytes = match dtype {
        DType::BF16 => Bytes::from_elems(narrowed::<bf16>(&values)),
        DType::F16 => Bytes::from_elems(narrowed::<f16>(&values)),
        _ => Bytes::from_elems(values),
    };
    FlexTensor::new(bytes, Layout::contiguous(shape.into()), dtype)
}

/// Precision of the loss's gradients before they meet the upstream gradient: in f16 that is the loss scale, which must
/// come before rounding.
fn unscaled(dtype: DType) -> DType {
    if dtype == DType::F16 { DType::F32 } else { dtype }
}

fn dims<const D: usize>(x: &FlexTensor) -> [usize; D] {
    let shape = x.layout().shape();
    std::array::from_fn(|i| shape[i])
}

/// `[rows, columns]` of a product's result from `a`'s rows and `b`'s.
fn product(m: usize, n: usize, k: usize, a: View, b: View, dtype: DType) -> FlexTensor {
    let bytes = match dtype {
        DType::BF16 => Bytes::from_elems(gemm::product_as::<bf16>(m, n, k, a, b)),
        DType::F16 => Bytes::from_elems(gemm::product_as::<f16>(m, n, k, a, b)),
        _ => Bytes::from_elems(gemm::product(m, n, k, a, b)),
    };
    FlexTensor::new(bytes, Layout::contiguous([m, n].into()), dtype)
}

/// Identity block tables for documents laid out one after another, and the number of blocks.
fn document_rows(documents: &[usize]) -> (Vec<SequenceRows>, usize) {
    let (mut row, mut block) = (0, 0);
    let rows = documents.iter().map(|&len| {
        let blocks = len.div_ceil(KV_BLOCK);
        let table = (block as u32..(block + blocks) as u32).collect();
        let sequence = SequenceRows { rows: row..row + len, first_position: 0, table };
        (row, block) = (row + len, block + blocks);
        sequence
    });
    let rows = rows.collect();
    (rows, block)
}

impl FusedOps for Flex {
    fn rms_norm(x: FlexTensor, w: FlexTensor, eps: f32) -> FlexTensor {
        let (x, w) = (x.to_contiguous(), w.to_contiguous());
        let y = pointwise::rms_norm(&floats(&x), &floats(&w), eps);
        tensor(y, dims::<2>(&x), x.dtype())
    }

    fn rms_norm_backward(x: FlexTensor, w: FlexTensor, eps: f32, dy: FlexTensor) -> (FlexTensor, FlexTensor) {
        let (x, w, dy) = (x.to_contiguous(), w.to_contiguous(), dy.to_contiguous());
        let [d] = dims(&w);
        let (dx, dw) = pointwise::rms_norm_backward(&floats(&x), &floats(&w), eps, &floats(&dy));
        (tensor(dx, dims::<2>(&x), x.dtype()), tensor(dw, [d], w.dtype()))
    }

    fn layer_normalize(x: FlexTensor, w: FlexTensor, b: FlexTensor, eps: f32) -> FlexTensor {
        let (x, w, b) = (x.to_contiguous(), w.to_contiguous(), b.to_contiguous());
        let y = layer_norm::layer_norm(&floats(&x), &floats(&w), &floats(&b), eps);
        tensor(y, dims::<2>(&x), x.dtype())
    }

    fn layer_normalize_backward(
        x: FlexTensor,
        w: FlexTensor,
        eps: f32,
        dy: FlexTensor,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let (x, w, dy) = (x.to_contiguous(), w.to_contiguous(), dy.to_contiguous());
        let [d] = dims(&w);
        let (dx, dw, db) = layer_norm::layer_norm_backward(&floats(&x), &floats(&w), eps, &floats(&dy));
        let vector = |values| tensor(values, [d], w.dtype());
        (tensor(dx, dims::<2>(&x), x.dtype()), vector(dw), vector(db))
    }

    fn project(x: FlexTensor, w: FlexTensor) -> FlexTensor {
        let (x, w) = (x.to_contiguous(), w.to_contiguous());
        let ([m, k], [n, _]) = (dims(&x), dims::<2>(&w));
        product(m, n, k, View::rows(elems(&x), k), View::transposed(elems(&w), k), x.dtype())
    }

    fn project_backward_x(w: FlexTensor, dy: FlexTensor) -> FlexTensor {
        let (w, dy) = (w.to_contiguous(), dy.to_contiguous());
        let ([m, n], [_, k]) = (dims(&dy), dims::<2>(&w));
        product(m, k, n, View::rows(elems(&dy), n), View::rows(elems(&w), k), dy.dtype())
    }

    fn project_backward_w(x: FlexTensor, dy: FlexTensor) -> FlexTensor {
        let (x, dy) = (x.to_contiguous(), dy.to_contiguous());
        let ([m, k], [_, n]) = (dims(&x), dims::<2>(&dy));
        product(n, k, m, View::transposed(elems(&dy), n), View::rows(elems(&x), k), x.dtype())
    }

    fn project_packed(x: FlexTensor, w: Arc<PackedMatrix>) -> FlexTensor {
        let x = x.to_contiguous();
        let [m, _] = dims(&x);
        let mut y = vec![0.0; m * w.rows()];
        w.multiply(&floats(&x), &mut y);
        tensor(y, [m, w.rows()], x.dtype())
    }

    fn project_packed_backward(dy: FlexTensor, w: Arc<PackedMatrix>) -> FlexTensor {
        let dy = dy.to_contiguous();
        let [m, _] = dims(&dy);
        let mut dx = vec![0.0; m * w.columns()];
        w.multiply_transposed(&floats(&dy), &mut dx);
        tensor(dx, [m, w.columns()], dy.dtype())
    }

    fn rope(x: FlexTensor, table: Arc<RotaryTable>, inverse: bool) -> FlexTensor {
        let x = x.to_contiguous();
        let [rows, heads, d] = dims(&x);
        let y = rope(&floats(&x), heads, &table, inverse);
        tensor(y, [rows, heads, d], x.dtype())
    }

    fn activate(x: FlexTensor, activation: Activation) -> FlexTensor {
        let x = x.to_contiguous();
        tensor(activation::activate(activation, &floats(&x)), dims::<2>(&x), x.dtype())
    }

    fn activate_backward(x: FlexTensor, activation: Activation, dy: FlexTensor) -> FlexTensor {
        let (x, dy) = (x.to_contiguous(), dy.to_contiguous());
        let dx = activation::activate_backward(activation, &floats(&x), &floats(&dy));
        tensor(dx, dims::<2>(&x), x.dtype())
    }

    fn gated(gate: FlexTensor, up: FlexTensor, activation: Activation) -> FlexTensor {
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        let y = activation::gated(activation, &floats(&gate), &floats(&up));
        tensor(y, dims::<2>(&gate), gate.dtype())
    }

    fn gated_backward(
        gate: FlexTensor,
        up: FlexTensor,
        activation: Activation,
        dy: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (gate, up, dy) = (gate.to_contiguous(), up.to_contiguous(), dy.to_contiguous());
        let (dgate, dup) = activation::gated_backward(activation, &floats(&gate), &floats(&up), &floats(&dy));
        let shape = dims::<2>(&gate);
        (tensor(dgate, shape, gate.dtype()), tensor(dup, shape, up.dtype()))
    }

    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        documents: Arc<[usize]>,
        spec: AttentionSpec,
    ) -> FlexTensor {
        let (q, k, v) = (q.to_contiguous(), k.to_contiguous(), v.to_contiguous());
        let ([rows, heads, d], [_, kv_heads, _]) = (dims(&q), dims::<3>(&k));
        let layout = KvLayout { kv_heads, head_dim: d };
        let (sequences, blocks) = document_rows(&documents);
        let mut cache = vec![0.0; blocks * layout.block_len()];
        let (ks, vs) = (floats(&k), floats(&v));
        for s in &sequences {
            let range = s.rows.start * kv_heads * d..s.rows.end * kv_heads * d;
            layout.write(&mut cache, &s.table, 0, &ks[range.clone()], &vs[range]);
        }
        let mut y = vec![0.0; rows * heads * d];
        let mut scratch = Scratch::default();
        let kv = Blocks { layout, data: &cache, scales: &[] };
        attend(kv, &sequences, &floats(&q), heads, spec, &mut scratch, &mut y);
        tensor(y, [rows, heads, d], q.dtype())
    }

    fn causal_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        documents: Arc<[usize]>,
        spec: AttentionSpec,
        dy: FlexTensor,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let (q, k, v, dy) = (q.to_contiguous(), k.to_contiguous(), v.to_contiguous(), dy.to_contiguous());
        let ([rows, heads, d], [_, kv_heads, _]) = (dims(&q), dims::<3>(&k));
        let shape = Shape { heads, layout: KvLayout { kv_heads, head_dim: d } };
        let (mut dq, mut dk) = (vec![0.0; rows * heads * d], vec![0.0; rows * kv_heads * d]);
        let mut dv = dk.clone();
        let inputs = Inputs { q: &floats(&q), k: &floats(&k), v: &floats(&v), dy: &floats(&dy) };
        let gradients = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        attend_backward(shape, &documents, spec, inputs, gradients);
        let kv = [rows, kv_heads, d];
        (tensor(dq, [rows, heads, d], q.dtype()), tensor(dk, kv, k.dtype()), tensor(dv, kv, v.dtype()))
    }

    fn linear_cross_entropy(h: FlexTensor, w: FlexTensor, targets: Arc<[i32]>) -> FlexTensor {
        let (h, w) = (h.to_contiguous(), w.to_contiguous());
        let [vocab, d] = dims(&w);
        let weights = HeadWeights::Dense(elems(&w));
        let problem = Problem { h: &floats(&h), w: weights, vocab, d, targets: &targets };
        tensor(vec![cross_entropy(problem, None, None) as f32], [1], DType::F32)
    }

    fn linear_cross_entropy_with_grads(
        h: FlexTensor,
        w: FlexTensor,
        targets: Arc<[i32]>,
        with_dw: bool,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let (h, w) = (h.to_contiguous(), w.to_contiguous());
        let ([rows, d], [vocab, _]) = (dims(&h), dims::<2>(&w));
        let weights = HeadWeights::Dense(elems(&w));
        let problem = Problem { h: &floats(&h), w: weights, vocab, d, targets: &targets };
        let mut dh = vec![0.0; rows * d];
        let mut dw = Vec::new();
        let loss = cross_entropy(problem, Some(&mut dh), with_dw.then_some(&mut dw));
        let dw_shape = if with_dw { [vocab, d] } else { [0, d] };
        (
            tensor(vec![loss as f32], [1], DType::F32),
            tensor(dh, [rows, d], unscaled(h.dtype())),
            tensor(dw, dw_shape, unscaled(w.dtype())),
        )
    }

    fn linear_cross_entropy_packed(h: FlexTensor, w: Arc<PackedMatrix>, targets: Arc<[i32]>) -> FlexTensor {
        let h = h.to_contiguous();
        let loss = cross_entropy(packed_problem(&floats(&h), &w, &targets), None, None);
        tensor(vec![loss as f32], [1], DType::F32)
    }

    fn linear_cross_entropy_packed_with_grads(
        h: FlexTensor,
        w: Arc<PackedMatrix>,
        targets: Arc<[i32]>,
    ) -> (FlexTensor, FlexTensor) {
        let h = h.to_contiguous();
        let [rows, d] = dims(&h);
        let mut dh = vec![0.0; rows * d];
        let loss = cross_entropy(packed_problem(&floats(&h), &w, &targets), Some(&mut dh), None);
        (tensor(vec![loss as f32], [1], DType::F32), tensor(dh, [rows, d], unscaled(h.dtype())))
    }

    fn gather_rows(w: FlexTensor, ids: Arc<[u32]>) -> FlexTensor {
        let w = w.to_contiguous();
        let [_, d] = dims(&w);
        let mut y = vec![0.0; ids.len() * d];
        for (y, &id) in y.chunks_exact_mut(d).zip(ids.iter()) {
            match elems(&w) {
                Elems::F32(w) => y.copy_from_slice(&w[id as usize * d..][..d]),
                Elems::Bf16(w) => bf16::widen_block(&w[id as usize * d..][..d], y),
                Elems::F16(w) => f16::widen_block(&w[id as usize * d..][..d], y),
            }
        }
        tensor(y, [ids.len(), d], w.dtype())
    }

    fn scatter_rows(dy: FlexTensor, ids: Arc<[u32]>, vocab: usize) -> FlexTensor {
        let dy = dy.to_contiguous();
        let [_, d] = dims(&dy);
        let mut dw = vec![0.0; vocab * d];
        pointwise::embedding_backward(&floats(&dy), &ids, d, &mut dw);
        tensor(dw, [vocab, d], dy.dtype())
    }

    fn dropout(x: FlexTensor, p: f32, key: u64) -> FlexTensor {
        let x = x.to_contiguous();
        let [rows, columns] = dims(&x);
        let mut y = vec![0.0; rows * columns];
        pointwise::dropout(&floats(&x), columns, p, key, &mut y);
        tensor(y, [rows, columns], x.dtype())
    }
}

/// The loss problem of a packed head.
fn packed_problem<'a>(h: &'a [f32], w: &'a PackedMatrix, targets: &'a [i32]) -> Problem<'a> {
    Problem { h, w: HeadWeights::Packed(w), vocab: w.rows(), d: w.columns(), targets }
}
