//! Hand-written backward passes of the ops.

use crate::cpu::activation::Activation;
use crate::cpu::attention::AttentionSpec;
use crate::cpu::packed::PackedMatrix;
use crate::cpu::rope::RotaryTable;
use crate::ops::FusedOps;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, FloatDType};
use std::sync::Arc;

const SECOND_ORDER: &str = "second-order gradients are not supported";

/// Registers gradients with the parents that want one; each is computed only then.
macro_rules! register {
    ($grads:ident, $ops:ident, [$($grad:expr),+ $(,)?]) => {{
        let mut parents = $ops.parents.into_iter();
        $(if let Some(node) = parents.next().flatten() {
            $grads.register::<B>(node.id, $grad);
        })+
    }};
}

impl<B: FusedOps, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct RmsNorm;
        impl<B: FusedOps> Backward<B, 2> for RmsNorm {
            type State = (NodeId, NodeId, f32);
            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, saved: &mut Checkpointer) {
                let (x, w, eps) = ops.state;
                let (x, w) = (saved.retrieve_node_output(x), saved.retrieve_node_output(w));
                let (dx, dw) = B::rms_norm_backward(x, w, eps, grads.consume::<B>(&ops.node));
                register!(grads, ops, [dx, dw]);
            }
        }
        match RmsNorm.prepare::<C>([x.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&w), eps);
                prep.finish(state, B::rms_norm(x.into_primitive(), w.into_primitive(), eps))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x.into_primitive(), w.into_primitive(), eps)),
        }
    }

    fn layer_normalize(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LayerNorm;
        impl<B: FusedOps> Backward<B, 3> for LayerNorm {
            type State = (NodeId, NodeId, f32);
            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, saved: &mut Checkpointer) {
                let (x, w, eps) = ops.state;
                let (x, w) = (saved.retrieve_node_output(x), saved.retrieve_node_output(w));
                let (dx, dw, db) = B::layer_normalize_backward(x, w, eps, grads.consume::<B>(&ops.node));
                register!(grads, ops, [dx, dw, db]);
            }
        }
        match LayerNorm.prepare::<C>([x.node(), w.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&w), eps);
                let (x, w, b) = (x.into_primitive(), w.into_primitive(), b.into_primitive());
                prep.finish(state, B::layer_normalize(x, w, b, eps))
            }
            OpsKind::UnTracked(prep) => {
                let (x, w, b) = (x.into_primitive(), w.into_primitive(), b.into_primitive());
                prep.finish(B::layer_normalize(x, w, b, eps))
            }
        }
    }

    fn project(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Linear;
        impl<B: FusedOps> Backward<B, 2> for Linear {
            // An input is kept only if the other one wants a gradient.
            type State = (Option<NodeId>, Option<NodeId>);
            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, saved: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let (x, w) = ops.state;
                let mut kept =
                    |id: Option<NodeId>| saved.retrieve_node_output(id.expect("kept for this gradient"));
                register!(
                    grads,
                    ops,
                    [B::project_backward_x(kept(w), dy.clone()), B::project_backward_w(kept(x), dy),]
                );
            }
        }
        let (track_x, track_w) = (x.is_tracked(), w.is_tracked());
        match Linear.prepare::<C>([x.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (track_w.then(|| prep.checkpoint(&x)), track_x.then(|| prep.checkpoint(&w)));
                prep.finish(state, B::project(x.into_primitive(), w.into_primitive()))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::project(x.into_primitive(), w.into_primitive())),
        }
    }

    fn project_packed(x: FloatTensor<Self>, w: Arc<PackedMatrix>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LinearPacked;
        impl<B: FusedOps> Backward<B, 1> for LinearPacked {
            type State = Arc<PackedMatrix>;
            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let w = ops.state;
                register!(grads, ops, [B::project_packed_backward(dy, w)]);
            }
        }
        match LinearPacked.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::project_packed(x.into_primitive(), w.clone());
                prep.finish(w, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::project_packed(x.into_primitive(), w)),
        }
    }

    fn rope(x: FloatTensor<Self>, table: Arc<RotaryTable>, inverse: bool) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Rope;
        impl<B: FusedOps> Backward<B, 1> for Rope {
            type State = (Arc<RotaryTable>, bool);
            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let (table, inverse) = ops.state;
                register!(grads, ops, [B::rope(dy, table, !inverse)]);
            }
        }
        match Rope.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((table.clone(), inverse), B::rope(x.into_primitive(), table, inverse))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rope(x.into_primitive(), table, inverse)),
        }
    }

    fn activate(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Activate;
        impl<B: FusedOps> Backward<B, 1> for Activate {
            type State = (NodeId, Activation);
            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, saved: &mut Checkpointer) {
                let (x, activation) = ops.state;
                let (x, dy) = (saved.retrieve_node_output(x), grads.consume::<B>(&ops.node));
                register!(grads, ops, [B::activate_backward(x, activation, dy)]);
            }
        }
        match Activate.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), activation);
                prep.finish(state, B::activate(x.into_primitive(), activation))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::activate(x.into_primitive(), activation)),
        }
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Gated;
        impl<B: FusedOps> Backward<B, 2> for Gated {
            type State = (NodeId, NodeId, Activation);
            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, saved: &mut Checkpointer) {
                let (gate, up, activation) = ops.state;
                let (gate, up) = (saved.retrieve_node_output(gate), saved.retrieve_node_output(up));
                let (dgate, dup) = B::gated_backward(gate, up, activation, grads.consume::<B>(&ops.node));
                register!(grads, ops, [dgate, dup]);
            }
        }
        match Gated.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&gate), prep.checkpoint(&up), activation);
                prep.finish(state, B::gated(gate.into_primitive(), up.into_primitive(), activation))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::gated(gate.into_primitive(), up.into_primitive(), activation))
            }
        }
    }

    fn gated_project(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        w: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct GatedLinear;
        impl<B: FusedOps> Backward<B, 3> for GatedLinear {
            type State = ([NodeId; 3], Activation);
            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, saved: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let (ids, activation) = ops.state;
                let [gate, up, w]: [FloatTensor<B>; 3] = ids.map(|id| saved.retrieve_node_output(id));
                let [gate_node, up_node, w_node] = ops.parents;
                if let Some(node) = w_node {
                    let gated = B::gated(gate.clone(), up.clone(), activation);
                    grads.register::<B>(node.id, B::project_backward_w(gated, dy.clone()));
                }
                if gate_node.is_some() || up_node.is_some() {
                    let (dgate, dup) = B::gated_backward(gate, up, activation, B::project_backward_x(w, dy));
                    for (node, gradient) in [(gate_node, dgate), (up_node, dup)] {
                        if let Some(node) = node {
                            grads.register::<B>(node.id, gradient);
                        }
                    }
                }
            }
        }
        match GatedLinear.prepare::<C>([gate.node(), up.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = ([&gate, &up, &w].map(|x| prep.checkpoint(x)), activation);
                let (gate, up) = (gate.into_primitive(), up.into_primitive());
                prep.finish(state, B::gated_project(gate, up, w.into_primitive(), activation))
            }
            OpsKind::UnTracked(prep) => {
                let (gate, up) = (gate.into_primitive(), up.into_primitive());
                prep.finish(B::gated_project(gate, up, w.into_primitive(), activation))
            }
        }
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Arc<[usize]>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Attention;
        impl<B: FusedOps> Backward<B, 3> for Attention {
            type State = ([NodeId; 3], Arc<[usize]>, AttentionSpec);
            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, saved: &mut Checkpointer) {
                let (ids, documents, spec) = ops.state;
                let [q, k, v] = ids.map(|id| saved.retrieve_node_output(id));
                let (dq, dk, dv) =
                    B::causal_attention_backward(q, k, v, documents, spec, grads.consume::<B>(&ops.node));
                register!(grads, ops, [dq, dk, dv]);
            }
        }
        match Attention.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = [prep.checkpoint(&q), prep.checkpoint(&k), prep.checkpoint(&v)];
                let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
                let y = B::causal_attention(q, k, v, documents.clone(), spec);
                prep.finish((ids, documents, spec), y)
            }
            OpsKind::UnTracked(prep) => {
                let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
                prep.finish(B::causal_attention(q, k, v, documents, spec))
            }
        }
    }

    fn linear_cross_entropy(
        h: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<[i32]>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LinearCrossEntropy;
        impl<B: FusedOps> Backward<B, 2> for LinearCrossEntropy {
            // The gradients for an upstream gradient of one: made with the loss, when the logits were at hand.
            type State = (FloatTensor<B>, FloatTensor<B>, [DType; 2]);
            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let (dh, dw, [h, w]) = ops.state;
                register!(grads, ops, [scaled::<B>(dh, dy.clone(), h), scaled::<B>(dw, dy, w)]);
            }
        }
        let with_dw = w.is_tracked();
        match LinearCrossEntropy.prepare::<C>([h.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (h, w) = (h.into_primitive(), w.into_primitive());
                let dtypes = [h.dtype(), w.dtype()];
                let (loss, dh, dw) = B::linear_cross_entropy_with_grads(h, w, targets, with_dw);
                prep.finish((dh, dw, dtypes), loss)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::linear_cross_entropy(h.into_primitive(), w.into_primitive(), targets))
            }
        }
    }

    fn linear_cross_entropy_packed(
        h: FloatTensor<Self>,
        w: Arc<PackedMatrix>,
        targets: Arc<[i32]>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LinearCrossEntropyPacked;
        impl<B: FusedOps> Backward<B, 1> for LinearCrossEntropyPacked {
            type State = (FloatTensor<B>, DType);
            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let (dh, dtype) = ops.state;
                register!(grads, ops, [scaled::<B>(dh, dy, dtype)]);
            }
        }
        match LinearCrossEntropyPacked.prepare::<C>([h.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let h = h.into_primitive();
                let dtype = h.dtype();
                let (loss, dh) = B::linear_cross_entropy_packed_with_grads(h, w, targets);
                prep.finish((dh, dtype), loss)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::linear_cross_entropy_packed(h.into_primitive(), w, targets))
            }
        }
    }

    fn gather_rows(w: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Embedding;
        impl<B: FusedOps> Backward<B, 1> for Embedding {
            type State = (Arc<[u32]>, usize);
            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let (ids, vocab) = ops.state;
                register!(grads, ops, [B::scatter_rows(dy, ids, vocab)]);
            }
        }
        let w_primitive = w.clone().into_primitive();
        let vocab = w_primitive.shape()[0];
        match Embedding.prepare::<C>([w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((ids.clone(), vocab), B::gather_rows(w_primitive, ids)),
            OpsKind::UnTracked(prep) => prep.finish(B::gather_rows(w_primitive, ids)),
        }
    }

    fn dropout(x: FloatTensor<Self>, p: f32, key: u64) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Dropout;
        impl<B: FusedOps> Backward<B, 1> for Dropout {
            type State = (f32, u64);
            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let (p, key) = ops.state;
                register!(grads, ops, [B::dropout(dy, p, key)]);
            }
        }
        match Dropout.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((p, key), B::dropout(x.into_primitive(), p, key)),
            OpsKind::UnTracked(prep) => prep.finish(B::dropout(x.into_primitive(), p, key)),
        }
    }

    fn rms_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f32,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{SECOND_ORDER}")
    }

    fn layer_normalize_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f32,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{SECOND_ORDER}")
    }

    fn project_backward_x(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }

    fn project_backward_w(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }

    fn project_packed_backward(_: FloatTensor<Self>, _: Arc<PackedMatrix>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }

    fn activate_backward(_: FloatTensor<Self>, _: Activation, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }

    fn gated_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Activation,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{SECOND_ORDER}")
    }

    fn causal_attention_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<[usize]>,
        _: AttentionSpec,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{SECOND_ORDER}")
    }

    fn linear_cross_entropy_with_grads(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<[i32]>,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{SECOND_ORDER}")
    }

    fn linear_cross_entropy_packed_with_grads(
        _: FloatTensor<Self>,
        _: Arc<PackedMatrix>,
        _: Arc<[i32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("{SECOND_ORDER}")
    }

    fn scatter_rows(_: FloatTensor<Self>, _: Arc<[u32]>, _: usize) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }
}

/// `x · s` in `x`'s precision for a one-element `s`, rounded to `dtype`. For f16 the product is made in f32: `s` is a
/// loss scale then, and lifts small gradients before they are rounded. `x`: `[rows, d]`, `s`: `[1]`.
fn scaled<B: FusedOps>(x: FloatTensor<B>, s: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    let x = if dtype == DType::F16 { B::float_cast(x, FloatDType::F32) } else { x };
    let s = B::float_reshape(s, [1, 1].into());
    let s = B::float_cast(s, x.dtype().into());
    let y = B::float_mul(x, s);
    if y.dtype() == dtype { y } else { B::float_cast(y, dtype.into()) }
}
