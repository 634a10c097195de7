//! `POST /v1/completions`: `text_completion`.

use super::collect::Outcome;
use super::usage::Usage;
use super::{FINGERPRINT, Shape, logprobs};
use crate::generation::{Echo, Piece, ScoredToken};
use crate::metrics::reason_name;
use crate::state::Loaded;
use serde_json::{Value, json};
use std::sync::Arc;

/// How to write one completions request's answer.
pub(crate) struct CompletionShape {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) service: Arc<Loaded>,
    pub(crate) logprobs: bool,
    /// Also when there is no tokenizer: the ids are then all there is.
    pub(crate) token_ids: bool,
}

impl CompletionShape {
    fn envelope(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
            "system_fingerprint": FINGERPRINT, "choices": choices,
        })
    }

    fn choice(&self, index: usize, text: &str, tokens: &[ScoredToken], finish: Option<&str>) -> Value {
        let logprobs = self.logprobs.then(|| logprobs::legacy(self.service.tokenizer.as_ref(), tokens));
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
    }

    fn add_ids(&self, choice: &mut Value, tokens: &[ScoredToken]) {
        if self.token_ids {
            choice["token_ids"] = tokens.iter().map(|token| token.id).collect();
        }
    }
}

impl Shape for CompletionShape {
    fn echo_chunk(&mut self, index: usize, echo: &Echo) -> Value {
        self.envelope(vec![self.choice(index, &echo.text, &echo.tokens, None)])
    }

    fn piece_chunk(&mut self, index: usize, piece: &Piece) -> Option<Value> {
        let told = !piece.text.is_empty() || piece.finish.is_some() || piece.generated == 1;
        let tokens = !piece.tokens.is_empty() && (self.logprobs || self.token_ids);
        (told || tokens).then(|| {
            let finish = piece.finish.map(|finish| reason_name(finish.reason));
            let mut choice = self.choice(index, &piece.text, &piece.tokens, finish);
            self.add_ids(&mut choice, &piece.tokens);
            self.envelope(vec![choice])
        })
    }

    fn usage_chunk(&self, usage: &Usage) -> Value {
        let mut chunk = self.envelope(Vec::new());
        chunk["usage"] = usage.json();
        chunk
    }

    fn answer(self, sequences: Vec<Outcome>, usage: &Usage) -> Value {
        let choices = sequences.into_iter().enumerate().map(|(index, outcome)| {
            let finish = outcome.finish.map(|finish| reason_name(finish.reason));
            let Echo { mut text, mut tokens } = outcome.echo.unwrap_or_default();
            text.push_str(&outcome.text);
            tokens.extend_from_slice(&outcome.tokens);
            let mut choice = self.choice(index, &text, &tokens, finish);
            self.add_ids(&mut choice, &outcome.tokens);
            if let Some(rows) = outcome.scored {
                choice["prompt_logprobs"] = logprobs::prompt(self.service.tokenizer.as_ref(), &rows);
            }
            choice
        });
        let mut answer = self.envelope(choices.collect());
        answer["usage"] = usage.json();
        answer
    }
}
