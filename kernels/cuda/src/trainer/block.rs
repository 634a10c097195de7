//! A transformer block, forward and backward, and the layers it is made of.

use super::batch::BatchOnCard;
use super::model::{BlockParts, Linear, Model, Span};
use super::numbers::Compute;
use super::space::{Backward, Saved};
use crate::ops::attention::{self, Inputs, Upstream, attention, attention_backward};
use crate::ops::gemm::{Shape, gemm_nn, gemm_nt};
use crate::ops::norm::{rms_norm, rms_norm_backward_parts, rms_norm_backward_w, rms_norm_backward_x};
use crate::ops::pointwise::{add, rope, swiglu, swiglu_backward};
use crate::runtime::{DeviceBuffer, Error, Stream, View, ViewMut};

/// A block's pass over a micro-batch.
pub(super) struct Pass<'a, T> {
    pub stream: &'a Stream,
    pub model: &'a Model,
    pub parts: &'a BlockParts,
    pub batch: &'a BatchOnCard,
    /// Number of the block.
    pub block: usize,
    /// The block's unit.
    pub weights: View<'a, T>,
}

impl<T: Compute> Pass<'_, T> {
    fn rows(&self) -> usize {
        self.batch.rows()
    }

    /// Elements of the residual stream.
    fn width(&self) -> usize {
        self.rows() * self.model.shape.hidden
    }

    fn q_len(&self) -> usize {
        self.rows() * self.model.q_width()
    }

    fn kv_len(&self) -> usize {
        self.rows() * self.model.kv_width()
    }

    fn inner_len(&self) -> usize {
        self.rows() * self.model.shape.inner
    }

    fn weight(&self, span: Span) -> Result<View<'_, T>, Error> {
        self.weights.part(span.range())
    }

    fn norm(&self, x: View<'_, T>, span: Span, y: ViewMut<'_, T>) -> Result<(), Error> {
        rms_norm(self.stream, x, self.weight(span)?, self.model.shape.eps, y)
    }

    fn attention(&self) -> attention::Shape {
        self.model.attention(self.block, self.rows())
    }

    /// The block's output, and in `saved` what its backward pass reads.
    pub fn forward(
        &self,
        x: View<'_, T>,
        saved: &mut Saved<T>,
        mut out: ViewMut<'_, T>,
    ) -> Result<(), Error> {
        self.attend(x, saved)?;
        let (stream, width, inner) = (self.stream, self.width(), self.inner_len());
        let Saved { middle, mlp_normed, gate, up, act, .. } = saved;
        let (middle, mut mlp_normed) = (middle.part(0..width)?, mlp_normed.part_mut(0..width)?);
        self.norm(middle, self.parts.mlp_norm, mlp_normed.again())?;
        self.multiply(self.parts.gate, mlp_normed.view(), gate.part_mut(0..inner)?)?;
        self.multiply(self.parts.up, mlp_normed.view(), up.part_mut(0..inner)?)?;
        swiglu(stream, gate.part(0..inner)?, up.part(0..inner)?, act.part_mut(0..inner)?)?;
        out.copy_from(stream, middle)?;
        self.add_product(self.parts.down, act.part(0..inner)?, out)
    }

    /// `middle = x + o(attention(rope(q(norm(x))), rope(k(norm(x))), v(norm(x))))`.
    fn attend(&self, x: View<'_, T>, saved: &mut Saved<T>) -> Result<(), Error> {
        let (stream, shape) = (self.stream, self.attention());
        let (width, q_len, kv_len) = (self.width(), self.q_len(), self.kv_len());
        let Saved { normed, raw, q, k, v, heads, logs, middle, .. } = saved;
        self.norm(x, self.parts.attention_norm, normed.part_mut(0..width)?)?;
        let normed = normed.part(0..width)?;
        match (raw, self.parts.qk_norm) {
            (Some((raw_q, raw_k)), Some((q_norm, k_norm))) => {
                self.multiply(self.parts.q, normed, raw_q.part_mut(0..q_len)?)?;
                self.multiply(self.parts.k, normed, raw_k.part_mut(0..kv_len)?)?;
                self.norm(raw_q.part(0..q_len)?, q_norm, q.part_mut(0..q_len)?)?;
                self.norm(raw_k.part(0..kv_len)?, k_norm, k.part_mut(0..kv_len)?)?;
            }
            _ => {
                self.multiply(self.parts.q, normed, q.part_mut(0..q_len)?)?;
                self.multiply(self.parts.k, normed, k.part_mut(0..kv_len)?)?;
            }
        }
        self.multiply(self.parts.v, normed, v.part_mut(0..kv_len)?)?;
        let by = self.batch.rotations()?;
        rope(stream, q.part_mut(0..q_len)?, shape.heads, by, false)?;
        rope(stream, k.part_mut(0..kv_len)?, shape.kv_heads, by, false)?;
        let inputs = self.inputs(q, k, v)?;
        let logs = logs.part_mut(0..shape.heads * shape.rows)?;
        attention(stream, inputs, shape, heads.part_mut(0..q_len)?, logs)?;
        let mut middle = middle.part_mut(0..width)?;
        middle.copy_from(stream, x)?;
        self.add_product(self.parts.o, heads.part(0..q_len)?, middle)
    }

    fn inputs<'a>(
        &'a self,
        q: &'a DeviceBuffer<T>,
        k: &'a DeviceBuffer<T>,
        v: &'a DeviceBuffer<T>,
    ) -> Result<Inputs<'a, T>, Error> {
        let (q, k, v) = (q.part(0..self.q_len())?, k.part(0..self.kv_len())?, v.part(0..self.kv_len())?);
        Ok(Inputs { q, k, v, tiles: self.batch.tiles()? })
    }

    /// `dx` becomes the gradient of the block's input; those of its weights are added to `gradient`.
    pub fn backward(
        &self,
        x: View<'_, T>,
        saved: &Saved<T>,
        space: &mut Backward<T>,
        gradient: &mut DeviceBuffer<f32>,
    ) -> Result<(), Error> {
        self.feed_forward_backward(saved, space, gradient)?;
        self.attend_backward(saved, space, gradient)?;
        let Backward { dx, dnormed, added, inverse, parts, .. } = space;
        let dnormed = dnormed.part(0..self.width())?;
        let scratch = NormScratch { inverse, parts };
        self.norm_backward(x, self.parts.attention_norm, dnormed, added, scratch, gradient)?;
        add(self.stream, added.part(0..self.width())?, dx.part_mut(0..self.width())?)
    }

    fn feed_forward_backward(
        &self,
        saved: &Saved<T>,
        space: &mut Backward<T>,
        gradient: &mut DeviceBuffer<f32>,
    ) -> Result<(), Error> {
        let (stream, width, inner) = (self.stream, self.width(), self.inner_len());
        let Backward { dx, dnormed, added, dact, dgate, dup, inverse, parts, ones, .. } = space;
        let act = saved.act.part(0..inner)?;
        let dy = dx.part(0..width)?;
        self.weight_gradient(self.parts.down, act, dy, ones, gradient)?;
        self.input_gradient(self.parts.down, dy, false, dact.part_mut(0..inner)?)?;
        let (gate, up) = (saved.gate.part(0..inner)?, saved.up.part(0..inner)?);
        let out = (dgate.part_mut(0..inner)?, dup.part_mut(0..inner)?);
        swiglu_backward(stream, gate, up, dact.part(0..inner)?, out.0, out.1)?;
        let normed = saved.mlp_normed.part(0..width)?;
        for (layer, dy, more) in [(self.parts.gate, &*dgate, false), (self.parts.up, &*dup, true)] {
            let dy = dy.part(0..inner)?;
            self.weight_gradient(layer, normed, dy, ones, gradient)?;
            self.input_gradient(layer, dy, more, dnormed.part_mut(0..width)?)?;
        }
        let (middle, dnormed) = (saved.middle.part(0..width)?, dnormed.part(0..width)?);
        let scratch = NormScratch { inverse, parts };
        self.norm_backward(middle, self.parts.mlp_norm, dnormed, added, scratch, gradient)?;
        add(stream, added.part(0..width)?, dx.part_mut(0..width)?)
    }

    /// Leaves the gradient of the normed input in `dnormed`.
    fn attend_backward(
        &self,
        saved: &Saved<T>,
        space: &mut Backward<T>,
        gradient: &mut DeviceBuffer<f32>,
    ) -> Result<(), Error> {
        let (stream, shape) = (self.stream, self.attention());
        let (width, q_len, kv_len) = (self.width(), self.q_len(), self.kv_len());
        let Backward { dx, dheads, dq, dk, dv, deltas, ones, .. } = space;
        let (heads, dy) = (saved.heads.part(0..q_len)?, dx.part(0..width)?);
        self.weight_gradient(self.parts.o, heads, dy, ones, gradient)?;
        self.input_gradient(self.parts.o, dy, false, dheads.part_mut(0..q_len)?)?;
        let per_row = shape.heads * shape.rows;
        let up = Upstream {
            y: heads,
            logs: saved.logs.part(0..per_row)?,
            dy: dheads.part(0..q_len)?,
            deltas: deltas.part_mut(0..per_row)?,
        };
        let out = (dk.part_mut(0..kv_len)?, dv.part_mut(0..kv_len)?);
        let inputs = self.inputs(&saved.q, &saved.k, &saved.v)?;
        attention_backward(stream, inputs, up, shape, dq.part_mut(0..q_len)?, out)?;
        let by = self.batch.rotations()?;
        rope(stream, dq.part_mut(0..q_len)?, shape.heads, by, true)?;
        rope(stream, dk.part_mut(0..kv_len)?, shape.kv_heads, by, true)?;
        self.heads_norm_backward(saved, space, gradient)?;
        let Backward { dq, dk, dv, .. } = space;
        let normed = saved.normed.part(0..width)?;
        let layers = [
            (self.parts.q, dq.part(0..q_len)?, false),
            (self.parts.k, dk.part(0..kv_len)?, true),
            (self.parts.v, dv.part(0..kv_len)?, true),
        ];
        for (layer, dy, more) in layers {
            self.weight_gradient(layer, normed, dy, &space.ones, gradient)?;
            self.input_gradient(layer, dy, more, space.dnormed.part_mut(0..width)?)?;
        }
        Ok(())
    }

    /// Through the norms of heads, where there are any: `dq` and `dk` become gradients of what was normed.
    fn heads_norm_backward(
        &self,
        saved: &Saved<T>,
        space: &mut Backward<T>,
        gradient: &mut DeviceBuffer<f32>,
    ) -> Result<(), Error> {
        let (Some((raw_q, raw_k)), Some((q_norm, k_norm))) = (&saved.raw, self.parts.qk_norm) else {
            return Ok(());
        };
        let Backward { dheads, dq, dk, inverse, parts, .. } = space;
        let (q_len, kv_len) = (self.q_len(), self.kv_len());
        for (raw, norm, dy, len) in [(raw_q, q_norm, dq, q_len), (raw_k, k_norm, dk, kv_len)] {
            let scratch = NormScratch { inverse: &mut *inverse, parts: &mut *parts };
            let x = raw.part(0..len)?;
            self.norm_backward(x, norm, dy.part(0..len)?, dheads, scratch, gradient)?;
            dy.part_mut(0..len)?.copy_from(self.stream, dheads.part(0..len)?)?;
        }
        Ok(())
    }

    fn multiply(&self, layer: Linear, x: View<'_, T>, mut y: ViewMut<'_, T>) -> Result<(), Error> {
        self.product(layer, x, false, y.again())
    }

    fn add_product(&self, layer: Linear, x: View<'_, T>, mut y: ViewMut<'_, T>) -> Result<(), Error> {
        self.product(layer, x, true, y.again())
    }

    /// `y (+)= x·wᵀ + b`.
    fn product(
        &self,
        layer: Linear,
        x: View<'_, T>,
        accumulate: bool,
        mut y: ViewMut<'_, T>,
    ) -> Result<(), Error> {
        let shape = Shape { m: self.rows(), n: layer.rows, k: layer.columns };
        gemm_nt(self.stream, x, self.weight(layer.weight)?, shape, accumulate, y.again())?;
        layer.bias.map_or(Ok(()), |bias| add(self.stream, self.weight(bias)?, y))
    }

    /// `dw += dyᵀ·x`, `db += Σ dy`.
    fn weight_gradient(
        &self,
        layer: Linear,
        x: View<'_, T>,
        dy: View<'_, T>,
        ones: &DeviceBuffer<T>,
        gradient: &mut DeviceBuffer<f32>,
    ) -> Result<(), Error> {
        let shape = Shape { m: layer.rows, n: layer.columns, k: self.rows() };
        T::weight_gradient(self.stream, dy, x, shape, gradient.part_mut(layer.weight.range())?)?;
        let Some(bias) = layer.bias else { return Ok(()) };
        let ones = ones.part(0..self.rows())?;
        T::weight_gradient(self.stream, dy, ones, Shape { n: 1, ..shape }, gradient.part_mut(bias.range())?)
    }

    /// `dx (+)= dy·w`.
    fn input_gradient(
        &self,
        layer: Linear,
        dy: View<'_, T>,
        accumulate: bool,
        dx: ViewMut<'_, T>,
    ) -> Result<(), Error> {
        let shape = Shape { m: self.rows(), n: layer.columns, k: layer.rows };
        gemm_nn(self.stream, dy, self.weight(layer.weight)?, shape, accumulate, dx)
    }

    fn norm_backward(
        &self,
        x: View<'_, T>,
        span: Span,
        dy: View<'_, T>,
        dx: &mut DeviceBuffer<T>,
        scratch: NormScratch<'_>,
        gradient: &mut DeviceBuffer<f32>,
    ) -> Result<(), Error> {
        let dx = dx.part_mut(0..x.len())?;
        let (w, into) = (self.weight(span)?, gradient.part_mut(span.range())?);
        norm_backward(self.stream, self.model.shape.eps, (x, w), dy, dx, scratch, into)
    }
}

/// Scratch of a norm's backward pass.
pub(super) struct NormScratch<'a> {
    pub inverse: &'a mut DeviceBuffer<f32>,
    pub parts: &'a mut DeviceBuffer<f32>,
}

/// `dx`, and adds the gradient of the weights to `dw`.
pub(super) fn norm_backward<T: Compute>(
    stream: &Stream,
    eps: f32,
    (x, w): (View<'_, T>, View<'_, T>),
    dy: View<'_, T>,
    dx: ViewMut<'_, T>,
    scratch: NormScratch<'_>,
    dw: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let (d, rows) = (w.len(), x.len() / w.len());
    let NormScratch { inverse, parts } = scratch;
    rms_norm_backward_x(stream, x, w, eps, dy, dx, inverse.part_mut(0..rows)?)?;
    let parts = parts.part_mut(0..rms_norm_backward_parts(rows, d))?;
    rms_norm_backward_w(stream, x, dy, inverse.part(0..rows)?, parts, dw)
}
