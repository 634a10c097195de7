//! The head: the last norm, logits a few rows at a time, cross-entropy and its gradients.

use super::Trainer;
use super::block::{NormScratch, norm_backward};
use super::numbers::Compute;
use super::space::{Backward, Loss, Space};
use crate::ops::gemm::{Shape, gemm_nn};
use crate::ops::loss::cross_entropy;
use crate::ops::norm::rms_norm;
use crate::runtime::{Error, View};

impl<T: Compute> Trainer<T> {
    /// Losses without gradients; `all` gets the logits of a few rows after another.
    pub(super) fn loss_forward(&mut self, mut all: Option<&mut Vec<f32>>) -> Result<(), Error> {
        self.last_norm()?;
        let Self { plan, layout, space, weights, stream, .. } = self;
        let Space { loss: Loss { normed, logits, nll, .. }, batch, .. } = space;
        let (hidden, vocab) = (plan.model.shape.hidden, plan.model.shape.vocab);
        weights.with(stream, layout.of_output(&plan.model), |w| {
            let w = w.part(layout.output.range())?;
            for (first, count) in chunks(batch.rows(), plan.settings.chunk()) {
                let x = normed.part(first * hidden..(first + count) * hidden)?;
                let shape = Shape { m: count, n: vocab, k: hidden };
                T::logits(stream, x, w, shape, logits.part_mut(0..count * vocab)?)?;
                let targets = batch.targets(first, count)?;
                let of_chunk = logits.part(0..count * vocab)?;
                cross_entropy::<T>(stream, of_chunk, targets, nll.part_mut(first..first + count)?, None)?;
                if let Some(all) = &mut all {
                    let before = all.len();
                    all.resize(before + count * vocab, 0.0);
                    logits.read(stream, &mut all[before..])?;
                }
            }
            Ok(())
        })
    }

    /// Losses, the gradients of the head's weights, and in `dx` that of the last block's output.
    pub(super) fn loss_backward(&mut self, last: bool) -> Result<(), Error> {
        self.last_norm()?;
        // A tied embedding's gradient is complete only when the rows it was looked up by have been added.
        self.output_backward(last && !self.plan.model.tied)?;
        let Self { plan, layout, space, weights, gradients, stream, .. } = self;
        let Space { streams, backward, batch, .. } = space;
        let Backward { dx, dnormed, inverse, parts, .. } = backward;
        let (width, unit) = (batch.rows() * plan.model.shape.hidden, layout.head());
        let x = streams[plan.model.num_blocks()].part(0..width)?;
        let (dy, dx) = (dnormed.part(0..width)?, dx.part_mut(0..width)?);
        let range = layout.final_norm.range();
        weights.with(stream, unit, |w| {
            let w = w.part(range.clone())?;
            gradients.with(stream, unit, last, |gradient| {
                let scratch = NormScratch { inverse, parts };
                let into = gradient.part_mut(range)?;
                norm_backward(stream, plan.model.shape.eps, (x, w), dy, dx, scratch, into)
            })
        })
    }

    fn last_norm(&mut self) -> Result<(), Error> {
        let Self { plan, layout, space, weights, stream, .. } = self;
        let width = space.batch.rows() * plan.model.shape.hidden;
        let x = space.streams[plan.model.num_blocks()].part(0..width)?;
        let y = space.loss.normed.part_mut(0..width)?;
        weights.with(stream, layout.head(), |w| {
            rms_norm(stream, x, w.part(layout.final_norm.range())?, plan.model.shape.eps, y)
        })
    }

    /// Logits, losses and slopes of a few rows after another; in `dnormed` the gradient of what the output matrix multiplied.
    fn output_backward(&mut self, last: bool) -> Result<(), Error> {
        let Self { plan, layout, space, weights, gradients, stream, .. } = self;
        let Space { loss, backward, batch, .. } = space;
        let Loss { normed, logits, slopes, nll } = loss;
        let dnormed = &mut backward.dnormed;
        let (hidden, vocab) = (plan.model.shape.hidden, plan.model.shape.vocab);
        let (unit, range) = (layout.of_output(&plan.model), layout.output.range());
        // An untied output matrix shares its unit with the norm, whose gradient is still to come.
        let last = last && unit != layout.head();
        weights.with(stream, unit, |w| {
            let w: View<'_, T> = w.part(range.clone())?;
            gradients.with(stream, unit, last, |gradient| {
                for (first, count) in chunks(batch.rows(), plan.settings.chunk()) {
                    let (rows, len) = (first * hidden..(first + count) * hidden, count * vocab);
                    let x = normed.part(rows.clone())?;
                    let shape = Shape { m: count, n: vocab, k: hidden };
                    T::logits(stream, x, w, shape, logits.part_mut(0..len)?)?;
                    let (targets, nll) = (batch.targets(first, count)?, nll.part_mut(first..first + count)?);
                    let into = slopes.part_mut(0..len)?;
                    cross_entropy(stream, logits.part(0..len)?, targets, nll, Some(into))?;
                    let slopes = slopes.part(0..len)?;
                    let back = Shape { m: count, n: hidden, k: vocab };
                    gemm_nn(stream, slopes, w, back, false, dnormed.part_mut(rows)?)?;
                    let shape = Shape { m: vocab, n: hidden, k: count };
                    T::weight_gradient(stream, slopes, x, shape, gradient.part_mut(range.clone())?)?;
                }
                Ok(())
            })
        })
    }

    /// The sum of the last micro-batch's losses, in the order of its rows.
    pub(super) fn nll(&self) -> Result<f64, Error> {
        let mut rows = vec![0.0; self.space.batch.rows()];
        self.space.loss.nll.read(&self.stream, &mut rows)?;
        Ok(rows.iter().fold(0.0, |sum, nll| sum + nll))
    }
}

/// First row and count of each chunk.
fn chunks(rows: usize, chunk: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(chunk).map(move |first| (first, chunk.min(rows - first)))
}
