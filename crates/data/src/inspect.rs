//! What a dataset looks like to the trainer: which pieces of text are trained.

use crate::error::Error;
use crate::tokenizer::Tokenizer;
use crate::{IGNORE, Sequence};
use serde::Serialize;

/// A stretch of text whose tokens are all trained, or all not.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Piece {
    /// The text; token ids separated by spaces where there is no tokenizer.
    pub text: String,
    /// Whether its tokens count towards the loss.
    pub trained: bool,
}

/// How much data there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Examples (documents, when packed).
    pub examples: usize,
    /// All tokens.
    pub tokens: usize,
    /// Tokens that count towards the loss.
    pub trained_tokens: usize,
}

/// Counts what `sequences` hold.
pub fn counts(sequences: &[Sequence]) -> Counts {
    sequences.iter().fold(Counts::default(), |sum, sequence| Counts {
        examples: sum.examples + sequence.documents.len(),
        tokens: sum.tokens + sequence.len(),
        trained_tokens: sum.trained_tokens + sequence.trained_tokens(),
    })
}

/// The documents of the first sequences, `limit` documents at most, as pieces in order.
///
/// # Errors
/// When the tokenizer cannot decode.
pub fn sample(
    sequences: &[Sequence],
    tokenizer: Option<&Tokenizer>,
    limit: usize,
) -> Result<Vec<Vec<Piece>>, Error> {
    sequences
        .iter()
        .flat_map(documents)
        .take(limit)
        .map(|(ids, labels)| pieces(ids, labels, tokenizer))
        .collect()
}

/// Each document's ids and labels.
fn documents(sequence: &Sequence) -> impl Iterator<Item = (&[u32], &[i32])> {
    let mut start = 0;
    sequence.documents.iter().map(move |&len| {
        let range = start..start + len;
        start += len;
        (&sequence.ids[range.clone()], &sequence.labels[range])
    })
}

/// One document as pieces: texts of neighbouring tokens that are alike in being trained or not. Special tokens are
/// shown. A character spread over trained and untrained tokens goes with the token that completes it.
///
/// # Errors
/// When the tokenizer cannot decode.
pub fn pieces(ids: &[u32], labels: &[i32], tokenizer: Option<&Tokenizer>) -> Result<Vec<Piece>, Error> {
    let mut stream = tokenizer.map(|t| t.stream(false));
    let mut out: Vec<Piece> = Vec::new();
    for (&id, &label) in ids.iter().zip(labels) {
        let text = match &mut stream {
            Some(stream) => stream.push(id)?,
            None => format!("{id} "),
        };
        push(&mut out, text, label != IGNORE);
    }
    if let Some(mut stream) = stream {
        let trained = out.last().is_some_and(|piece| piece.trained);
        push(&mut out, stream.flush()?, trained);
    }
    Ok(out)
}

fn push(pieces: &mut Vec<Piece>, text: String, trained: bool) {
    match pieces.last_mut() {
        _ if text.is_empty() => {}
        Some(last) if last.trained == trained => last.text.push_str(&text),
        _ => pieces.push(Piece { text, trained }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_tokens_join_and_documents_stay_apart() {
        let sequence = Sequence {
            ids: vec![1, 2, 3, 4, 5],
            labels: vec![IGNORE, 2, 3, IGNORE, 5],
            documents: vec![3, 2],
        };
        let piece = |text: &str, trained| Piece { text: text.into(), trained };
        let shown = sample(std::slice::from_ref(&sequence), None, 5).expect("shows");
        assert_eq!(
            shown,
            [vec![piece("1 ", false), piece("2 3 ", true)], vec![piece("4 ", false), piece("5 ", true)]]
        );
        assert_eq!(counts(&[sequence]), Counts { examples: 2, tokens: 5, trained_tokens: 3 });
    }
}
