//! Examples → sequences of bounded length.

use crate::{Example, Half, IGNORE, Sequence};

/// Sequences that may still take a document. More fill better, and cost a longer search for each example.
const OPEN_SEQUENCES: usize = 64;

impl From<Example> for Sequence {
    /// One example alone in its sequence; its place is 0 until [`number`] says otherwise.
    fn from(example: Example) -> Self {
        let mut sequence = Self { half: example.half, ..Default::default() };
        sequence.append(example);
        sequence
    }
}

impl Sequence {
    /// Adds a document. Its first label becomes [`IGNORE`]: the token before it belongs to another document.
    fn append(&mut self, example: Example) {
        let first = self.ids.len();
        self.documents.push(example.ids.len());
        self.ids.extend(example.ids);
        self.labels.extend(example.labels);
        if let Some(label) = self.labels.get_mut(first) {
            *label = IGNORE;
        }
    }

    /// Tokens of the sequence.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether the sequence has no tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Tokens that are predicted and count towards the loss.
    pub fn trained_tokens(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE).count()
    }
}

/// Packs examples greedily: each goes into the first of the last 64 opened sequences that has room for it, else
/// into a new one. Examples must not be longer than `max_seq_len`; the caller has truncated them.
///
/// The result depends on the examples and their order alone. No sequence is padded, and within a sequence documents
/// stand in the order in which they came.
pub fn pack(examples: Vec<Example>, max_seq_len: usize) -> Vec<Sequence> {
    let mut sequences: Vec<Sequence> = Vec::new();
    let mut open: Vec<usize> = Vec::new();
    for example in examples {
        debug_assert!(example.ids.len() <= max_seq_len);
        let fits = |&&index: &&usize| sequences[index].len() + example.ids.len() <= max_seq_len;
        match open.iter().find(fits).copied() {
            Some(index) => {
                sequences[index].append(example);
                // A document needs two tokens to train one: less room than that is none.
                open.retain(|&i| i != index || sequences[i].len() + 2 <= max_seq_len);
            }
            None => {
                if open.len() == OPEN_SEQUENCES {
                    open.remove(0);
                }
                open.push(sequences.len());
                sequences.push(example.into());
            }
        }
    }
    sequences
}

/// Numbers sequences by their places. The halves of a pair get the same number.
pub fn number(sequences: &mut [Sequence]) {
    let mut next = 0;
    for sequence in sequences {
        sequence.example = next;
        next += u64::from(sequence.half != Some(Half::Chosen));
    }
}

/// One example per sequence.
pub fn unpacked(examples: Vec<Example>) -> Vec<Sequence> {
    examples.into_iter().map(Sequence::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Examples with every id distinct, so that each token can be followed.
    fn examples(lengths: &[usize]) -> Vec<Example> {
        let mut next = 0;
        lengths
            .iter()
            .map(|&len| {
                let ids: Vec<u32> = (next..next + len as u32).collect();
                next += len as u32;
                Example { labels: ids.iter().map(|&id| id as i32).collect(), ids, half: None }
            })
            .collect()
    }

    proptest! {
        #[test]
        fn packing_loses_nothing_keeps_order_and_bound(lengths in prop::collection::vec(1usize..20, 0..300)) {
            let given = examples(&lengths);
            let packed = pack(given.clone(), 20);
            let mut documents = Vec::new();
            for sequence in &packed {
                prop_assert!(sequence.len() <= 20);
                prop_assert_eq!(sequence.documents.iter().sum::<usize>(), sequence.len());
                prop_assert_eq!(sequence.labels.len(), sequence.len());
                let mut start = 0;
                let mut last = None;
                for &len in &sequence.documents {
                    let ids = sequence.ids[start..start + len].to_vec();
                    prop_assert_eq!(sequence.labels[start], IGNORE);
                    for k in start + 1..start + len {
                        prop_assert_eq!(sequence.labels[k], sequence.ids[k] as i32);
                    }
                    prop_assert!(last < Some(ids[0]));
                    last = Some(ids[0]);
                    documents.push(ids);
                    start += len;
                }
            }
            documents.sort();
            let expected: Vec<Vec<u32>> = given.into_iter().map(|e| e.ids).collect();
            prop_assert_eq!(documents, expected);
        }
    }

    #[test]
    fn packing_fills_gaps_left_earlier() {
        let packed = pack(examples(&[6, 6, 4, 4]), 10);
        assert_eq!(packed.iter().map(|s| s.documents.clone()).collect::<Vec<_>>(), [[6, 4], [6, 4]]);
    }

    #[test]
    fn without_packing_each_example_stands_alone() {
        let mut sequences = unpacked(examples(&[3, 2]));
        number(&mut sequences);
        let (ids, labels, documents) = (vec![3, 4], vec![IGNORE, 4], vec![2]);
        assert_eq!(sequences[1], Sequence { ids, labels, documents, example: 1, half: None });
        assert_eq!(sequences[0].trained_tokens(), 2);
    }
}
