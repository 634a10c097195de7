//! `{"messages": [{"role": …, "content": …}, …]}`, as the OpenAI API writes conversations.

use super::{Format, Row, kind, required_list, required_string, template_variables};
use crate::message::Message;
use serde_json::{Map, Value};

pub(super) const FORMAT: Format = Format {
    name: "chat",
    about: "conversations: {\"messages\": [{\"role\": …, \"content\": …}, …]}",
    sample: r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}"#,
    parse,
    plain_files: false,
    pairs: false,
};

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    let messages = messages(required_list(row, "messages", "messages")?)?;
    Ok(Row::Conversation { messages, variables: template_variables(row) })
}

/// A list of messages; what is wrong with one is told with its number.
pub(super) fn messages(list: &[Value]) -> Result<Vec<Message>, String> {
    let numbered = |(i, value)| message(value).map_err(|reason| format!("message {i}: {reason}"));
    list.iter().enumerate().map(numbered).collect()
}

fn message(value: &Value) -> Result<Message, String> {
    let Value::Object(fields) = value else {
        return Err(format!("is {}, an object with \"role\" and \"content\" is expected", kind(value)));
    };
    required_string(fields, "role")?;
    match fields.get("content") {
        Some(Value::String(_) | Value::Array(_)) => {}
        None | Some(Value::Null) if fields.contains_key("tool_calls") => {}
        None => return Err("missing key \"content\" (a string or a list of typed parts)".into()),
        Some(other) => {
            return Err(format!(
                "key \"content\" is {}, a string or a list of typed parts is expected",
                kind(other)
            ));
        }
    }
    serde_json::from_value(value.clone()).map_err(|e| e.to_string())
}
