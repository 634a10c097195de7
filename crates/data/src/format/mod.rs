//! Dataset formats: one file each, one line each in [`FORMATS`].

mod alpaca;
mod chat;
mod preference;
mod sharegpt;
mod text;
mod tokens;

use crate::error::Error;
use crate::message::Message;
use serde_json::{Map, Value};

/// What one row of a dataset holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// A conversation.
    Conversation {
        /// Its messages.
        messages: Vec<Message>,
        /// Further variables of the chat template, such as `tools`.
        variables: Map<String, Value>,
    },
    /// An instruction and its answer; a conversation where the model has a chat template.
    Instruction(Instruction),
    /// Plain text, every token of it trained.
    Text(String),
    /// Token ids, already made.
    Tokens(TokenRow),
    /// A prompt with a better and a worse reply.
    Preference(Preference),
}

/// Token ids of one example.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenRow {
    /// The ids.
    pub ids: Vec<u32>,
    /// One label beside each id: −100, or the id to be predicted there.
    pub labels: Option<Vec<i32>>,
}

/// A prompt, the reply that is preferred and the one that is not.
#[derive(Clone, Debug, PartialEq)]
pub enum Preference {
    /// Plain text: the prompt, and what each reply goes on with.
    Text {
        /// What both begin with.
        prompt: String,
        /// The better reply.
        chosen: String,
        /// The worse reply.
        rejected: String,
    },
    /// A conversation and its two continuations.
    Conversation {
        /// The messages both begin with.
        prompt: Vec<Message>,
        /// The better reply: one message, mostly.
        chosen: Vec<Message>,
        /// The worse reply.
        rejected: Vec<Message>,
        /// Further variables of the chat template, such as `tools`.
        variables: Map<String, Value>,
    },
    /// Token ids, already made: prompt and reply in each.
    Tokens {
        /// With the better reply.
        chosen: TokenRow,
        /// With the worse reply.
        rejected: TokenRow,
    },
}

/// An instruction with its answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Instruction {
    /// System message, if any.
    pub system: Option<String>,
    /// What is asked.
    pub instruction: String,
    /// What it is asked about; may be empty.
    pub input: String,
    /// The answer.
    pub output: String,
}

/// What is known about one format. A row is a JSON object; `parse` says what it means, or in one sentence what is
/// wrong with it and what is expected.
pub struct Format {
    /// Name in recipes.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// A valid row.
    pub sample: &'static str,
    /// Row → meaning.
    pub parse: fn(&Map<String, Value>) -> Result<Row, String>,
    /// Whether files other than `.json` and `.jsonl` are read as one text each.
    pub plain_files: bool,
    /// Whether each row is a preference pair.
    pub pairs: bool,
}

/// All formats.
pub const FORMATS: &[&Format] =
    &[&chat::FORMAT, &alpaca::FORMAT, &sharegpt::FORMAT, &text::FORMAT, &tokens::FORMAT, &preference::FORMAT];

/// The format of this name.
///
/// # Errors
/// [`Error::UnknownFormat`], with the most similar name.
pub fn find(name: &str) -> Result<&'static Format, Error> {
    FORMATS.iter().find(|f| f.name == name).copied().ok_or_else(|| Error::UnknownFormat {
        name: name.to_owned(),
        nearest: nearest(name),
        known: FORMATS.iter().map(|f| f.name).collect::<Vec<_>>().join(", "),
    })
}

fn nearest(name: &str) -> Option<String> {
    let lower = name.to_lowercase();
    FORMATS
        .iter()
        .map(|f| (strsim::jaro_winkler(&lower, f.name), f.name))
        .filter(|(similarity, _)| *similarity > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name.to_owned())
}

// ---- what the formats share: fields with messages that name them ----

/// The JSON kind of a value, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A required field; the message lists the keys that are there instead.
fn required<'a>(row: &'a Map<String, Value>, key: &str, expected: &str) -> Result<&'a Value, String> {
    row.get(key).ok_or_else(|| {
        let there: Vec<String> = row.keys().take(8).map(|k| format!("{k:?}")).collect();
        let there = if there.is_empty() { "no keys at all".to_owned() } else { there.join(", ") };
        format!("missing key {key:?} ({expected}); the row has {there}")
    })
}

fn required_string<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    let value = required(row, key, "a string")?;
    value.as_str().ok_or_else(|| format!("key {key:?} is {}, a string is expected", kind(value)))
}

/// A string that may be missing or null.
fn optional_string<'a>(row: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, String> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("key {key:?} is {}, a string is expected", kind(other))),
    }
}

/// A required list that is not empty.
fn required_list<'a>(row: &'a Map<String, Value>, key: &str, of: &str) -> Result<&'a [Value], String> {
    let expected = format!("a list of {of}");
    match required(row, key, &expected)? {
        Value::Array(list) if list.is_empty() => {
            Err(format!("key {key:?} is an empty list, {expected} is expected"))
        }
        Value::Array(list) => Ok(list),
        other => Err(format!("key {key:?} is {}, {expected} is expected", kind(other))),
    }
}

/// Variables that templates know by name, taken from the row.
fn template_variables(row: &Map<String, Value>) -> Map<String, Value> {
    const NAMES: [&str; 4] = ["tools", "documents", "chat_template_kwargs", "enable_thinking"];
    let mut out = Map::new();
    for (key, value) in row.iter().filter(|(k, v)| NAMES.contains(&k.as_str()) && !v.is_null()) {
        match (key.as_str(), value) {
            ("chat_template_kwargs", Value::Object(inner)) => out.extend(inner.clone()),
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(format: &Format, row: &str) -> Result<Row, String> {
        let row: Map<String, Value> = serde_json::from_str(row).expect("a JSON object");
        (format.parse)(&row)
    }

    #[test]
    fn every_format_reads_its_sample_and_names_what_an_empty_row_lacks() {
        for format in FORMATS {
            assert!(parse(format, format.sample).is_ok(), "{}", format.name);
            let error = parse(format, "{}").expect_err(format.name);
            assert!(error.contains("missing key"), "{}: {error}", format.name);
        }
    }

    #[test]
    fn an_unknown_format_suggests_the_nearest() {
        let cases = [
            ("chatt", "chat"),
            ("ShareGPT", "sharegpt"),
            ("alpacca", "alpaca"),
            ("token", "tokens"),
            ("preferences", "preference"),
        ];
        for (typed, meant) in cases {
            let message = find(typed).err().expect(typed).to_string();
            assert!(message.contains(&format!("did you mean {meant:?}?")), "{message}");
        }
        let message = find("parquet").err().expect("unknown").to_string();
        assert!(!message.contains("did you mean") && message.contains("chat, alpaca"), "{message}");
    }

    #[test]
    fn malformed_rows_are_told_what_is_expected() {
        let cases = [
            ("chat", r#"{"messages": []}"#, "empty list"),
            ("chat", r#"{"messages": "hi"}"#, "is a string, a list of messages"),
            ("chat", r#"{"messages": [{"role": "user"}]}"#, "message 0"),
            ("chat", r#"{"messages": [{"content": "x"}]}"#, "message 0: missing key \"role\""),
            ("chat", r#"{"messages": [{"role": "user", "content": 3}]}"#, "content"),
            ("chat", r#"{"prompt": "x"}"#, "the row has \"prompt\""),
            ("alpaca", r#"{"instruction": "x"}"#, "missing key \"output\""),
            ("alpaca", r#"{"instruction": "x", "output": 1}"#, "is a number, a string is expected"),
            ("sharegpt", r#"{"conversations": [{"from": "alien", "value": "x"}]}"#, "alien"),
            ("sharegpt", r#"{"conversations": [{"value": "x"}]}"#, "turn 0: missing key \"from\""),
            ("text", r#"{"text": ["a"]}"#, "is a list, a string is expected"),
            ("tokens", r#"{"input_ids": [1, -2]}"#, "input_ids[1] is -2"),
            ("tokens", r#"{"input_ids": [1, 2], "labels": [1]}"#, "1 labels for 2 ids"),
            ("tokens", r#"{"input_ids": [1, 2], "labels": [1, -7]}"#, "labels[1] is -7"),
            ("tokens", r#"{"input_ids": [5000000000]}"#, "input_ids[0] is 5000000000"),
        ];
        for (format, row, expected) in cases {
            let error = parse(find(format).expect(format), row).expect_err(row);
            assert!(error.contains(expected), "{row}: {error}");
        }
    }
}
