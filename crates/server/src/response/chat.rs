//! `POST /v1/chat/completions`: `chat.completion` and `chat.completion.chunk`.

pub(crate) use super::calls::Calls;
use super::collect::Outcome;
use super::usage::Usage;
use super::{FINGERPRINT, Shape, logprobs};
use crate::generation::{Echo, Piece, ScoredToken};
use crate::metrics::reason_name;
use crate::state::Loaded;
use hearth_engine::api::FinishReason;
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
    /// Reads calls out of each choice's text; empty where there are none.
    pub(crate) calls: Vec<Calls>,
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

    /// An answer that ends with calls ends to have them made.
    fn reason(&self, index: usize, reason: FinishReason) -> &'static str {
        match self.calls.get(index) {
            Some(calls) if calls.any() && reason == FinishReason::Stop => "tool_calls",
            _ => reason_name(reason),
        }
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
        let (text, calls) = match self.calls.get_mut(index) {
            Some(calls) => calls.deltas(piece),
            None => (piece.text.clone(), Vec::new()),
        };
        let nothing = text.is_empty() && calls.is_empty() && piece.finish.is_none() && !tokens;
        if nothing && (!first || self.calls.get(index).is_some_and(|c| c.waits())) {
            self.begun[index] = !first;
            return None;
        }
        let mut delta = match (first, text.is_empty()) {
            (true, _) => json!({"role": "assistant", "content": text}),
            (false, false) => json!({"content": text}),
            (false, true) => json!({}),
        };
        if !calls.is_empty() {
            delta["tool_calls"] = calls.into();
        }
        let finish = piece.finish.map(|finish| self.reason(index, finish.reason));
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

    fn answer(mut self, sequences: Vec<Outcome>, usage: &Usage) -> Value {
        let mut choices = Vec::with_capacity(sequences.len());
        let mut scored = None;
        for (index, outcome) in sequences.into_iter().enumerate() {
            let mut message = json!({"role": "assistant", "content": outcome.text, "refusal": null});
            if let Some(calls) = self.calls.get_mut(index) {
                calls.message(&outcome.text, &mut message);
            }
            let finish = outcome.finish.map(|finish| self.reason(index, finish.reason));
            let mut choice = json!({
                "index": index,
                "message": message,
                "logprobs": self.logprobs(&outcome.tokens),
                "finish_reason": finish,
            });
            self.add_ids(&mut choice, &outcome.tokens);
            choices.push(choice);
            scored = scored.or(outcome.scored);
        }
        let mut answer = self.envelope("chat.completion", choices);
        if let Some(rows) = scored {
            answer["prompt_logprobs"] = logprobs::prompt(self.service.tokenizer.as_ref(), &rows);
        }
        answer["usage"] = usage.json();
        answer
    }
}
