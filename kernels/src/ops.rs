//! The backend extension trait behind the ops of this crate.
//!
//! Shapes and meanings stand at the functions in [the crate root](crate). `*_backward` take the upstream
//! gradient last and return the inputs' gradients in the inputs' order. The default bodies are the composed
//! reference; a backend overrides what it has kernels for.

use crate::composed;
use crate::cpu::activation::Activation;
use crate::cpu::attention::AttentionSpec;
use crate::cpu::packed::PackedMatrix;
use crate::cpu::rope::RotaryTable;
use burn::backend::{Backend, backend_extension, tensor::FloatTensor};
use std::sync::Arc;

/// Fused ops a backend provides.
#[allow(missing_docs, reason = "documented once, at the functions of the crate root")]
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "cuda"))]
pub trait FusedOps: Backend {
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        composed::rms_norm::<Self>(x, w, eps)
    }

    fn rms_norm_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::rms_norm_backward::<Self>(x, w, eps, dy)
    }

    fn layer_normalize(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        composed::layer_norm::<Self>(x, w, b, eps)
    }

    /// `(dx, dw, db)`.
    fn layer_normalize_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::layer_norm_backward::<Self>(x, w, eps, dy)
    }

    fn project(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::project::<Self>(x, w)
    }

    /// `dx = dy·w`.
    fn project_backward_x(w: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::project_backward_x::<Self>(w, dy)
    }

    /// `dw = dyᵀ·x`.
    fn project_backward_w(x: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::project_backward_w::<Self>(x, dy)
    }

    fn project_packed(x: FloatTensor<Self>, w: Arc<PackedMatrix>) -> FloatTensor<Self> {
        let w = composed::decoded::<Self>(&w, &x);
        composed::project::<Self>(x, w)
    }

    /// `dx = dy·w`.
    fn project_packed_backward(dy: FloatTensor<Self>, w: Arc<PackedMatrix>) -> FloatTensor<Self> {
        let w = composed::decoded::<Self>(&w, &dy);
        composed::project_backward_x::<Self>(w, dy)
    }

    /// `inverse` rotates the other way: the backward pass.
    fn rope(x: FloatTensor<Self>, table: Arc<RotaryTable>, inverse: bool) -> FloatTensor<Self> {
        composed::rope::<Self>(x, &table, inverse)
    }

    fn activate(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        composed::activate::<Self>(x, activation)
    }

    fn activate_backward(
        x: FloatTensor<Self>,
        activation: Activation,
        dy: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed::activate_backward::<Self>(x, activation, dy)
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        composed::gated::<Self>(gate, up, activation)
    }

    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::gated_backward::<Self>(gate, up, activation, dy)
    }

    fn gated_project(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        w: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        Self::project(Self::gated(gate, up, activation), w)
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Arc<[usize]>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        composed::causal_attention::<Self>(q, k, v, &documents, spec)
    }

    fn causal_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Arc<[usize]>,
        spec: AttentionSpec,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::causal_attention_backward::<Self>(q, k, v, &documents, spec, dy)
    }

    fn linear_cross_entropy(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<[i32]>,
    ) -> FloatTensor<Self> {
        composed::linear_cross_entropy::<Self>(h, w, &targets)
    }

    /// The loss with `dh` and, if `with_dw`, `dw` (else an empty tensor): one pass makes the logits once. The gradients
    /// may be in f32 where the inputs are f16: they are yet to be multiplied by a loss scale.
    fn linear_cross_entropy_with_grads(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<[i32]>,
        with_dw: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let _ = with_dw;
        composed::linear_cross_entropy_with_grads::<Self>(h, w, &targets)
    }

    fn linear_cross_entropy_packed(
        h: FloatTensor<Self>,
        w: Arc<PackedMatrix>,
        targets: Arc<[i32]>,
    ) -> FloatTensor<Self> {
        let w = composed::decoded::<Self>(&w, &h);
        composed::linear_cross_entropy::<Self>(h, w, &targets)
    }

    /// The loss with `dh`, in f32 perhaps as above.
    fn linear_cross_entropy_packed_with_grads(
        h: FloatTensor<Self>,
        w: Arc<PackedMatrix>,
        targets: Arc<[i32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let w = composed::decoded::<Self>(&w, &h);
        let (loss, dh, _) = composed::linear_cross_entropy_with_grads::<Self>(h, w, &targets);
        (loss, dh)
    }

    fn gather_rows(w: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self> {
        composed::gather_rows::<Self>(w, &ids)
    }

    /// Rows of `dy` added, in their order, to the rows `ids` of a zero `[vocab, d]`.
    fn scatter_rows(dy: FloatTensor<Self>, ids: Arc<[u32]>, vocab: usize) -> FloatTensor<Self> {
        composed::scatter_rows::<Self>(dy, &ids, vocab)
    }

    fn dropout(x: FloatTensor<Self>, p: f32, key: u64) -> FloatTensor<Self> {
        composed::dropout::<Self>(x, p, key)
    }
}

/// CUDA runs the composed ops until it has kernels of its own.
#[cfg(feature = "cuda")]
impl FusedOps for burn::backend::Cube {}
