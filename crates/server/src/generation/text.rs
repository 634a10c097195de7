//! From token ids to text that may be shown.

use super::stops::{Passed, StopMatcher};
use super::{Echo, Piece};
use hearth_data::{Error, StreamDecoder, Tokenizer};
use hearth_engine::api::TokenLogprobs;
use std::collections::VecDeque;

/// Prompt tokens the decoder sees before the first generated one, so that a leading space is not taken for the
/// beginning of a text and a character begun in the prompt is completed.
const CONTEXT_TOKENS: usize = 8;

/// A token and where its text begins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ScoredToken {
    pub(crate) id: u32,
    /// Characters (not bytes) before it in the choice's text.
    pub(crate) offset: usize,
    /// If asked for. The first token of a prompt has none.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// Text of one sequence as it grows.
pub(super) struct SequenceText {
    /// `None`: a model without a tokenizer; all texts are empty.
    decoder: Option<StreamDecoder>,
    stops: StopMatcher,
    /// Characters decoded so far, shown or held back.
    decoded: usize,
    /// Characters shown.
    shown: usize,
    /// Tokens whose text is not shown yet.
    waiting: VecDeque<ScoredToken>,
    generated: usize,
    min_tokens: usize,
}

impl SequenceText {
    /// The text that follows `prompt`.
    pub(super) fn new(tokenizer: Option<&Tokenizer>, skip_special: bool, stops: StopMatcher) -> Self {
        Self {
            decoder: tokenizer.map(|tokenizer| tokenizer.stream(skip_special)),
            stops,
            decoded: 0,
            shown: 0,
            waiting: VecDeque::new(),
            generated: 0,
            min_tokens: 0,
        }
    }

    /// The same, where stop strings among the first `min_tokens` tokens do not count.
    pub(super) fn at_least(self, min_tokens: usize) -> Self {
        Self { min_tokens, ..self }
    }

    /// Reads the end of the prompt without showing it.
    pub(super) fn skip_prompt(&mut self, prompt: &[u32]) -> Result<(), Error> {
        for &id in &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..] {
            self.decode(id)?;
        }
        Ok(())
    }

    /// Shows the prompt: in the client's own words if it gave a text, else decoded.
    pub(super) fn echo(
        &mut self,
        prompt: &[u32],
        text: Option<&str>,
        logprobs: Vec<Option<TokenLogprobs>>,
    ) -> Result<Echo, Error> {
        let mut decoded = String::new();
        let mut tokens = Vec::with_capacity(prompt.len());
        let mut logprobs = logprobs.into_iter();
        let mut offset = 0;
        for &id in prompt {
            tokens.push(ScoredToken { id, offset, logprobs: logprobs.next().flatten() });
            let piece = self.decode(id)?;
            offset += piece.chars().count();
            decoded.push_str(&piece);
        }
        let text = text.map_or(decoded, str::to_owned);
        self.decoded = text.chars().count();
        self.shown = self.decoded;
        for token in &mut tokens {
            token.offset = token.offset.min(self.shown);
        }
        Ok(Echo { text, tokens })
    }

    /// Takes a generated token. `true` when a stop string has been met: the piece is the last.
    pub(super) fn push(&mut self, id: u32, logprobs: Option<TokenLogprobs>) -> Result<(Piece, bool), Error> {
        self.generated += 1;
        self.waiting.push_back(ScoredToken { id, offset: self.decoded, logprobs });
        let text = self.decode(id)?;
        self.decoded += text.chars().count();
        let passed = match self.generated < self.min_tokens {
            true => Passed { text, stopped: false },
            false => self.stops.push(&text),
        };
        let all = !passed.stopped && self.shown + passed.text.chars().count() == self.decoded;
        Ok((self.show(passed.text, all), passed.stopped))
    }

    /// Takes the last token, which ends the text and is no part of it.
    pub(super) fn push_silent(&mut self, id: u32, logprobs: Option<TokenLogprobs>) {
        self.generated += 1;
        self.waiting.push_back(ScoredToken { id, offset: self.decoded, logprobs });
    }

    /// Shows what was held back.
    pub(super) fn finish(&mut self) -> Result<Piece, Error> {
        let rest = match &mut self.decoder {
            Some(decoder) => decoder.flush()?,
            None => String::new(),
        };
        self.decoded += rest.chars().count();
        let passed = self.stops.push(&rest);
        let text = match passed.stopped {
            true => passed.text,
            false => passed.text + &self.stops.finish(),
        };
        Ok(self.show(text, !passed.stopped))
    }

    fn decode(&mut self, id: u32) -> Result<String, Error> {
        self.decoder.as_mut().map_or(Ok(String::new()), |decoder| decoder.push(id))
    }

    /// A piece of `text` with the tokens that begin before its end, or with `all` tokens.
    fn show(&mut self, text: String, all: bool) -> Piece {
        self.shown += text.chars().count();
        let ready = match all {
            true => self.waiting.len(),
            false => self.waiting.iter().take_while(|token| token.offset < self.shown).count(),
        };
        let tokens = self.waiting.drain(..ready).collect();
        Piece { text, tokens, generated: self.generated, finish: None }
    }
}
