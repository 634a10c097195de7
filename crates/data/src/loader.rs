//! The order in which sequences are trained, and a cursor that finds its way back into it.

use crate::error::Error;
use crate::rng::permutation;
use crate::{Batch, Sequence};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A place in the order: `index` sequences of `epoch` have been handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Passes over the data completed.
    pub epoch: u64,
    /// Sequences handed out in this pass.
    pub index: u64,
}

/// Hands out sequences step by step: each epoch in an order of its own that depends on seed and epoch alone.
/// A step that reaches the end of an epoch goes on into the next, so every step has the same number of sequences.
pub struct Loader {
    sequences: Arc<[Sequence]>,
    seed: u64,
    global_batch: usize,
    cursor: Cursor,
    order: Vec<usize>,
}

impl Loader {
    /// A loader at the beginning. `global_batch` is the number of sequences of one optimizer step.
    ///
    /// # Errors
    /// When there is nothing to hand out, or `global_batch` is 0.
    pub fn new(sequences: impl Into<Arc<[Sequence]>>, seed: u64, global_batch: usize) -> Result<Self, Error> {
        let sequences = sequences.into();
        if sequences.is_empty() {
            return Err(Error::Empty("there is no sequence to train on".into()));
        }
        if global_batch == 0 {
            return Err(Error::Setting("global_batch is 0; a step needs at least one sequence".into()));
        }
        let order = permutation(sequences.len(), seed, 0);
        Ok(Self { sequences, seed, global_batch, cursor: Cursor::default(), order })
    }

    /// The sequences of the next step, in global order: the trainer cuts them into micro-batches.
    pub fn next_step(&mut self) -> Vec<Sequence> {
        (0..self.global_batch).map(|_| self.next_sequence()).collect()
    }

    fn next_sequence(&mut self) -> Sequence {
        if self.cursor.index as usize == self.order.len() {
            self.enter(Cursor { epoch: self.cursor.epoch + 1, index: 0 });
        }
        let sequence = self.sequences[self.order[self.cursor.index as usize]].clone();
        self.cursor.index += 1;
        sequence
    }

    fn enter(&mut self, cursor: Cursor) {
        if cursor.epoch != self.cursor.epoch {
            self.order = permutation(self.sequences.len(), self.seed, cursor.epoch);
        }
        self.cursor = cursor;
    }

    /// Where the next step begins.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Continues where another loader over the same sequences and seed stood.
    ///
    /// # Errors
    /// When the cursor lies beyond the data: it belongs to other data.
    pub fn seek(&mut self, cursor: Cursor) -> Result<(), Error> {
        let len = self.sequences.len();
        if cursor.index > len as u64 {
            return Err(Error::Setting(format!(
                "the saved position is sequence {} of an epoch, but the data has {len} sequences: it has changed since",
                cursor.index
            )));
        }
        self.enter(cursor);
        Ok(())
    }

    /// Sequences of one epoch.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there is nothing to hand out; never true of a loader that could be made.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Steps after which every sequence has been handed out once, rounded up.
    pub fn steps_per_epoch(&self) -> usize {
        self.sequences.len().div_ceil(self.global_batch)
    }
}

/// Cuts the sequences of a step into micro-batches of at most `micro_batch` sequences.
pub fn micro_batches(step: Vec<Sequence>, micro_batch: usize) -> Vec<Batch> {
    let mut rest = step.into_iter();
    let mut next = || Batch { sequences: rest.by_ref().take(micro_batch.max(1)).collect() };
    std::iter::from_fn(|| Some(next()).filter(|batch| !batch.sequences.is_empty())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IGNORE;
    use proptest::prelude::*;

    fn sequences(count: usize) -> Vec<Sequence> {
        (0..count as u32)
            .map(|i| Sequence { ids: vec![i, i], labels: vec![IGNORE, i as i32], documents: vec![2] })
            .collect()
    }

    fn loader(count: usize, seed: u64, batch: usize) -> Loader {
        Loader::new(sequences(count), seed, batch).expect("a loader")
    }

    fn ids(step: &[Sequence]) -> Vec<u32> {
        step.iter().map(|s| s.ids[0]).collect()
    }

    proptest! {
        #[test]
        fn a_cursor_anywhere_reproduces_the_rest(
            count in 1usize..40, batch in 1usize..12, seed: u64, before in 0usize..20,
        ) {
            let mut first = loader(count, seed, batch);
            for _ in 0..before {
                first.next_step();
            }
            let saved = serde_json::to_string(&first.cursor()).expect("serialises");
            let mut second = loader(count, seed, batch);
            second.seek(serde_json::from_str(&saved).expect("parses")).expect("in range");
            for _ in 0..10 {
                prop_assert_eq!(first.next_step(), second.next_step());
                prop_assert_eq!(first.cursor(), second.cursor());
            }
        }

        #[test]
        fn every_epoch_hands_out_every_sequence_once(count in 1usize..40, batch in 1usize..12, seed: u64) {
            let mut loader = loader(count, seed, batch);
            let mut stream = Vec::new();
            while stream.len() < 3 * count {
                stream.extend(ids(&loader.next_step()));
            }
            for epoch in stream.chunks_exact(count).take(3) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                prop_assert_eq!(epoch, (0..count as u32).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_batch_size_does_not_change_the_order() {
        let stream = |batch: usize| -> Vec<u32> {
            let mut loader = loader(10, 3, batch);
            (0..24 / batch).flat_map(|_| ids(&loader.next_step())).collect()
        };
        assert_eq!(stream(2), stream(8));
        assert_eq!(stream(2), stream(24));
    }

    #[test]
    fn epochs_and_seeds_have_orders_of_their_own() {
        let mut a = loader(32, 0, 32);
        let first = a.next_step();
        assert_ne!(first, a.next_step());
        assert_ne!(first, loader(32, 1, 32).next_step());
    }

    #[test]
    fn impossible_loaders_and_cursors_are_refused() {
        assert!(Loader::new(Vec::new(), 0, 1).is_err());
        assert!(Loader::new(sequences(1), 0, 0).is_err());
        let error = loader(3, 0, 1).seek(Cursor { epoch: 0, index: 4 }).expect_err("beyond").to_string();
        assert!(error.contains("sequence 4") && error.contains("3 sequences"), "{error}");
    }

    #[test]
    fn steps_per_epoch_rounds_up_and_micro_batches_keep_order() {
        assert_eq!(loader(10, 0, 4).steps_per_epoch(), 3);
        let batches = micro_batches(sequences(5), 2);
        assert_eq!(
            batches.iter().map(|b| ids(&b.sequences)).collect::<Vec<_>>(),
            [vec![0, 1], vec![2, 3], vec![4]]
        );
    }
}
