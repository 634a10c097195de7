//! `{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}`.

use super::{Format, Row, kind, optional_string, required_list, required_string, template_variables};
use crate::message::Message;
use serde_json::{Map, Value};

pub(super) const FORMAT: Format = Format {
    name: "sharegpt",
    about: "conversations: {\"conversations\": [{\"from\": \"human\", \"value\": …}, …], \"system\": … (optional)}",
    sample: r#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}"#,
    parse,
    plain_files: false,
    pairs: false,
};

/// Names of speakers and the role each has in a chat template.
const SPEAKERS: [(&str, &str); 11] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    let turns = required_list(row, "conversations", "turns")?;
    let mut messages = Vec::with_capacity(turns.len() + 1);
    if let Some(system) = optional_string(row, "system")?.filter(|s| !s.is_empty()) {
        messages.push(Message::new("system", system));
    }
    for (i, turn) in turns.iter().enumerate() {
        messages.push(message(turn).map_err(|reason| format!("turn {i}: {reason}"))?);
    }
    Ok(Row::Conversation { messages, variables: template_variables(row) })
}

fn message(turn: &Value) -> Result<Message, String> {
    let Value::Object(fields) = turn else {
        return Err(format!("is {}, an object with \"from\" and \"value\" is expected", kind(turn)));
    };
    let speaker = required_string(fields, "from")?;
    let role =
        SPEAKERS.iter().find(|(name, _)| *name == speaker).map(|(_, role)| *role).ok_or_else(|| {
            let known: Vec<&str> = SPEAKERS.iter().map(|(name, _)| *name).collect();
            format!("unknown speaker {speaker:?} in \"from\"; known: {}", known.join(", "))
        })?;
    Ok(Message::new(role, required_string(fields, "value")?))
}
