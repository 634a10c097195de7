//! Every op composed of Burn's primitives: the plain reference, and what a backend without kernels of its own
//! runs. Written for clarity: attention here does hold rows × rows scores, the loss does hold all logits, packed
//! matrices are decoded whole.

use crate::cpu::activation::Activation;
use crate::cpu::attention::AttentionSpec;
use crate::cpu::packed::PackedMatrix;
use crate::cpu::pointwise;
use crate::cpu::rope::RotaryTable;
use crate::ops::FusedOps;
use burn::backend::{TensorMetadata, tensor::Device, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{FloatDType, IndexingUpdateOp, Slice, TensorData};

/// A float tensor with the handful of operations used here. Binary operations broadcast dimensions of one.
struct X<B: FusedOps>(FloatTensor<B>);

impl<B: FusedOps> Clone for X<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: FusedOps> X<B> {
    fn host(values: &[f32], shape: &[usize], device: &Device<B>) -> Self {
        Self(B::float_from_data(TensorData::new(values.to_vec(), shape.to_vec()), device))
    }
    /// In the precision of `like`.
    fn host_like(values: &[f32], shape: &[usize], like: &FloatTensor<B>) -> Self {
        let x = Self::host(values, shape, &like.device());
        Self(B::float_cast(x.0, FloatDType::from(like.dtype())))
    }
    fn in_precision_of(self, like: &FloatTensor<B>) -> Self {
        Self(B::float_cast(self.0, FloatDType::from(like.dtype())))
    }
    fn dims(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }
    fn reshape(self, shape: &[usize]) -> Self {
        Self(B::float_reshape(self.0, shape.to_vec().into()))
    }
    fn swap(self, a: usize, b: usize) -> Self {
        Self(B::float_swap_dims(self.0, a, b))
    }
    fn transpose(self) -> Self {
        let rank = self.0.shape().to_vec().len();
        self.swap(rank - 2, rank - 1)
    }
    fn matmul(self, other: Self) -> Self {
        Self(B::float_matmul(self.0, other.0))
    }
    fn add(self, other: Self) -> Self {
        Self(B::float_add(self.0, other.0))
    }
    fn sub(self, other: Self) -> Self {
        Self(B::float_sub(self.0, other.0))
    }
    fn mul(self, other: Self) -> Self {
        Self(B::float_mul(self.0, other.0))
    }
    fn times(self, s: f32) -> Self {
        Self(B::float_mul_scalar(self.0, s.into()))
    }
    fn plus(self, s: f32) -> Self {
        Self(B::float_add_scalar(self.0, s.into()))
    }
    fn sum(self, dim: usize) -> Self {
        Self(B::float_sum_dim(self.0, dim))
    }
    fn max(self, dim: usize) -> Self {
        Self(B::float_max_dim(self.0, dim))
    }
    fn exp(self) -> Self {
        Self(B::float_exp(self.0))
    }
    fn erf(self) -> Self {
        Self(B::float_erf(self.0))
    }
    fn tanh(self) -> Self {
        Self(B::float_tanh(self.0))
    }
    fn log(self) -> Self {
        Self(B::float_log(self.0))
    }
    fn sqrt(self) -> Self {
        Self(B::float_sqrt(self.0))
    }
    fn recip(self) -> Self {
        Self(B::float_recip(self.0))
    }
    fn narrow_last(&self, start: usize, end: usize) -> Self {
        let shape = self.dims();
        let last = shape.len() - 1;
        let slice = |(i, n): (usize, usize)| match i == last {
            true => Slice::new(start as isize, Some(end as isize), 1),
            false => Slice::new(0, Some(n as isize), 1),
        };
        let slices: Vec<Slice> = shape.into_iter().enumerate().map(slice).collect();
        Self(B::float_slice(self.0.clone(), &slices))
    }
}

fn int<B: FusedOps>(values: impl Iterator<Item = i64>, shape: &[usize], device: &Device<B>) -> IntTensor<B> {
    B::int_from_data(TensorData::new(values.collect::<Vec<i64>>(), shape.to_vec()), device)
}

/// `1/sqrt(mean(x²)+eps)`, `[rows, 1]`.
fn inverse_rms<B: FusedOps>(x: &X<B>, eps: f32) -> X<B> {
    let d = x.dims()[1] as f32;
    x.clone().mul(x.clone()).sum(1).times(1.0 / d).plus(eps).sqrt().recip()
}

pub(crate) fn rms_norm<B: FusedOps>(x: FloatTensor<B>, w: FloatTensor<B>, eps: f32) -> FloatTensor<B> {
    let w = X::<B>(w).in_precision_of(&x);
    let x = X::<B>(x);
    let (r, d) = (inverse_rms(&x, eps), x.dims()[1]);
    x.mul(r).mul(w.reshape(&[1, d])).0
}

pub(crate) fn rms_norm_backward<B: FusedOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    eps: f32,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (gain, w) = (w.clone(), X::<B>(w).in_precision_of(&x));
    let (x, dy) = (X::<B>(x), X::<B>(dy));
    let (r, d) = (inverse_rms(&x, eps), x.dims()[1]);
    let g = dy.clone().mul(w.reshape(&[1, d]));
    let k = g.clone().mul(x.clone()).sum(1).times(1.0 / d as f32);
    let k = k.mul(r.clone()).mul(r.clone()).mul(r.clone());
    let dx = g.mul(r.clone()).sub(x.clone().mul(k));
    let dw = dy.mul(x).mul(r).sum(0).reshape(&[d]).in_precision_of(&gain);
    (dx.0, dw.0)
}

/// `(x − mean(x)) / sqrt(variance(x)+eps)`, `[rows, d]`, and the inverse deviation, `[rows, 1]`.
fn standardised<B: FusedOps>(x: X<B>, eps: f32) -> (X<B>, X<B>) {
    let d = x.dims()[1] as f32;
    let centred = x.clone().sub(x.sum(1).times(1.0 / d));
    let r = inverse_rms(&centred, eps);
    (centred.mul(r.clone()), r)
}

pub(crate) fn layer_norm<B: FusedOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    b: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let (normed, _) = standardised(X::<B>(x), eps);
    let d = normed.dims()[1];
    normed.mul(X(w).reshape(&[1, d])).add(X(b).reshape(&[1, d])).0
}

pub(crate) fn layer_norm_backward<B: FusedOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    eps: f32,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (dy, (normed, r)) = (X::<B>(dy), standardised(X::<B>(x), eps));
    let d = normed.dims()[1];
    let g = dy.clone().mul(X(w).reshape(&[1, d]));
    let mean = g.clone().sum(1).times(1.0 / d as f32);
    let along = g.clone().mul(normed.clone()).sum(1).times(1.0 / d as f32);
    let dx = g.sub(mean).sub(normed.clone().mul(along)).mul(r);
    let dw = dy.clone().mul(normed).sum(0).reshape(&[d]);
    (dx.0, dw.0, dy.sum(0).reshape(&[d]).0)
}

pub(crate) fn project<B: FusedOps>(x: FloatTensor<B>, w: FloatTensor<B>) -> FloatTensor<B> {
    X::<B>(x).matmul(X(w).transpose()).0
}

pub(crate) fn project_backward_x<B: FusedOps>(w: FloatTensor<B>, dy: FloatTensor<B>) -> FloatTensor<B> {
    X::<B>(dy).matmul(X(w)).0
}

pub(crate) fn project_backward_w<B: FusedOps>(x: FloatTensor<B>, dy: FloatTensor<B>) -> FloatTensor<B> {
    X::<B>(dy).transpose().matmul(X(x)).0
}

/// A packed matrix as a dense tensor beside `like`.
pub(crate) fn decoded<B: FusedOps>(w: &PackedMatrix, like: &FloatTensor<B>) -> FloatTensor<B> {
    let mut values = vec![0.0; w.rows() * w.columns()];
    for (i, row) in values.chunks_exact_mut(w.columns()).enumerate() {
        w.read_row(i, row);
    }
    X::<B>::host_like(&values, &[w.rows(), w.columns()], like).0
}

pub(crate) fn rope<B: FusedOps>(x: FloatTensor<B>, table: &RotaryTable, inverse: bool) -> FloatTensor<B> {
    let (rows, half) = (table.rows(), table.half());
    let cos = X::<B>::host_like(table.cos(), &[rows, 1, half], &x);
    let sin = X::<B>::host_like(table.sin(), &[rows, 1, half], &x).times(if inverse { -1.0 } else { 1.0 });
    let x = X::<B>(x);
    let (a, b) = (x.narrow_last(0, half), x.narrow_last(half, 2 * half));
    let first = a.clone().mul(cos.clone()).sub(b.clone().mul(sin.clone()));
    let second = b.mul(cos).add(a.mul(sin));
    B::float_cat(vec![first.0, second.0], 2)
}

fn sigmoid<B: FusedOps>(x: X<B>) -> X<B> {
    x.times(-1.0).exp().plus(1.0).recip()
}

/// The curve's value and slope at `x`.
fn curve<B: FusedOps>(x: X<B>, activation: Activation) -> (X<B>, X<B>) {
    let one_minus = |s: X<B>| s.times(-1.0).plus(1.0);
    match activation {
        Activation::Silu => {
            let s = sigmoid(x.clone());
            let slope = s.clone().mul(x.clone().mul(one_minus(s.clone())).plus(1.0));
            (x.mul(s), slope)
        }
        Activation::Gelu => {
            let phi = x.clone().times(std::f32::consts::FRAC_1_SQRT_2).erf().plus(1.0).times(0.5);
            let scale = 0.5 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
            let density = x.clone().mul(x.clone()).times(-0.5).exp().times(scale);
            (x.clone().mul(phi.clone()), phi.add(x.mul(density)))
        }
        Activation::GeluTanh => {
            let root = (2.0 / std::f32::consts::PI).sqrt();
            let square = x.clone().mul(x.clone());
            let inner = x.clone().mul(square.clone().times(0.044_715).plus(1.0)).times(root);
            let t = inner.tanh();
            let step = t.clone().plus(1.0).times(0.5);
            let steepness = square.times(3.0 * 0.044_715).plus(1.0).times(0.5 * root);
            let slope = step.clone().add(x.clone().mul(one_minus(t.clone().mul(t))).mul(steepness));
            (x.mul(step), slope)
        }
    }
}

pub(crate) fn activate<B: FusedOps>(x: FloatTensor<B>, activation: Activation) -> FloatTensor<B> {
    curve(X::<B>(x), activation).0.0
}

pub(crate) fn activate_backward<B: FusedOps>(
    x: FloatTensor<B>,
    activation: Activation,
    dy: FloatTensor<B>,
) -> FloatTensor<B> {
    curve(X::<B>(x), activation).1.mul(X(dy)).0
}

pub(crate) fn gated<B: FusedOps>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    activation: Activation,
) -> FloatTensor<B> {
    curve(X::<B>(gate), activation).0.mul(X(up)).0
}

pub(crate) fn gated_backward<B: FusedOps>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    activation: Activation,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (dy, (value, slope)) = (X::<B>(dy), curve(X::<B>(gate), activation));
    (dy.clone().mul(X(up)).mul(slope).0, dy.mul(value).0)
}

/// Dimensions of an attention problem and its mask.
struct Heads<'a> {
    documents: &'a [usize],
    spec: AttentionSpec,
    rows: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
}

impl<'a> Heads<'a> {
    fn new<B: FusedOps>(
        q: &FloatTensor<B>,
        k: &FloatTensor<B>,
        documents: &'a [usize],
        spec: AttentionSpec,
    ) -> Self {
        let (q, k) = (q.shape().to_vec(), k.shape().to_vec());
        Self { documents, spec, rows: q[0], heads: q[1], kv_heads: k[1], d: q[2] }
    }

    /// `[rows, heads, d]` → `[heads, rows, d]`, KV heads repeated for their group.
    fn split<B: FusedOps>(&self, x: FloatTensor<B>) -> X<B> {
        let x = X::<B>(x).swap(0, 1);
        let own = x.dims()[0];
        let group = self.heads / own;
        let ones = X::<B>::host_like(&vec![1.0; group], &[1, group, 1, 1], &x.0);
        x.reshape(&[own, 1, self.rows, self.d]).mul(ones).reshape(&[self.heads, self.rows, self.d])
    }

    /// `[heads, rows, d]` → `[rows, heads, d]`.
    fn join<B: FusedOps>(&self, x: X<B>) -> FloatTensor<B> {
        x.swap(0, 1).0
    }

    /// The same summed over the group: `[rows, kv_heads, d]`.
    fn join_groups<B: FusedOps>(&self, x: X<B>) -> FloatTensor<B> {
        let group = self.heads / self.kv_heads;
        let x = x.reshape(&[self.kv_heads, group, self.rows, self.d]).sum(1);
        x.reshape(&[self.kv_heads, self.rows, self.d]).swap(0, 1).0
    }

    /// 0 where row `i` sees row `j`, else very negative: `[1, rows, rows]`.
    fn mask<B: FusedOps>(&self, like: &FloatTensor<B>) -> X<B> {
        let mut mask = vec![-1e30f32; self.rows * self.rows];
        let mut start = 0;
        for &len in self.documents {
            for i in 0..len {
                let seen = self.spec.keys(i);
                mask[(start + i) * self.rows..][start + seen.start..start + seen.end].fill(0.0);
            }
            start += len;
        }
        X::host_like(&mask, &[1, self.rows, self.rows], like)
    }

    /// Softmax of the masked scores, `[heads, rows, rows]`.
    fn probabilities<B: FusedOps>(&self, q: X<B>, k: X<B>) -> X<B> {
        let mask = self.mask(&q.0);
        let scores = q.matmul(k.transpose()).times(self.spec.scale).add(mask);
        let e = scores.clone().sub(scores.max(2)).exp();
        e.clone().mul(e.sum(2).recip())
    }
}

pub(crate) fn causal_attention<B: FusedOps>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    documents: &[usize],
    spec: AttentionSpec,
) -> FloatTensor<B> {
    let heads = Heads::new::<B>(&q, &k, documents, spec);
    let p = heads.probabilities(heads.split::<B>(q), heads.split::<B>(k));
    heads.join(p.matmul(heads.split(v)))
}

pub(crate) fn causal_attention_backward<B: FusedOps>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    documents: &[usize],
    spec: AttentionSpec,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let heads = Heads::new::<B>(&q, &k, documents, spec);
    let (q, k, v, dy) = (heads.split::<B>(q), heads.split::<B>(k), heads.split::<B>(v), heads.split::<B>(dy));
    let p = heads.probabilities(q.clone(), k.clone());
    let dv = p.clone().transpose().matmul(dy.clone());
    let dp = dy.matmul(v.transpose());
    let mean = p.clone().mul(dp.clone()).sum(2);
    let ds = p.mul(dp.sub(mean)).times(spec.scale);
    let (dq, dk) = (ds.clone().matmul(k), ds.transpose().matmul(q));
    (heads.join(dq), heads.join_groups(dk), heads.join_groups(dv))
}

/// The loss, and `softmax − onehot` with rows without a target zeroed.
fn loss_and_slope<B: FusedOps>(
    h: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: &[i32],
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (rows, device) = (targets.len(), h.device());
    let logits = X::<B>(B::float_cast(project::<B>(h, w), FloatDType::F32));
    let shifted = logits.clone().sub(logits.max(1));
    let log_sum = shifted.clone().exp().sum(1).log();
    let picked = || int::<B>(targets.iter().map(|&t| t.max(0) as i64), &[rows, 1], &device);
    let counted: Vec<f32> = targets.iter().map(|&t| if t < 0 { 0.0 } else { 1.0 }).collect();
    let counted = X::<B>::host(&counted, &[rows, 1], &device);
    let own = X::<B>(B::float_gather(1, shifted.0.clone(), picked()));
    let loss = log_sum.clone().sub(own).mul(counted.clone()).sum(0).reshape(&[1]);
    let minus_one = X::<B>::host(&vec![-1.0; rows], &[rows, 1], &device);
    let p = shifted.sub(log_sum).exp();
    let slope = B::float_scatter(1, p.0, picked(), minus_one.0, IndexingUpdateOp::Add);
    (loss.0, X::<B>(slope).mul(counted).0)
}

pub(crate) fn linear_cross_entropy<B: FusedOps>(
    h: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: &[i32],
) -> FloatTensor<B> {
    loss_and_slope::<B>(h, w, targets).0
}

pub(crate) fn linear_cross_entropy_with_grads<B: FusedOps>(
    h: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: &[i32],
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (loss, slope) = loss_and_slope::<B>(h.clone(), w.clone(), targets);
    let slope = B::float_cast(slope, FloatDType::from(h.dtype()));
    (loss, project_backward_x::<B>(w, slope.clone()), project_backward_w::<B>(h, slope))
}

pub(crate) fn gather_rows<B: FusedOps>(w: FloatTensor<B>, ids: &[u32]) -> FloatTensor<B> {
    let device = w.device();
    B::float_select(w, 0, int::<B>(ids.iter().map(|&i| i as i64), &[ids.len()], &device))
}

pub(crate) fn scatter_rows<B: FusedOps>(dy: FloatTensor<B>, ids: &[u32], vocab: usize) -> FloatTensor<B> {
    let (device, d) = (dy.device(), dy.shape().to_vec()[1]);
    let zeros = B::float_zeros([vocab, d].into(), &device, FloatDType::from(dy.dtype()));
    let ids = int::<B>(ids.iter().map(|&i| i as i64), &[ids.len()], &device);
    B::float_select_assign(zeros, 0, ids, dy, IndexingUpdateOp::Add)
}

pub(crate) fn dropout<B: FusedOps>(x: FloatTensor<B>, p: f32, key: u64) -> FloatTensor<B> {
    let shape = x.shape().to_vec();
    let mut mask = vec![0.0; shape[0] * shape[1]];
    pointwise::dropout(&vec![1.0; mask.len()], shape[1], p, key, &mut mask);
    let mask = X::<B>::host_like(&mask, &shape, &x);
    X::<B>(x).mul(mask).0
}

#[cfg(test)]
mod tests {
    //! Holds the CPU kernels and the composed ops together.
    use super::*;
    use burn::backend::Flex;
    use burn_flex::FlexTensor;
    use std::sync::Arc;

    fn random(shape: &[usize], seed: u32) -> FlexTensor {
        let mut s = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let n = shape.iter().product();
        let next = |_| {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        FlexTensor::from_data(TensorData::new((0..n).map(next).collect::<Vec<f32>>(), shape.to_vec()))
    }

    fn same(what: &str, kernel: FlexTensor, composed: FlexTensor) {
        let floats = |x: FlexTensor| x.to_contiguous().into_data().try_into_vec::<f32>().unwrap();
        assert_eq!(kernel.shape(), composed.shape(), "{what}: shape");
        for (a, b) in floats(kernel).iter().zip(&floats(composed)) {
            assert!((a - b).abs() <= 2e-5 * (1.0 + b.abs()), "{what}: {a} against {b}");
        }
    }

    #[test]
    fn row_ops_agree() {
        let (x, w, dy) = (random(&[7, 20], 1), random(&[20], 2), random(&[7, 20], 3));
        same(
            "rms_norm",
            Flex::rms_norm(x.clone(), w.clone(), 1e-5),
            rms_norm::<Flex>(x.clone(), w.clone(), 1e-5),
        );
        let kernel = Flex::rms_norm_backward(x.clone(), w.clone(), 1e-5, dy.clone());
        let plain = rms_norm_backward::<Flex>(x.clone(), w.clone(), 1e-5, dy.clone());
        same("rms_norm dx", kernel.0, plain.0);
        same("rms_norm dw", kernel.1, plain.1);
        let b = random(&[20], 6);
        let plain = layer_norm::<Flex>(x.clone(), w.clone(), b.clone(), 1e-5);
        same("layer_norm", Flex::layer_normalize(x.clone(), w.clone(), b, 1e-5), plain);
        let kernel = Flex::layer_normalize_backward(x.clone(), w.clone(), 1e-5, dy.clone());
        let plain = layer_norm_backward::<Flex>(x.clone(), w, 1e-5, dy.clone());
        same("layer_norm dx", kernel.0, plain.0);
        same("layer_norm dw", kernel.1, plain.1);
        same("layer_norm db", kernel.2, plain.2);
        let up = random(&[7, 20], 4);
        for activation in Activation::ALL {
            let plain = activate::<Flex>(x.clone(), activation);
            same("activate", Flex::activate(x.clone(), activation), plain);
            let plain = activate_backward::<Flex>(x.clone(), activation, dy.clone());
            same("activate dx", Flex::activate_backward(x.clone(), activation, dy.clone()), plain);
            let plain = gated::<Flex>(x.clone(), up.clone(), activation);
            same("gated", Flex::gated(x.clone(), up.clone(), activation), plain);
            let kernel = Flex::gated_backward(x.clone(), up.clone(), activation, dy.clone());
            let plain = gated_backward::<Flex>(x.clone(), up.clone(), activation, dy.clone());
            same("gated dgate", kernel.0, plain.0);
            same("gated dup", kernel.1, plain.1);
        }
        same("dropout", Flex::dropout(x.clone(), 0.3, 5), dropout::<Flex>(x, 0.3, 5));
    }

    #[test]
    fn products_agree() {
        let (x, w, dy) = (random(&[5, 33], 1), random(&[18, 33], 2), random(&[5, 18], 3));
        same("project", Flex::project(x.clone(), w.clone()), project::<Flex>(x.clone(), w.clone()));
        let kernel = Flex::project_backward_x(w.clone(), dy.clone());
        same("project dx", kernel, project_backward_x::<Flex>(w, dy.clone()));
        same(
            "project dw",
            Flex::project_backward_w(x.clone(), dy.clone()),
            project_backward_w::<Flex>(x, dy),
        );
        let table = random(&[9, 4], 4);
        let ids: Arc<[u32]> = Arc::new([8, 0, 8]);
        same("gather", Flex::gather_rows(table.clone(), ids.clone()), gather_rows::<Flex>(table, &ids));
        let dy = random(&[3, 4], 5);
        same("scatter", Flex::scatter_rows(dy.clone(), ids.clone(), 9), scatter_rows::<Flex>(dy, &ids, 9));
    }

    #[test]
    fn packed_products_agree() {
        let values: Vec<f32> = random(&[19, 32], 8).into_data().try_into_vec().unwrap();
        let w = Arc::new(PackedMatrix::from_f32(19, 32, &values));
        let (x, dy) = (random(&[4, 32], 1), random(&[4, 19], 2));
        let plain = project::<Flex>(x.clone(), decoded::<Flex>(&w, &x));
        same("packed", Flex::project_packed(x, w.clone()), plain);
        let plain = project_backward_x::<Flex>(decoded::<Flex>(&w, &dy), dy.clone());
        same("packed dx", Flex::project_packed_backward(dy, w), plain);
    }

    #[test]
    fn rope_and_attention_agree() {
        let angles: Vec<f32> = (0..12 * 3).map(|i| i as f32 * 0.37).collect();
        let map = |f: fn(f32) -> f32| angles.iter().map(|a| f(*a)).collect();
        let table = Arc::new(RotaryTable::new(3, map(f32::cos), map(f32::sin)));
        let x = random(&[12, 4, 6], 1);
        for inverse in [false, true] {
            let kernel = Flex::rope(x.clone(), table.clone(), inverse);
            same("rope", kernel, rope::<Flex>(x.clone(), &table, inverse));
        }
        let (k, v, dy) = (random(&[12, 2, 6], 2), random(&[12, 2, 6], 3), random(&[12, 4, 6], 4));
        let documents: Arc<[usize]> = Arc::new([5, 7]);
        for window in [None, Some(3)] {
            let spec = AttentionSpec { scale: 0.5, window };
            let kernel = Flex::causal_attention(x.clone(), k.clone(), v.clone(), documents.clone(), spec);
            let plain = causal_attention::<Flex>(x.clone(), k.clone(), v.clone(), &documents, spec);
            same("attention", kernel, plain);
            let (q, k, v, dy) = (x.clone(), k.clone(), v.clone(), dy.clone());
            let plain = causal_attention_backward::<Flex>(
                q.clone(),
                k.clone(),
                v.clone(),
                &documents,
                spec,
                dy.clone(),
            );
            let kernel = Flex::causal_attention_backward(q, k, v, documents.clone(), spec, dy);
            same("dq", kernel.0, plain.0);
            same("dk", kernel.1, plain.1);
            same("dv", kernel.2, plain.2);
        }
    }

    #[test]
    fn losses_agree() {
        let (h, w) = (random(&[6, 8], 1), random(&[21, 8], 2));
        let targets: Arc<[i32]> = Arc::new([3, -1, 20, 0, -100, 7]);
        let plain = linear_cross_entropy::<Flex>(h.clone(), w.clone(), &targets);
        same("loss", Flex::linear_cross_entropy(h.clone(), w.clone(), targets.clone()), plain);
        let plain = linear_cross_entropy_with_grads::<Flex>(h.clone(), w.clone(), &targets);
        let kernel = Flex::linear_cross_entropy_with_grads(h, w, targets, true);
        same("loss", kernel.0, plain.0);
        same("dh", kernel.1, plain.1);
        same("dw", kernel.2, plain.2);
    }
}
