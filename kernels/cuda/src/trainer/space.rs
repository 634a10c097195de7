//! What passes are computed in, made once: activations that the backward pass reads, and scratch.

use super::batch::BatchOnCard;
use super::model::Model;
use super::numbers::Compute;
use super::{Settings, plan::Needs};
use crate::Pod;
use crate::ops::norm::rms_norm_backward_parts;
use crate::runtime::{Device, DeviceBuffer, Error};
use hearth_memory::{Kind, Tier};
use std::sync::Arc;

/// What a transformer block's backward pass reads beside the block's input.
pub(super) struct Saved<T> {
    pub normed: DeviceBuffer<T>,
    /// Before the norms of heads, where there are any.
    pub raw: Option<(DeviceBuffer<T>, DeviceBuffer<T>)>,
    /// Rotated.
    pub q: DeviceBuffer<T>,
    pub k: DeviceBuffer<T>,
    pub v: DeviceBuffer<T>,
    /// Attention's result and its logarithms.
    pub heads: DeviceBuffer<T>,
    pub logs: DeviceBuffer<f32>,
    /// The residual stream between attention and MLP.
    pub middle: DeviceBuffer<T>,
    pub mlp_normed: DeviceBuffer<T>,
    pub gate: DeviceBuffer<T>,
    pub up: DeviceBuffer<T>,
    pub act: DeviceBuffer<T>,
}

impl<T: Compute> Saved<T> {
    fn new(on: &Room<'_>, model: &Model) -> Result<Self, Error> {
        let (hidden, inner) = (model.shape.hidden, model.shape.inner);
        let (q, kv) = (model.q_width(), model.kv_width());
        let raw = model.qk_norm.then(|| Ok::<_, Error>((on.rows(q)?, on.rows(kv)?))).transpose()?;
        Ok(Self {
            normed: on.rows(hidden)?,
            raw,
            q: on.rows(q)?,
            k: on.rows(kv)?,
            v: on.rows(kv)?,
            heads: on.rows(q)?,
            logs: on.rows(model.shape.heads)?,
            middle: on.rows(hidden)?,
            mlp_normed: on.rows(hidden)?,
            gate: on.rows(inner)?,
            up: on.rows(inner)?,
            act: on.rows(inner)?,
        })
    }

    fn bytes_of_row(model: &Model) -> usize {
        let (q, kv) = (model.q_width(), model.kv_width());
        let raw = if model.qk_norm { q + kv } else { 0 };
        let values = 3 * model.shape.hidden + raw + 2 * q + 2 * kv + 3 * model.shape.inner;
        values * size_of::<T>() + model.shape.heads * size_of::<f32>()
    }
}

/// Scratch of the backward pass.
pub(super) struct Backward<T> {
    /// The gradient of the residual stream.
    pub dx: DeviceBuffer<T>,
    pub dnormed: DeviceBuffer<T>,
    /// What a norm adds to it.
    pub added: DeviceBuffer<T>,
    pub dact: DeviceBuffer<T>,
    pub dgate: DeviceBuffer<T>,
    pub dup: DeviceBuffer<T>,
    pub dheads: DeviceBuffer<T>,
    pub dq: DeviceBuffer<T>,
    pub dk: DeviceBuffer<T>,
    pub dv: DeviceBuffer<T>,
    pub deltas: DeviceBuffer<f32>,
    /// `1/rms` of the rows of a norm, and parts of its weights' gradient.
    pub inverse: DeviceBuffer<f32>,
    pub parts: DeviceBuffer<f32>,
    /// A column of ones: gradients of biases are products with it.
    pub ones: DeviceBuffer<T>,
}

impl<T: Compute> Backward<T> {
    fn new(on: &Room<'_>, model: &Model) -> Result<Self, Error> {
        let (hidden, inner) = (model.shape.hidden, model.shape.inner);
        let (q, kv) = (model.q_width(), model.kv_width());
        let mut ones = on.rows(1)?;
        ones.write(&on.device.stream()?, &vec![T::round(1.0); on.rows])?;
        Ok(Self {
            dx: on.rows(hidden)?,
            dnormed: on.rows(hidden)?,
            added: on.rows(hidden)?,
            dact: on.rows(inner)?,
            dgate: on.rows(inner)?,
            dup: on.rows(inner)?,
            dheads: on.rows(q)?,
            dq: on.rows(q)?,
            dk: on.rows(kv)?,
            dv: on.rows(kv)?,
            deltas: on.rows(model.shape.heads)?,
            inverse: on.rows(norm_rows(model))?,
            parts: on.card(parts_len(model, on.rows))?,
            ones,
        })
    }

    fn bytes(model: &Model, rows: usize) -> usize {
        let values =
            3 * model.shape.hidden + 3 * model.shape.inner + 2 * model.q_width() + 2 * model.kv_width() + 1;
        let numbers = model.shape.heads + norm_rows(model);
        rows * (values * size_of::<T>() + numbers * size_of::<f32>())
            + parts_len(model, rows) * size_of::<f32>()
    }
}

/// Rows of the norm with the most of them, per row of the batch.
fn norm_rows(model: &Model) -> usize {
    if model.qk_norm { model.shape.heads } else { 1 }
}

/// Scratch for the gradient of the largest norm.
fn parts_len(model: &Model, rows: usize) -> usize {
    let stream = rms_norm_backward_parts(rows, model.shape.hidden);
    let heads = rms_norm_backward_parts(rows * model.shape.heads, model.shape.head_dim);
    if model.qk_norm { stream.max(heads) } else { stream }
}

/// What the loss is computed in, a few rows at a time.
pub(super) struct Loss<T> {
    pub normed: DeviceBuffer<T>,
    pub logits: DeviceBuffer<f32>,
    pub slopes: DeviceBuffer<T>,
    pub nll: DeviceBuffer<f64>,
}

impl<T: Compute> Loss<T> {
    fn new(on: &Room<'_>, model: &Model, chunk: usize) -> Result<Self, Error> {
        let (hidden, vocab) = (model.shape.hidden, model.shape.vocab);
        Ok(Self {
            normed: on.rows(hidden)?,
            logits: on.card(chunk * vocab)?,
            slopes: on.card(chunk * vocab)?,
            nll: on.rows(1)?,
        })
    }

    fn bytes(model: &Model, rows: usize, chunk: usize) -> usize {
        let logit = size_of::<f32>() + size_of::<T>();
        rows * (model.shape.hidden * size_of::<T>() + size_of::<f64>()) + chunk * model.shape.vocab * logit
    }
}

/// Everything that passes are computed in.
pub(super) struct Space<T> {
    /// Each block's input, and the last one's output.
    pub streams: Vec<DeviceBuffer<T>>,
    /// One per block, or one for all where blocks are computed again.
    pub saved: Vec<Saved<T>>,
    pub backward: Backward<T>,
    pub loss: Loss<T>,
    pub batch: BatchOnCard,
}

impl<T: Compute> Space<T> {
    pub fn new(device: &Arc<Device>, model: &Model, settings: &Settings) -> Result<Self, Error> {
        let on = Room { device, rows: settings.rows };
        let streams = (0..=model.num_blocks()).map(|_| on.rows(model.shape.hidden));
        Ok(Self {
            streams: streams.collect::<Result<_, _>>()?,
            saved: (0..count(model, settings)).map(|_| Saved::new(&on, model)).collect::<Result<_, _>>()?,
            backward: Backward::new(&on, model)?,
            loss: Loss::new(&on, model, settings.chunk())?,
            batch: BatchOnCard::new(&on, model)?,
        })
    }

    /// What [`Self::new`] takes.
    pub fn needs(model: &Model, settings: &Settings, needs: &mut Needs) {
        let rows = settings.rows;
        let streams = (model.num_blocks() + 1) * rows * model.shape.hidden * size_of::<T>();
        let saved = count(model, settings) * rows * Saved::<T>::bytes_of_row(model);
        let loss = Loss::<T>::bytes(model, rows, settings.chunk());
        let bytes =
            streams + saved + Backward::<T>::bytes(model, rows) + loss + BatchOnCard::bytes(model, rows);
        needs.add(Tier::Device, Kind::Activations, bytes);
    }
}

/// Blocks whose activations are kept at once.
fn count(model: &Model, settings: &Settings) -> usize {
    if settings.recompute { 1 } else { model.num_blocks() }
}

/// Where buffers are made, and the rows of each.
pub(super) struct Room<'a> {
    device: &'a Arc<Device>,
    pub rows: usize,
}

impl Room<'_> {
    pub fn rows<U: Pod>(&self, width: usize) -> Result<DeviceBuffer<U>, Error> {
        self.card(self.rows * width)
    }

    pub fn card<U: Pod>(&self, len: usize) -> Result<DeviceBuffer<U>, Error> {
        DeviceBuffer::new(self.device, Kind::Activations, len)
    }
}
