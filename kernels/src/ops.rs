//! The backend extension trait behind the ops of this crate.
//!
//! Shapes and meanings stand at the functions in [the crate root](crate). `*_backward` take the upstream
//! gradient last and return the inputs' gradients in the inputs' order.

use crate::cpu::attention::AttentionSpec;
use crate::cpu::packed::PackedMatrix;
use crate::cpu::rope::RotaryTable;
use burn::backend::{Backend, backend_extension, tensor::FloatTensor};
use std::sync::Arc;

/// Fused ops a backend provides.
#[allow(missing_docs, reason = "documented once, at the functions of the crate root")]
#[backend_extension(Autodiff, Flex)]
pub trait FusedOps: Backend {
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    fn project(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;
    /// `dx = dy·w`.
    fn project_backward_x(w: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self>;
    /// `dw = dyᵀ·x`.
    fn project_backward_w(x: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self>;

    fn project_packed(x: FloatTensor<Self>, w: Arc<PackedMatrix>) -> FloatTensor<Self>;
    /// `dx = dy·w`.
    fn project_packed_backward(dy: FloatTensor<Self>, w: Arc<PackedMatrix>) -> FloatTensor<Self>;

    /// `inverse` rotates the other way: the backward pass.
    fn rope(x: FloatTensor<Self>, table: Arc<RotaryTable>, inverse: bool) -> FloatTensor<Self>;

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Arc<[usize]>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self>;
    fn causal_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Arc<[usize]>,
        spec: AttentionSpec,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    fn linear_cross_entropy(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<[i32]>,
    ) -> FloatTensor<Self>;
    /// The loss with `dh` and, if `with_dw`, `dw` (else an empty tensor): one pass makes the logits once.
    fn linear_cross_entropy_with_grads(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<[i32]>,
        with_dw: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    fn linear_cross_entropy_packed(
        h: FloatTensor<Self>,
        w: Arc<PackedMatrix>,
        targets: Arc<[i32]>,
    ) -> FloatTensor<Self>;
    /// The loss with `dh`.
    fn linear_cross_entropy_packed_with_grads(
        h: FloatTensor<Self>,
        w: Arc<PackedMatrix>,
        targets: Arc<[i32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    fn gather_rows(w: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self>;
    /// Rows of `dy` added, in their order, to the rows `ids` of a zero `[vocab, d]`.
    fn scatter_rows(dy: FloatTensor<Self>, ids: Arc<[u32]>, vocab: usize) -> FloatTensor<Self>;

    fn dropout(x: FloatTensor<Self>, p: f32, key: u64) -> FloatTensor<Self>;
}
