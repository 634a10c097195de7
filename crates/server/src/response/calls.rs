//! Tool calls in answers and deltas.

use crate::generation::Piece;
use crate::tools::reader::{Found, Reader};
use serde_json::{Value, json};

/// Reads calls out of one choice's text and writes them as OpenAI does.
pub(crate) struct Calls {
    reader: Reader,
    id: fn() -> String,
    /// Calls that may be told; further ones are left out.
    most: usize,
    /// Tokens have come of which nothing could be told yet.
    waits: bool,
}

impl Calls {
    pub(crate) fn new(reader: Reader, id: fn() -> String, most: usize) -> Self {
        Self { reader, id, most, waits: false }
    }

    /// Whether there was a call.
    pub(crate) fn any(&self) -> bool {
        self.reader.calls() > 0
    }

    /// Whether the last piece held text of which nothing can be told yet.
    pub(crate) fn waits(&self) -> bool {
        self.waits
    }

    /// What a piece adds: words, and entries of `delta.tool_calls`.
    pub(crate) fn deltas(&mut self, piece: &Piece) -> (String, Vec<Value>) {
        let mut index = self.reader.calls();
        let mut found = self.reader.push(&piece.text);
        if piece.finish.is_some() {
            found.extend(self.reader.finish());
        }
        self.waits = found.is_empty() && !piece.text.is_empty();
        let (mut text, mut calls) = (String::new(), Vec::<Value>::new());
        for found in found {
            match found {
                Found::Text(words) => text.push_str(&words),
                Found::Call(name) => {
                    calls.push(json!({"index": index, "id": (self.id)(), "type": "function",
                        "function": {"name": name, "arguments": ""}}));
                    index += 1;
                }
                Found::Arguments(arguments) => {
                    let at = index.saturating_sub(1);
                    match calls.last_mut().filter(|call| call["index"] == at) {
                        Some(call) => call["function"]["arguments"] = arguments.into(),
                        None => calls.push(json!({"index": at, "function": {"arguments": arguments}})),
                    }
                }
            }
        }
        calls.retain(|call| call["index"].as_u64().is_some_and(|i| i < self.most as u64));
        (text, calls)
    }

    /// Puts the calls of a whole text into its message.
    pub(crate) fn message(&mut self, text: &str, message: &mut Value) {
        let whole = self.reader.push(text).into_iter().chain(self.reader.finish());
        let (mut words, mut calls) = (String::new(), Vec::<(String, String)>::new());
        for found in whole {
            match found {
                Found::Text(text) => words.push_str(&text),
                Found::Call(name) => calls.push((name, String::new())),
                Found::Arguments(more) => {
                    if let Some((_, arguments)) = calls.last_mut() {
                        arguments.push_str(&more);
                    }
                }
            }
        }
        calls.truncate(self.most);
        if calls.is_empty() {
            message["content"] = words.into();
            return;
        }
        message["content"] = if words.is_empty() { Value::Null } else { words.into() };
        let call = |(name, arguments)| json!({"id": (self.id)(), "type": "function", "function": {"name": name, "arguments": arguments}});
        message["tool_calls"] = calls.into_iter().map(call).collect();
    }
}
