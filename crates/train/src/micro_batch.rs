//! Sequences → one forward pass: documents one after another, each row with the label it must predict.

use hearth_data::Sequence;
use std::ops::Range;
use std::sync::Arc;

/// Target of a row that predicts nothing.
const NONE: i32 = -1;

/// What one forward and backward pass works on. Positions restart with each document.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// Token ids of all documents, one after another.
    pub ids: Arc<[u32]>,
    /// The id each row must predict, negative for none: its successor's label within the same document.
    pub targets: Arc<[i32]>,
    /// Lengths of the documents.
    pub documents: Arc<[usize]>,
    /// Lengths of the sequences, each of one or more documents.
    pub sequences: Arc<[usize]>,
    /// Log-likelihood of each sequence under a reference model; empty if there is none, or while nobody computed them.
    pub reference: Arc<[f64]>,
}

impl MicroBatch {
    /// Concatenates sequences. Labels stand beside their tokens; the shift happens here.
    pub fn new(sequences: &[Sequence]) -> Self {
        let documents: Vec<usize> = sequences.iter().flat_map(|s| s.documents.iter().copied()).collect();
        let ids: Arc<[u32]> = sequences.iter().flat_map(|s| s.ids.iter().copied()).collect();
        let labels: Vec<i32> = sequences.iter().flat_map(|s| s.labels.iter().copied()).collect();
        let mut targets = Vec::with_capacity(labels.len());
        let mut start = 0;
        for len in documents.iter().copied().filter(|len| *len > 0) {
            let document = &labels[start..start + len];
            targets.extend(document[1..].iter().map(|label| if *label < 0 { NONE } else { *label }));
            targets.push(NONE);
            start += len;
        }
        let lengths = sequences.iter().map(|s| s.ids.len()).collect();
        Self {
            ids,
            targets: targets.into(),
            documents: documents.into(),
            sequences: lengths,
            reference: [].into(),
        }
    }

    /// The rows of each sequence.
    pub fn rows_of_each(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.sequences.iter().scan(0, |end, len| {
            *end += len;
            Some(*end - len..*end)
        })
    }

    /// Rows that predict something.
    pub fn trained(&self) -> u64 {
        self.targets.iter().filter(|t| **t >= 0).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_next_labels_within_each_document() {
        let packed = Sequence {
            ids: vec![1, 2, 3, 4, 5],
            labels: vec![-100, 2, -100, -100, 5],
            documents: vec![3, 2],
            ..Default::default()
        };
        let single = Sequence { ids: vec![6], labels: vec![-100], documents: vec![1], ..Default::default() };
        let batch = MicroBatch::new(&[packed, single]);
        assert_eq!(*batch.ids, [1, 2, 3, 4, 5, 6]);
        assert_eq!(*batch.documents, [3, 2, 1]);
        assert_eq!(*batch.targets, [2, -1, -1, 5, -1, -1]);
        assert_eq!(batch.trained(), 2);
        assert_eq!(batch.rows_of_each().collect::<Vec<_>>(), [0..5, 5..6]);
    }
}
