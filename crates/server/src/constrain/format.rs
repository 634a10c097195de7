//! The formats that output can be held to, and the fields that name them.

use crate::error::{ApiError, excerpt};
use crate::request::fields::{Fields, describe};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;

/// What the output must conform to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A JSON schema.
    Schema(Value),
    /// A regular expression that the whole output matches.
    Regex(String),
    /// A grammar in Lark's notation.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

/// A format and the field that asked for it.
pub(crate) type Asked = Option<(Arc<Format>, String)>;

const MOST_CHOICES: usize = 10_000;

impl Format {
    /// What is compiled.
    pub(crate) fn source(&self) -> String {
        match self {
            Self::Schema(schema) => schema.to_string(),
            Self::Regex(source) | Self::Lark(source) => source.clone(),
            Self::Choice(choices) => {
                let quoted: Vec<String> = choices.iter().map(|choice| json!(choice).to_string()).collect();
                format!("start: {}", quoted.join(" | "))
            }
        }
    }

    /// Any JSON object.
    fn object() -> Self {
        Self::schema(json!({"type": "object"}))
    }

    /// JSON as `json.dumps` writes it: with white space at will a model may write nothing else for ever.
    pub(crate) fn schema(schema: Value) -> Self {
        Self::Schema(spaced(schema))
    }
}

/// The schema with the way its JSON is to be written.
pub(crate) fn spaced(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other,
    };
    if let Some(map) = schema.as_object_mut() {
        let style = json!({"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": false});
        map.insert("x-guidance".into(), style);
    }
    schema
}

/// Takes `response_format`, `structured_outputs` and the `guided_…` fields; at most one may say something.
pub(crate) fn take(fields: &mut Fields) -> Result<Asked, ApiError> {
    let mut asked = Vec::new();
    asked.extend(response_format(fields)?.map(|format| (format, "response_format".to_owned())));
    asked.extend(named(fields, "guided_", "")?);
    if let Some(mut inner) = fields.object("structured_outputs")? {
        asked.extend(named(&mut inner, "", "structured_outputs.")?);
    }
    if let [(_, first), (_, second), ..] = &asked[..] {
        let message = format!("{second:?} and {first:?} both ask for a format; give one of them");
        return Err(ApiError::field(second.clone(), message));
    }
    Ok(asked.pop().map(|(format, field)| (Arc::new(format), field)))
}

fn response_format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    match format.string("type")?.as_deref() {
        None | Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Format::object())),
        Some("json_schema") => {
            let missing = || {
                let message =
                    "\"response_format.json_schema\" must be an object with a JSON schema in \"schema\"";
                ApiError::field("response_format.json_schema", message)
            };
            let mut inner = format.object("json_schema")?.ok_or_else(missing)?;
            Ok(Some(schema(inner.take("schema").ok_or_else(missing)?, "response_format.json_schema.schema")?))
        }
        Some(other) => {
            let message = format!(
                "\"response_format.type\" must be \"text\", \"json_object\" or \"json_schema\", not {}",
                excerpt(other)
            );
            Err(fields.refuse("response_format", message))
        }
    }
}

fn schema(value: Value, field: &str) -> Result<Format, ApiError> {
    match value {
        Value::Object(_) | Value::Bool(true) => Ok(Format::schema(value)),
        other => {
            let message = format!("{field:?} must be a JSON schema, not {}", describe(&other));
            Err(ApiError::field(field, message))
        }
    }
}

/// The fields that vLLM's clients send: `guided_json` and its kin, or the same without the prefix in an object.
fn named(fields: &mut Fields, prefix: &str, path: &str) -> Result<Vec<(Format, String)>, ApiError> {
    let mut asked = Vec::new();
    let name = |kind: &str| format!("{prefix}{kind}");
    let mut push = |format: Format, kind: &str| asked.push((format, format!("{path}{prefix}{kind}")));
    match fields.take(&name("json")) {
        None => {}
        // Some clients send the schema as text.
        Some(Value::String(text)) => {
            let value = serde_json::from_str(&text).map_err(|e| {
                fields.refuse(&name("json"), format!("{:?} is not valid JSON: {e}", name("json")))
            })?;
            push(schema(value, &format!("{path}{}", name("json")))?, "json");
        }
        Some(value) => push(schema(value, &format!("{path}{}", name("json")))?, "json"),
    }
    if fields.boolean(&name("json_object"))? == Some(true) {
        push(Format::object(), "json_object");
    }
    if let Some(regex) = fields.string(&name("regex"))? {
        push(Format::Regex(regex), "regex");
    }
    if let Some(grammar) = fields.string(&name("grammar"))? {
        if grammar.contains("::=") {
            let message = format!(
                "{:?} must be in Lark's notation (rule: …), not in GBNF or EBNF (rule ::= …)",
                name("grammar")
            );
            return Err(fields.refuse(&name("grammar"), message));
        }
        push(Format::Lark(grammar), "grammar");
    }
    if let Some(choices) = fields.list(&name("choice"))? {
        push(Format::Choice(texts(fields, &name("choice"), choices)?), "choice");
    }
    Ok(asked)
}

fn texts(fields: &Fields, name: &str, list: Vec<Value>) -> Result<Vec<String>, ApiError> {
    if list.is_empty() || list.len() > MOST_CHOICES {
        let message = format!("{name:?} has {} texts; from 1 to {MOST_CHOICES} are allowed", list.len());
        return Err(fields.refuse(name, message));
    }
    let text = |value| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        other => Err(fields.wrong(name, "a list of strings that are not empty", &other)),
    };
    list.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(body: Value) -> Result<Asked, ApiError> {
        take(&mut Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn formats_are_named_in_several_ways() {
        let schema = json!({"type": "integer"});
        let spaced = Format::schema(schema.clone());
        for (body, expected) in [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}, "guided_regex": null}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Format::object())),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
                Some(spaced.clone()),
            ),
            (json!({"guided_json": schema}), Some(spaced.clone())),
            (json!({"guided_json": schema.to_string()}), Some(spaced.clone())),
            (json!({"structured_outputs": {"json": schema}}), Some(spaced)),
            (json!({"guided_regex": "a+"}), Some(Format::Regex("a+".into()))),
            (json!({"structured_outputs": {"regex": "a+"}}), Some(Format::Regex("a+".into()))),
            (json!({"guided_grammar": "start: \"a\""}), Some(Format::Lark("start: \"a\"".into()))),
            (json!({"guided_choice": ["a", "b\""]}), Some(Format::Choice(vec!["a".into(), "b\"".into()]))),
        ] {
            assert_eq!(
                taken(body.clone()).unwrap().map(|(format, _)| Arc::unwrap_or_clone(format)),
                expected,
                "{body}"
            );
        }
    }

    #[test]
    fn wrong_formats_are_refused_with_the_field_named() {
        for (body, param, words) in [
            (json!({"response_format": "json"}), "response_format", "an object"),
            (json!({"response_format": {"type": "xml"}}), "response_format", "\"xml\""),
            (json!({"response_format": {"type": 1}}), "response_format.type", "a string"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}),
                "response_format.json_schema.schema",
                "5",
            ),
            (json!({"guided_json": "{"}), "guided_json", "not valid JSON"),
            (json!({"guided_json": [1]}), "guided_json", "a list"),
            (json!({"guided_regex": 1}), "guided_regex", "a string"),
            (json!({"guided_grammar": "root ::= \"a\""}), "guided_grammar", "Lark"),
            (json!({"guided_choice": []}), "guided_choice", "from 1 to"),
            (json!({"guided_choice": ["a", 1]}), "guided_choice", "1"),
            (json!({"guided_choice": [""]}), "guided_choice", "not empty"),
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice", "both"),
            (
                json!({"guided_regex": "a", "structured_outputs": {"regex": "a"}}),
                "structured_outputs.regex",
                "both",
            ),
        ] {
            let error = taken(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
            assert!(error.message.contains(words), "{body}: {error}");
        }
    }
}
