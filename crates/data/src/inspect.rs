//! What a dataset looks like to the trainer: which pieces of text are trained.

use crate::error::Error;
use crate::tokenizer::Tokenizer;
use crate::{Half, IGNORE, Sequence};
use serde::Serialize;

/// A stretch of text whose tokens are all trained, or all not.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Piece {
    /// The text; token ids separated by spaces where there is no tokenizer.
    pub text: String,
    /// Whether its tokens count towards the loss.
    pub trained: bool,
}

/// A preference pair in pieces: the prompt once, and what each reply goes on with.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairPieces {
    /// The tokens that both halves begin with and do not train.
    pub prompt: Vec<Piece>,
    /// The rest of the half with the better reply.
    pub chosen: Vec<Piece>,
    /// The rest of the half with the worse reply.
    pub rejected: Vec<Piece>,
}

/// How much data there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Examples: documents when packed; a preference pair is one.
    pub examples: usize,
    /// All tokens.
    pub tokens: usize,
    /// Tokens that count towards the loss.
    pub trained_tokens: usize,
}

/// Counts what `sequences` hold.
pub fn counts(sequences: &[Sequence]) -> Counts {
    sequences.iter().fold(Counts::default(), |sum, sequence| Counts {
        examples: match sequence.half {
            Some(Half::Rejected) => sum.examples,
            _ => sum.examples + sequence.documents.len(),
        },
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

/// The first `limit` preference pairs among `sequences`; none where they are no pairs.
///
/// # Errors
/// When the tokenizer cannot decode.
pub fn sample_pairs(
    sequences: &[Sequence],
    tokenizer: Option<&Tokenizer>,
    limit: usize,
) -> Result<Vec<PairPieces>, Error> {
    let is_pair = |pair: &&[Sequence]| pair[0].half.is_some();
    sequences.chunks_exact(2).filter(is_pair).take(limit).map(|pair| pair_pieces(pair, tokenizer)).collect()
}

fn pair_pieces(pair: &[Sequence], tokenizer: Option<&Tokenizer>) -> Result<PairPieces, Error> {
    let tokens = |half: &Sequence| -> Vec<(u32, i32)> {
        half.ids.iter().copied().zip(half.labels.iter().copied()).collect()
    };
    let (chosen, rejected) = (tokens(&pair[0]), tokens(&pair[1]));
    let same = |(a, b): &(&(u32, i32), &(u32, i32))| a == b && a.1 == IGNORE;
    let prompt = chosen.iter().zip(&rejected).take_while(same).count();
    // Each half is decoded as a whole: what a token says may depend on what stands before it.
    let (chosen, rejected) = (texts(&pair[0], tokenizer)?, texts(&pair[1], tokenizer)?);
    Ok(PairPieces {
        prompt: joined(&chosen[..prompt]),
        chosen: joined(&chosen[prompt..]),
        rejected: joined(&rejected[prompt..]),
    })
}

fn texts(half: &Sequence, tokenizer: Option<&Tokenizer>) -> Result<Vec<Piece>, Error> {
    token_pieces(&half.ids, &half.labels, tokenizer)
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
    Ok(joined(&token_pieces(ids, labels, tokenizer)?))
}

/// The text that each token adds.
fn token_pieces(ids: &[u32], labels: &[i32], tokenizer: Option<&Tokenizer>) -> Result<Vec<Piece>, Error> {
    let mut stream = tokenizer.map(|t| t.stream(false));
    let mut out: Vec<Piece> = Vec::with_capacity(ids.len());
    for (&id, &label) in ids.iter().zip(labels) {
        let text = match &mut stream {
            Some(stream) => stream.push(id)?,
            None => format!("{id} "),
        };
        out.push(Piece { text, trained: label != IGNORE });
    }
    if let (Some(mut stream), Some(last)) = (stream, out.last_mut()) {
        last.text.push_str(&stream.flush()?);
    }
    Ok(out)
}

/// Neighbours that are alike in being trained or not, as one.
fn joined(tokens: &[Piece]) -> Vec<Piece> {
    let mut out: Vec<Piece> = Vec::new();
    for token in tokens.iter().filter(|token| !token.text.is_empty()) {
        match out.last_mut() {
            Some(last) if last.trained == token.trained => last.text.push_str(&token.text),
            _ => out.push(token.clone()),
        }
    }
    out
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
            ..Default::default()
        };
        let piece = |text: &str, trained| Piece { text: text.into(), trained };
        let shown = sample(std::slice::from_ref(&sequence), None, 5).expect("shows");
        assert_eq!(
            shown,
            [vec![piece("1 ", false), piece("2 3 ", true)], vec![piece("4 ", false), piece("5 ", true)]]
        );
        assert_eq!(counts(&[sequence]), Counts { examples: 2, tokens: 5, trained_tokens: 3 });
    }

    #[test]
    fn a_pair_shows_its_prompt_once_and_counts_once() {
        let half = |ids: [u32; 4], half| Sequence {
            ids: ids.to_vec(),
            labels: vec![IGNORE, IGNORE, ids[2] as i32, ids[3] as i32],
            documents: vec![4],
            example: 0,
            half: Some(half),
        };
        let pair = [half([1, 2, 3, 9], Half::Chosen), half([1, 2, 4, 9], Half::Rejected)];
        let shown = sample_pairs(&pair, None, 5).expect("shows");
        let piece = |text: &str, trained| vec![Piece { text: text.into(), trained }];
        let (prompt, chosen, rejected) = (piece("1 2 ", false), piece("3 9 ", true), piece("4 9 ", true));
        assert_eq!(shown, [PairPieces { prompt, chosen, rejected }]);
        assert_eq!(counts(&pair), Counts { examples: 1, tokens: 8, trained_tokens: 4 });
        assert_eq!(sample_pairs(&[Sequence::default(), Sequence::default()], None, 5).expect("none"), []);
    }
}
