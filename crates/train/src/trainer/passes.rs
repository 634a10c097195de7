//! The two halves of a step, the passes through the model and the update.

use super::Trainer;
use crate::Error;
use crate::beside::Handover;
use crate::metrics::DiskReport;
use crate::micro_batch::MicroBatch;
use crate::objective::Sums;
use crate::random::key;
use crate::reduce::{Reduced, Reducer};
use crate::update::Updater;
use hearth_memory::nvme::NvmeFile;
use hearth_memory::stream::Throughput;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a step's micro-batches came to.
pub(super) struct Accumulated {
    pub(super) reduced: Reduced,
    /// Over all micro-batches.
    pub(super) sums: Sums,
    /// Whether some rank was asked to stop.
    pub(super) stop: bool,
}

impl Trainer {
    /// Gradients of this rank's micro-batches, reduced over all ranks; and where that is done beside them, the update at
    /// learning rate `lr`.
    pub(super) fn accumulate(
        &self,
        step: u64,
        batches: &[MicroBatch],
        stop: &AtomicBool,
        lr: f64,
        gradient_scale: f32,
    ) -> Result<Accumulated, Error> {
        let rule =
            || self.config.optim.step(self.progress.updates + 1, lr, gradient_scale).seeded(self.config.seed);
        let handover = self.beside.as_ref().map(|beside| beside.begin(rule()));
        self.passes(step, batches, stop, handover)
    }

    /// Forward and backward over this rank's micro-batches.
    fn passes(
        &self,
        step: u64,
        batches: &[MicroBatch],
        stop: &AtomicBool,
        handover: Option<Handover<'_>>,
    ) -> Result<Accumulated, Error> {
        let (sizes, spill) = (self.sizes(), self.spill.as_ref());
        let mut reducer = Reducer::new(sizes, self.assignment, &self.comm, &self.ledger, spill, handover);
        let mut sent = Vec::new();
        for turn in 0..self.assignment.each() {
            let index = self.assignment.index(self.comm.rank(), turn);
            let dropout = Some(key(&[self.config.seed, step, index as u64]));
            let mut sink = |param, gradient| reducer.put(turn, param, gradient);
            sent.extend(self.block_loop(dropout).gradients(&batches[index], &mut sink)?.to_array());
            reducer.settle()?;
        }
        let reduced = reducer.finish()?;
        sent.push(if stop.load(Ordering::Relaxed) { 1.0 } else { 0.0 });
        let each = sent.len();
        let all = self.comm.all_gather(sent).wait()?;
        // One order whoever computed them.
        let mut by_index = vec![Sums::default(); batches.len()];
        for (rank, sums) in all.chunks(each).enumerate() {
            for (turn, sums) in sums.chunks_exact(Sums::LEN).enumerate() {
                by_index[self.assignment.index(rank, turn)] = Sums::from_slice(sums);
            }
        }
        let stop = all.chunks(each).any(|sums| sums[each - 1] > 0.0);
        let mut sums = Sums::default();
        by_index.into_iter().for_each(|of_one| sums += of_one);
        Ok(Accumulated { reduced, sums, stop })
    }

    /// Sum of squares of the whole gradient: chunk after chunk in execution order, whoever holds it.
    pub(super) fn sum_squares(&self, reduced: &Reduced) -> Result<f64, Error> {
        let own: Vec<f64> = reduced.squares.iter().flatten().copied().collect();
        let each = own.len();
        let all = self.comm.all_gather(own).wait()?;
        let (mut sum, mut before) = (0.0, 0);
        for unit in &reduced.squares {
            for rank in all.chunks(each) {
                rank[before..before + unit.len()].iter().for_each(|square| sum += square);
            }
            before += unit.len();
        }
        Ok(sum)
    }

    pub(super) fn update(
        &mut self,
        lr: f64,
        gradient_scale: f32,
        reduced: Reduced,
    ) -> Result<Throughput, Error> {
        let step = self.config.optim.step(self.progress.updates, lr, gradient_scale).seeded(self.config.seed);
        let layout = self.store.layout().clone();
        let updater = Updater {
            layout: &layout,
            config: &self.config,
            comm: &self.comm,
            ledger: &self.ledger,
            spill: self.spill.as_ref(),
        };
        updater.run(&mut self.state, self.store.copies_mut(), reduced, &step)
    }

    /// Waits until nothing is still to be updated.
    ///
    /// # Errors
    /// Why an update failed that ran beside the passes.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        self.store.copies().gate().await_all()
    }

    /// Bytes this rank read from its files on the nvme tier and wrote to them so far; `None` if it has none.
    pub(super) fn disk_moved(&self) -> Option<[u64; 2]> {
        let files = [
            self.store.copies().file().map(|file| &**file),
            self.spill.as_ref().map(|spill| &*spill.file),
            self.state.on_disk().map(|(file, _)| &**file),
        ];
        let moved = files.into_iter().flatten().map(NvmeFile::moved);
        moved.reduce(|[read, written], more| [read + more[0], written + more[1]])
    }

    /// What was moved since, and what the passes waited for.
    pub(super) fn disk_report(&self, before: Option<[u64; 2]>) -> Option<DiskReport> {
        let ([read, written], now) = (before?, self.disk_moved()?);
        Some(DiskReport {
            disk_read_bytes: now[0] - read,
            disk_written_bytes: now[1] - written,
            wait_params_s: self.store.copies().waited().take_s(),
            wait_grads_s: self.beside.as_ref().map_or(0.0, |beside| beside.waited.take_s())
                + self.spill.as_ref().map_or(0.0, |spill| spill.waited.take_s()),
            ..DiskReport::default()
        })
    }
}
