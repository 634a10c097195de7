//! Fused ops on Burn tensors: one arithmetic for training and inference.
//!
//! # Layout
//! - this file: the ops as functions of [`Tensor`]s.
//! - [`ops`]: the backend extension trait behind them; `autodiff`: hand-written backward passes; `flex`: the
//!   CPU backend, calling the slice kernels; `composed`: every op of Burn's primitives, the plain reference.
//! - [`paged`]: the KV cache and attention through it, for inference.
//! - [`cpu`]: kernels on plain slices, each compiled for every instruction set from one source.
//!
//! # Invariants
//! Every output element is reduced in one fixed order that depends on the op's own dimensions only: never on
//! the number of rows, the rows beside it, threads, tiles, chunks of a prompt or documents in a pack. The orders:
//! - matrix products: one chain of fused multiply-adds over ascending `k` ([`cpu::gemm`]);
//! - sums over a row: 16 lanes, then a fixed tree ([`cpu::simd`]);
//! - attention: scores by a chain over the head dimension, softmax over tiles of 16 keys counted from the
//!   document's start, outputs by a chain over ascending keys ([`cpu::attention`]).

pub mod cpu;
pub mod ops;
pub mod paged;

mod autodiff;
mod composed;
#[cfg(feature = "cuda")]
pub mod cuda;
mod flex;

use burn::backend::Dispatch;
use burn::tensor::Tensor;
pub use cpu::activation::Activation;
pub use cpu::attention::AttentionSpec;
pub use cpu::packed::{Activations, PackedMatrix};
pub use cpu::rope::RotaryTable;
use ops::FusedOps;
use std::sync::Arc;

/// RMSNorm over the last axis: `y = x / sqrt(mean(x²) + eps) · w`. `x`: `[rows, d]`, `w`: `[d]`.
pub fn rms_norm(x: Tensor<2>, w: Tensor<1>, eps: f32) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), w.into_dispatch(), eps))
}

/// LayerNorm over the last axis: `y = (x − mean(x)) / sqrt(variance(x) + eps) · w + b`. `x`: `[rows, d]`; `w`, `b`: `[d]`.
pub fn layer_norm(x: Tensor<2>, w: Tensor<1>, b: Tensor<1>, eps: f32) -> Tensor<2> {
    let (x, w, b) = (x.into_dispatch(), w.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(Dispatch::layer_normalize(x, w, b, eps))
}

/// `y = x·wᵀ`. `x`: `[rows, in]`, `w`: `[out, in]` → `[rows, out]`.
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::project(x.into_dispatch(), w.into_dispatch()))
}

/// [`linear`] with a frozen matrix in panel layout, dense or quantized. Differentiable in `x`.
pub fn linear_packed(x: Tensor<2>, w: Arc<PackedMatrix>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::project_packed(x.into_dispatch(), w))
}

/// Rotary position embedding of each head. `x`: `[rows, heads, head_dim]`; the table has a line per row.
/// Dimension `i` is paired with `i + head_dim/2` (the Hugging Face layout).
pub fn rope(x: Tensor<3>, table: Arc<RotaryTable>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::rope(x.into_dispatch(), table, false))
}

/// `f(x)`, elementwise. `x`: `[rows, inner]`.
pub fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::activate(x.into_dispatch(), activation))
}

/// `f(gate) · up`, elementwise (arXiv 2002.05202). Both `[rows, inner]`.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), activation))
}

/// [`linear`] of [`gated`]: `(f(gate) · up)·wᵀ`, with the same bits. The backward pass computes the gated values again
/// instead of keeping them: a sixth of a transformer block's activations for some percent of an elementwise op. `gate`,
/// `up`: `[rows, inner]`, `w`: `[out, inner]` → `[rows, out]`.
pub fn gated_linear(gate: Tensor<2>, up: Tensor<2>, w: Tensor<2>, activation: Activation) -> Tensor<2> {
    let (gate, up, w) = (gate.into_dispatch(), up.into_dispatch(), w.into_dispatch());
    Tensor::from_dispatch(Dispatch::gated_project(gate, up, w, activation))
}

/// Causal attention within each document, grouped queries. `q`: `[rows, heads, head_dim]`, `k` and `v`:
/// `[rows, kv_heads, head_dim]` → `[rows, heads, head_dim]`. `documents` holds the documents' lengths; they sum
/// to `rows`. Memory: one row of scores per query in flight, never rows × rows.
pub fn attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    documents: Arc<[usize]>,
    spec: AttentionSpec,
) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::causal_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        documents,
        spec,
    ))
}

/// Sum over rows of `−log softmax(h·wᵀ)[target]`; rows with a negative target count nothing. `h`: `[rows, d]`,
/// `w`: `[vocab, d]` → `[1]`. Logits are made a few rows at a time and never kept.
pub fn linear_cross_entropy(h: Tensor<2>, w: Tensor<2>, targets: Arc<[i32]>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::linear_cross_entropy(h.into_dispatch(), w.into_dispatch(), targets))
}

/// [`linear_cross_entropy`] with a frozen packed head. Differentiable in `h`.
pub fn linear_cross_entropy_packed(h: Tensor<2>, w: Arc<PackedMatrix>, targets: Arc<[i32]>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::linear_cross_entropy_packed(h.into_dispatch(), w, targets))
}

/// Rows `ids` of `w`: `[vocab, d]` → `[ids, d]`.
pub fn embedding(w: Tensor<2>, ids: Arc<[u32]>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::gather_rows(w.into_dispatch(), ids))
}

/// Inverted dropout with a counter-based mask: element `(r, c)` is kept, scaled by `1/(1−p)`, when
/// `hash(key, r, c) ≥ p`. Equal keys give equal masks, so recomputation needs no saved state.
pub fn dropout(x: Tensor<2>, p: f32, key: u64) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::dropout(x.into_dispatch(), p, key))
}
