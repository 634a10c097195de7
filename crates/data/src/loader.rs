//! The order in which sequences are trained, and a cursor that finds its way back into it.
//!
//! What is shuffled and counted is a *unit*: one sequence or, in preference data, the two halves of a pair.

use crate::error::Error;
use crate::rng::permutation;
use crate::{Batch, Half, Sequence};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A place in the order: `index` units (sequences, or preference pairs) of `epoch` have been handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Passes over the data completed.
    pub epoch: u64,
    /// Units handed out in this pass.
    pub index: u64,
}

/// Hands out sequences step by step: each epoch in an order of its own that depends on seed and epoch alone.
/// A step that reaches the end of an epoch goes on into the next, so every step has the same number of sequences.
/// The halves of a preference pair stay together, chosen first, and count as one.
pub struct Loader {
    sequences: Arc<[Sequence]>,
    /// Sequences of a unit: 1, or 2 where they are pairs.
    unit: usize,
    seed: u64,
    global_batch: usize,
    cursor: Cursor,
    order: Vec<usize>,
}

impl Loader {
    /// A loader at the beginning. `global_batch` is the number of sequences, or of preference pairs, of one
    /// optimizer step.
    ///
    /// # Errors
    /// When there is nothing to hand out, `global_batch` is 0, or half of a pair stands without the other.
    pub fn new(sequences: impl Into<Arc<[Sequence]>>, seed: u64, global_batch: usize) -> Result<Self, Error> {
        let sequences = sequences.into();
        if sequences.is_empty() {
            return Err(Error::Empty("there is no sequence to train on".into()));
        }
        if global_batch == 0 {
            return Err(Error::Setting("global_batch is 0; a step needs at least one sequence".into()));
        }
        let unit = sequences_per_unit(&sequences);
        check_pairs(&sequences, unit)?;
        let order = permutation(sequences.len() / unit, seed, 0);
        Ok(Self { sequences, unit, seed, global_batch, cursor: Cursor::default(), order })
    }

    /// The sequences of the next step, in global order: the trainer cuts them into micro-batches.
    pub fn next_step(&mut self) -> Vec<Sequence> {
        let mut step = Vec::with_capacity(self.global_batch.min(self.order.len()) * self.unit);
        for _ in 0..self.global_batch {
            step.extend_from_slice(self.next_unit());
        }
        step
    }

    fn next_unit(&mut self) -> &[Sequence] {
        if self.cursor.index as usize == self.order.len() {
            self.enter(Cursor { epoch: self.cursor.epoch + 1, index: 0 });
        }
        let start = self.order[self.cursor.index as usize] * self.unit;
        self.cursor.index += 1;
        &self.sequences[start..start + self.unit]
    }

    fn enter(&mut self, cursor: Cursor) {
        if cursor.epoch != self.cursor.epoch {
            self.order = permutation(self.len(), self.seed, cursor.epoch);
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
        let len = self.len();
        if cursor.index > len as u64 {
            return Err(Error::Setting(format!(
                "the saved position is {what} {} of an epoch, but the data has {len} {what}s: it has changed since",
                cursor.index,
                what = if self.unit == 2 { "pair" } else { "sequence" },
            )));
        }
        self.enter(cursor);
        Ok(())
    }

    /// Units of one epoch: sequences, or preference pairs.
    pub fn len(&self) -> usize {
        self.sequences.len() / self.unit
    }

    /// Whether there is nothing to hand out; never true of a loader that could be made.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Steps after which every sequence has been handed out once, rounded up.
    pub fn steps_per_epoch(&self) -> usize {
        self.len().div_ceil(self.global_batch)
    }

    /// All sequences in the order of their places, not shuffled: for what is computed once for each.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }
}

/// Sequences that belong together: 2 where they are the halves of preference pairs, else 1.
pub fn sequences_per_unit(sequences: &[Sequence]) -> usize {
    if sequences.first().is_some_and(|s| s.half.is_some()) { 2 } else { 1 }
}

/// Every sequence is half of a pair and stands beside the other, or none is.
fn check_pairs(sequences: &[Sequence], unit: usize) -> Result<(), Error> {
    let whole = |unit: &[Sequence]| match unit {
        [one] => one.half.is_none(),
        [chosen, rejected] => {
            (chosen.half, rejected.half) == (Some(Half::Chosen), Some(Half::Rejected))
                && chosen.example == rejected.example
        }
        _ => false,
    };
    let odd = sequences.chunks(unit).position(|chunk| chunk.len() != unit || !whole(chunk));
    match odd {
        None => Ok(()),
        Some(index) => Err(Error::Setting(format!(
            "sequence {} is not what the first one is: preference data is pairs of a chosen and a rejected sequence \
             with the same place, and nothing else",
            index * unit
        ))),
    }
}

/// Cuts the sequences of a step into micro-batches of at most `micro_batch` units: sequences, or preference pairs,
/// whose halves stay together.
pub fn micro_batches(step: Vec<Sequence>, micro_batch: usize) -> Vec<Batch> {
    let size = micro_batch.max(1).saturating_mul(sequences_per_unit(&step));
    let mut rest = step.into_iter();
    let mut next = || Batch { sequences: rest.by_ref().take(size).collect() };
    std::iter::from_fn(|| Some(next()).filter(|batch| !batch.sequences.is_empty())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IGNORE;
    use proptest::prelude::*;

    fn sequences(count: usize) -> Vec<Sequence> {
        (0..count as u32)
            .map(|i| Sequence {
                ids: vec![i, i],
                labels: vec![IGNORE, i as i32],
                documents: vec![2],
                example: u64::from(i),
                half: None,
            })
            .collect()
    }

    /// Pair `i` is the sequences `2i` and `2i + 1`.
    fn pairs(count: usize) -> Vec<Sequence> {
        let mut all = sequences(2 * count);
        for (i, sequence) in all.iter_mut().enumerate() {
            sequence.half = Some(if i % 2 == 0 { Half::Chosen } else { Half::Rejected });
        }
        crate::pack::number(&mut all);
        all
    }

    fn loader(count: usize, seed: u64, batch: usize) -> Loader {
        Loader::new(sequences(count), seed, batch).expect("a loader")
    }

    fn pair_loader(count: usize, seed: u64, batch: usize) -> Loader {
        Loader::new(pairs(count), seed, batch).expect("a loader")
    }

    fn ids(step: &[Sequence]) -> Vec<u32> {
        step.iter().map(|s| s.ids[0]).collect()
    }

    proptest! {
        #[test]
        fn a_cursor_anywhere_reproduces_the_rest(
            count in 1usize..40, batch in 1usize..12, seed: u64, before in 0usize..20, paired: bool,
        ) {
            let new = if paired { pair_loader } else { loader };
            let mut first = new(count, seed, batch);
            for _ in 0..before {
                first.next_step();
            }
            let saved = serde_json::to_string(&first.cursor()).expect("serialises");
            let mut second = new(count, seed, batch);
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

    proptest! {
        #[test]
        fn pairs_are_shuffled_and_counted_as_sequences_are_and_never_parted(
            count in 1usize..40, batch in 1usize..12, micro in 1usize..6, seed: u64,
        ) {
            let mut single = loader(count, seed, batch);
            let mut paired = pair_loader(count, seed, batch);
            prop_assert_eq!(paired.len(), count);
            prop_assert_eq!(paired.steps_per_epoch(), single.steps_per_epoch());
            for _ in 0..10 {
                let places: Vec<u64> = single.next_step().iter().map(|s| s.example).collect();
                let step = paired.next_step();
                prop_assert_eq!(paired.cursor(), single.cursor());
                for (pair, &place) in step.chunks(2).zip(&places) {
                    prop_assert_eq!((pair[0].example, pair[1].example), (place, place));
                    prop_assert_eq!((pair[0].half, pair[1].half), (Some(Half::Chosen), Some(Half::Rejected)));
                    prop_assert_eq!(ids(pair), [2 * place as u32, 2 * place as u32 + 1]);
                }
                prop_assert_eq!(step.len(), 2 * places.len());
                let batches = micro_batches(step.clone(), micro);
                prop_assert_eq!(batches.len(), batch.div_ceil(micro));
                for batch in &batches {
                    prop_assert!(batch.sequences.len().is_multiple_of(2) && batch.sequences.len() <= 2 * micro);
                    prop_assert_eq!(batch.sequences[0].half, Some(Half::Chosen));
                }
                prop_assert_eq!(batches.into_iter().flat_map(|b| b.sequences).collect::<Vec<_>>(), step);
            }
        }
    }

    #[test]
    fn halves_without_their_partners_are_refused() {
        let swap = |mut all: Vec<Sequence>| {
            all.swap(0, 1);
            all
        };
        let strangers = |mut all: Vec<Sequence>| {
            all.swap(1, 3);
            all
        };
        let cases = [
            pairs(2)[..3].to_vec(),
            [pairs(1), sequences(2)].concat(),
            [sequences(2), pairs(1)].concat(),
            swap(pairs(2)),
            strangers(pairs(2)),
        ];
        for case in cases {
            let error = Loader::new(case, 0, 1).err().expect("refused").to_string();
            assert!(error.contains("pairs of a chosen and a rejected"), "{error}");
        }
        let error = pair_loader(3, 0, 1).seek(Cursor { epoch: 0, index: 4 }).expect_err("beyond").to_string();
        assert!(error.contains("pair 4") && error.contains("3 pairs"), "{error}");
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
