//! One message of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One message of a conversation, as in the OpenAI API and in `messages` rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, …
    pub role: String,
    /// What is said. `None` where a message consists of tool calls only.
    #[serde(default)]
    pub content: Option<Content>,
    /// Everything else a template may look at: `name`, `tool_calls`, `reasoning_content`, …
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// What is said in a message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Typed parts, `{"type": "text", "text": …}`.
    Parts(Vec<Value>),
}

impl Message {
    /// A message with text only.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(Content::Text(text.into())), extra: Map::new() }
    }

    /// The message's text: its text parts joined by newlines, and empty where it has none.
    pub fn text(&self) -> String {
        match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                let texts: Vec<&str> =
                    parts.iter().filter_map(|p| p.as_str().or_else(|| p.get("text")?.as_str())).collect();
                texts.join("\n")
            }
        }
    }

    /// Whether the assistant speaks.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }
}
