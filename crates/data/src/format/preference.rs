//! Preferences: a prompt with a better and a worse reply, as TRL and axolotl write them.
//!
//! Replies are texts or lists of messages. Without `prompt`, what both replies begin with is the prompt.

use super::{Format, Preference, Row, chat, kind, optional_string, required, template_variables, tokens};
use crate::message::Message;
use serde_json::{Map, Value};

pub(super) const FORMAT: Format = Format {
    name: "preference",
    about: "preferences: {\"prompt\": … (optional), \"chosen\": …, \"rejected\": …, \"system\": … (optional)}, each a \
            string or a list of messages, or {\"input_ids_chosen\": […], \"input_ids_rejected\": […]} with \
            \"labels_chosen\" and \"labels_rejected\" (optional)",
    sample: r#"{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello!"}], "rejected": [{"role": "assistant", "content": "What?"}]}"#,
    parse,
    plain_files: false,
    pairs: true,
};

/// What a key holds.
enum Said {
    Text(String),
    Messages(Vec<Message>),
}

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    if row.contains_key("input_ids_chosen") || row.contains_key("input_ids_rejected") {
        return Ok(Row::Preference(Preference::Tokens {
            chosen: tokens::ids_and_labels(row, "input_ids_chosen", "labels_chosen")?,
            rejected: tokens::ids_and_labels(row, "input_ids_rejected", "labels_rejected")?,
        }));
    }
    let expected = "a string or a list of messages";
    let chosen = said("chosen", required(row, "chosen", expected)?)?;
    let rejected = said("rejected", required(row, "rejected", expected)?)?;
    let (prompt, system) = (prompt(row)?, optional_string(row, "system")?);
    let preference = match (chosen, rejected) {
        (Said::Text(chosen), Said::Text(rejected)) => match (prompt, system) {
            (None, None) => implicit_text(chosen, rejected),
            (Some(Said::Text(prompt)), None) => Preference::Text { prompt, chosen, rejected },
            // Roles are meant: the two texts are what the assistant says.
            (prompt, _) => conversation(row, prompt, says("assistant", chosen), says("assistant", rejected))?,
        },
        (Said::Messages(chosen), Said::Messages(rejected)) => conversation(row, prompt, chosen, rejected)?,
        _ => {
            return Err(
                "one of \"chosen\" and \"rejected\" is a string and the other a list of messages; two \
                        strings or two lists are expected"
                    .into(),
            );
        }
    };
    Ok(Row::Preference(match preference {
        Preference::Conversation { prompt, chosen, rejected, variables } => {
            Preference::Conversation { prompt: with_system(system, prompt)?, chosen, rejected, variables }
        }
        other => other,
    }))
}

fn says(role: &str, text: String) -> Vec<Message> {
    vec![Message::new(role, text)]
}

/// A string, a list of messages, or one message by itself, as axolotl's `chat_template.default` has it.
fn said(key: &str, value: &Value) -> Result<Said, String> {
    let about = |reason: String| format!("key {key:?}, {reason}");
    match value {
        Value::String(text) => Ok(Said::Text(text.clone())),
        Value::Array(list) if list.is_empty() => {
            Err(format!("key {key:?} is an empty list, a list of messages is expected"))
        }
        Value::Array(list) => chat::messages(list).map(Said::Messages).map_err(about),
        Value::Object(_) => chat::messages(std::slice::from_ref(value)).map(Said::Messages).map_err(about),
        other => Err(format!("key {key:?} is {}, a string or a list of messages is expected", kind(other))),
    }
}

/// What is replied to: `prompt`, Intel's `question`, or the `messages` before a reply that is one message.
fn prompt(row: &Map<String, Value>) -> Result<Option<Said>, String> {
    let of_one_message: &[&str] =
        if matches!(row.get("chosen"), Some(Value::Object(_))) { &["messages"] } else { &[] };
    let keys = ["prompt", "question"];
    let there = keys
        .iter()
        .chain(of_one_message)
        .find_map(|&key| row.get(key).filter(|value| !value.is_null()).map(|value| (key, value)));
    there.map(|(key, value)| said(key, value)).transpose()
}

/// Two texts without a prompt: what both begin with is the prompt. It ends before white space, so that no word, and
/// hence no token, of what differs lies in it.
fn implicit_text(chosen: String, rejected: String) -> Preference {
    let same =
        chosen.chars().zip(rejected.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
    let prompt = chosen[..same].trim_end_matches(|c: char| !c.is_whitespace()).trim_end().to_owned();
    let rest = |text: String| text[prompt.len()..].to_owned();
    let (chosen, rejected) = (rest(chosen), rest(rejected));
    Preference::Text { prompt, chosen, rejected }
}

fn conversation(
    row: &Map<String, Value>,
    prompt: Option<Said>,
    mut chosen: Vec<Message>,
    mut rejected: Vec<Message>,
) -> Result<Preference, String> {
    let same = shared(&chosen, &rejected);
    let replies_alone = chosen[0].is_assistant() && rejected[0].is_assistant();
    let (prompt, repeated) = match prompt {
        // Some data repeats the prompt in front of both replies.
        Some(Said::Messages(prompt)) => {
            let len = prompt.len();
            let repeated = same >= len && chosen[..len] == prompt[..];
            (prompt, if repeated { len } else { 0 })
        }
        Some(Said::Text(text)) if replies_alone => (says("user", text), 0),
        None if same == 0 => {
            return Err(
                "missing key \"prompt\", and \"chosen\" and \"rejected\" have no first message in common \
                        that could be it"
                    .into(),
            );
        }
        Some(_) if same == 0 => {
            return Err(
                "\"chosen\" and \"rejected\" begin with different messages; the same prompt, or the \
                        assistant's replies alone, are expected"
                    .into(),
            );
        }
        // Beside whole conversations a text repeats what they begin with (UltraFeedback).
        Some(Said::Text(_)) | None => (chosen[..same].to_vec(), same),
    };
    chosen.drain(..repeated);
    rejected.drain(..repeated);
    Ok(Preference::Conversation { prompt, chosen, rejected, variables: template_variables(row) })
}

/// Messages that both begin with; each keeps at least one of its own.
fn shared(a: &[Message], b: &[Message]) -> usize {
    let most = a.len().min(b.len()).saturating_sub(1);
    a.iter().zip(b).take(most).take_while(|(a, b)| a == b).count()
}

fn with_system(system: Option<&str>, mut prompt: Vec<Message>) -> Result<Vec<Message>, String> {
    let Some(system) = system.filter(|text| !text.is_empty()) else { return Ok(prompt) };
    if prompt.first().is_some_and(|message| message.role == "system") {
        return Err(
            "key \"system\" is there and the prompt begins with a system message too; one of them is \
                    expected"
                .into(),
        );
    }
    prompt.insert(0, Message::new("system", system));
    Ok(prompt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(row: &str) -> Result<Preference, String> {
        match parse(&serde_json::from_str(row).expect("a JSON object"))? {
            Row::Preference(preference) => Ok(preference),
            other => panic!("{other:?}"),
        }
    }

    /// Roles' first letters and words: `u:Hi|a:Hello`, for prompt, chosen and rejected.
    fn told(row: &str) -> [String; 3] {
        let line = |messages: Vec<Message>| -> String {
            let words: Vec<String> =
                messages.iter().map(|m| format!("{}:{}", &m.role[..1], m.text())).collect();
            words.join("|")
        };
        match parsed(row).expect(row) {
            Preference::Text { prompt, chosen, rejected } => [prompt, chosen, rejected],
            Preference::Conversation { prompt, chosen, rejected, .. } => {
                [line(prompt), line(chosen), line(rejected)]
            }
            Preference::Tokens { .. } => panic!("{row}"),
        }
    }

    const U: &str = r#"{"role": "user", "content": "u"}"#;
    const A: &str = r#"{"role": "assistant", "content": "good"}"#;
    const B: &str = r#"{"role": "assistant", "content": "bad"}"#;

    #[test]
    fn the_ways_of_writing_a_conversation_mean_the_same() {
        let ways = [
            format!(r#"{{"prompt": [{U}], "chosen": [{A}], "rejected": [{B}]}}"#),
            format!(r#"{{"prompt": "u", "chosen": [{A}], "rejected": [{B}]}}"#),
            format!(r#"{{"chosen": [{U}, {A}], "rejected": [{U}, {B}]}}"#),
            format!(r#"{{"prompt": "u", "chosen": [{U}, {A}], "rejected": [{U}, {B}]}}"#),
            format!(r#"{{"prompt": [{U}], "chosen": [{U}, {A}], "rejected": [{U}, {B}]}}"#),
            format!(r#"{{"messages": [{U}], "chosen": {A}, "rejected": {B}}}"#),
            format!(r#"{{"prompt": [{U}], "chosen": "good", "rejected": "bad"}}"#),
            r#"{"question": "u", "system": "", "chosen": "good", "rejected": "bad"}"#.to_owned(),
        ];
        for row in ways {
            assert_eq!(told(&row), ["u:u", "a:good", "a:bad"], "{row}");
        }
        let system = r#"{"system": "s", "prompt": "u", "chosen": "good", "rejected": "bad"}"#;
        assert_eq!(told(system), ["s:s|u:u", "a:good", "a:bad"]);
    }

    #[test]
    fn each_reply_keeps_a_message_however_much_is_shared() {
        let same = format!(r#"{{"chosen": [{U}, {A}], "rejected": [{U}, {A}]}}"#);
        assert_eq!(told(&same), ["u:u", "a:good", "a:good"]);
        let longer = format!(r#"{{"chosen": [{U}, {A}], "rejected": [{U}, {A}, {U}, {B}]}}"#);
        assert_eq!(told(&longer), ["u:u", "a:good", "a:good|u:u|a:bad"]);
    }

    #[test]
    fn texts_without_a_prompt_part_where_a_word_begins() {
        let cases = [
            ("The sky is blue.", "The sky is black.", ["The sky is", " blue.", " black."]),
            ("Q: a\n\nA: yes", "Q: a\n\nA: no", ["Q: a\n\nA:", " yes", " no"]),
            ("Q:\n\nyes", "Q:\n\nno", ["Q:", "\n\nyes", "\n\nno"]),
            ("ünï", "ünä", ["", "ünï", "ünä"]),
            ("one", "one two", ["", "one", "one two"]),
            ("", "", ["", "", ""]),
        ];
        for (chosen, rejected, expected) in cases {
            let row = serde_json::json!({"chosen": chosen, "rejected": rejected}).to_string();
            assert_eq!(told(&row), expected, "{row}");
        }
    }

    #[test]
    fn malformed_pairs_are_told_what_is_expected() {
        let cases = [
            (r#"{"prompt": "x", "chosen": "a"}"#.to_owned(), "missing key \"rejected\""),
            (r#"{"chosen": 1, "rejected": "a"}"#.to_owned(), "\"chosen\" is a number, a string or a list"),
            (r#"{"chosen": "a", "rejected": null}"#.to_owned(), "\"rejected\" is null"),
            (format!(r#"{{"chosen": "a", "rejected": [{A}]}}"#), "two strings or two lists"),
            (format!(r#"{{"chosen": [], "rejected": [{A}]}}"#), "\"chosen\" is an empty list"),
            (
                format!(r#"{{"prompt": [], "chosen": [{A}], "rejected": [{B}]}}"#),
                "\"prompt\" is an empty list",
            ),
            (
                format!(r#"{{"chosen": [{A}, 3], "rejected": [{B}]}}"#),
                "key \"chosen\", message 1: is a number",
            ),
            (format!(r#"{{"chosen": [{A}], "rejected": [{B}]}}"#), "missing key \"prompt\""),
            (
                format!(r#"{{"prompt": "u", "chosen": [{U}, {A}], "rejected": [{B}]}}"#),
                "begin with different messages",
            ),
            (r#"{"system": "s", "chosen": "a", "rejected": "b"}"#.to_owned(), "missing key \"prompt\""),
            (
                r#"{"system": 1, "prompt": "p", "chosen": "a", "rejected": "b"}"#.to_owned(),
                "\"system\" is a number",
            ),
            (
                format!(
                    r#"{{"system": "s", "prompt": [{{"role": "system", "content": "t"}}], "chosen": [{A}], "rejected": [{B}]}}"#
                ),
                "one of them is expected",
            ),
            (r#"{"input_ids_chosen": [1]}"#.to_owned(), "missing key \"input_ids_rejected\""),
            (r#"{"input_ids_chosen": [1], "input_ids_rejected": []}"#.to_owned(), "is an empty list"),
            (
                r#"{"input_ids_chosen": [1], "labels_chosen": [1, 2], "input_ids_rejected": [1]}"#.to_owned(),
                "2 labels for 1 ids",
            ),
        ];
        for (row, expected) in cases {
            let error = parsed(&row).expect_err(&row);
            assert!(error.contains(expected), "{row}: {error}");
        }
    }
}
