//! `POST /v1/chat/completions`: `chat.completion` and `chat.completion.chunk`.

use super::collect::Outcome;
use super::usage::Usage;
use super::{FINGERPRINT, Shape, logprobs};
use crate::generation::{Echo, Piece, ScoredToken};
use crate::metrics::reason_name;
use crate::state::Loaded;
use serde_json::{Value, json};
use std::sync::Arc;

/// How to write one chat request's answer.
pub(crate) struct ChatShape {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) service: Arc<Loaded>,
    pub(crate) logprobs: bool,
    pub(crate) token_ids: bool,
    /// Which choices have had their first chunk.
    pub(crate) begun: Vec<bool>,
}

impl ChatShape {
    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": FINGERPRINT, "choices": choices,
        })
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        self.envelope("chat.completion.chunk", choices)
    }

    fn logprobs(&self, tokens: &[ScoredToken]) -> Option<Value> {
        self.logprobs.then(|| logprobs::chat(self.service.tokenizer.as_ref(), tokens))
    }

    fn add_ids(&self, choice: &mut Value, tokens: &[ScoredToken]) {
        if self.token_ids {
            choice["token_ids"] = tokens.iter().map(|token| token.id).collect();
        }
    }
}

impl Shape for ChatShape {
    fn echo_chunk(&mut self, index: usize, echo: &Echo) -> Value {
        self.chunk(vec![json!({
            "index": index, "delta": {"content": echo.text}, "logprobs": null, "finish_reason": null,
        })])
    }

    /// The role comes with the first token and not before: clients time the first chunk that has a choice.
    fn piece_chunk(&mut self, index: usize, piece: &Piece) -> Option<Value> {
        let first = !std::mem::replace(&mut self.begun[index], true);
        let tokens = !piece.tokens.is_empty() && (self.logprobs || self.token_ids);
        if !first && piece.text.is_empty() && piece.finish.is_none() && !tokens {
            return None;
        }
        let delta = match (first, piece.text.is_empty()) {
            (true, _) => json!({"role": "assistant", "content": piece.text}),
            (false, false) => json!({"content": piece.text}),
            (false, true) => json!({}),
        };
        let finish = piece.finish.map(|finish| reason_name(finish.reason));
        let logprobs = match piece.tokens.is_empty() {
            true => None,
            false => self.logprobs(&piece.tokens),
        };
        let mut choice =
            json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
        self.add_ids(&mut choice, &piece.tokens);
        Some(self.chunk(vec![choice]))
    }

    fn usage_chunk(&self, usage: &Usage) -> Value {
        let mut chunk = self.chunk(Vec::new());
        chunk["usage"] = usage.json();
        chunk
    }

    fn answer(&self, sequences: Vec<Outcome>, usage: &Usage) -> Value {
        let choices = sequences.into_iter().enumerate().map(|(index, outcome)| {
            let finish = outcome.finish.map(|finish| reason_name(finish.reason));
            let mut choice = json!({
                "index": index,
                "message": {"role": "assistant", "content": outcome.text, "refusal": null},
                "logprobs": self.logprobs(&outcome.tokens),
                "finish_reason": finish,
            });
            self.add_ids(&mut choice, &outcome.tokens);
            choice
        });
        let mut answer = self.envelope("chat.completion", choices.collect());
        answer["usage"] = usage.json();
        answer
    }
}
