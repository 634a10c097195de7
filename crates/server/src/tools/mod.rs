//! Tool calls: what clients offer, how models write calls, and how calls are read out of text as it comes.
//!
//! # Layout
//! - [`request`]: `tools`, `tool_choice`, `parallel_tool_calls`.
//! - [`reader`]: text → text and calls, piece by piece; [`call`]: one call's JSON, character by character.
//! - one file per way of writing calls, a [`Syntax`] each, and one line in [`SYNTAXES`].

pub(crate) mod call;
mod hermes;
mod llama3_json;
mod mistral;
pub(crate) mod reader;
pub(crate) mod request;

use crate::constrain::format::spaced;
use hearth_data::Tokenizer;
use request::Tool;
use serde_json::{Value, json};

/// Every way of writing calls that is known. The first whose marks a chat template holds is the model's.
pub(crate) static SYNTAXES: &[&Syntax] = &[&hermes::SYNTAX, &mistral::SYNTAX, &llama3_json::SYNTAX];

/// A way of writing calls.
pub(crate) struct Syntax {
    /// Under which it can be asked for.
    pub(crate) name: &'static str,
    /// Text in chat templates of models that write so; all must be there.
    pub(crate) template_marks: &'static [&'static str],
    /// Where calls begin.
    pub(crate) open: Open,
    /// What stands behind each call.
    pub(crate) close: Option<&'static str>,
    /// The key of the arguments.
    pub(crate) arguments: &'static str,
    /// A Lark grammar whose output is calls and nothing else.
    pub(crate) forced: fn(&Forced) -> String,
    /// A fresh id for a call.
    pub(crate) id: fn() -> String,
}

/// Where calls begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Open {
    /// Anywhere, after this.
    Mark(&'static str),
    /// At the very beginning, with a JSON object, and this may stand before it.
    Start(&'static str),
}

/// Names of the ways of writing tool calls that are known.
pub fn tool_formats() -> impl Iterator<Item = &'static str> {
    SYNTAXES.iter().map(|syntax| syntax.name)
}

/// The syntax of this name, or else the one that a chat template speaks.
pub(crate) fn syntax(name: Option<&str>, template: Option<&str>) -> Option<&'static Syntax> {
    let speaks =
        |s: &&&Syntax| template.is_some_and(|t| s.template_marks.iter().all(|mark| t.contains(mark)));
    match name {
        Some(name) => SYNTAXES.iter().find(|s| s.name == name).copied(),
        None => SYNTAXES.iter().find(speaks).copied(),
    }
}

impl Syntax {
    /// Whether a mark is a control token here, so that it must not be left out of the text.
    pub(crate) fn has_special_marks(&self, tokenizer: &Tokenizer) -> bool {
        let open = match self.open {
            Open::Mark(mark) | Open::Start(mark) => mark,
        };
        let special = |mark: &str| tokenizer.id(mark).is_some_and(|id| tokenizer.is_special(id));
        special(open) || self.close.is_some_and(special)
    }
}

/// What forced calls may be.
pub(crate) struct Forced<'a> {
    pub(crate) tools: Vec<&'a Tool>,
    /// More than one call may be made.
    pub(crate) parallel: bool,
    pub(crate) tokenizer: &'a Tokenizer,
}

/// Most calls in one answer that is forced to be calls.
const MOST_CALLS: usize = 16;

impl Forced<'_> {
    /// A mark as the vocabulary has it: a control token, or text.
    fn mark(&self, mark: &str) -> String {
        match self.tokenizer.id(mark).filter(|&id| self.tokenizer.is_special(id)) {
            Some(id) => format!("<[{id}]>"),
            None => json!(mark).to_string(),
        }
    }

    /// Rules for `call`: one object with name and arguments of one of the tools.
    fn call_rules(&self, arguments: &str) -> String {
        let names: Vec<String> = (0..self.tools.len()).map(|i| format!("call_{i}")).collect();
        let mut rules = format!("call: {}\n", names.join(" | "));
        for (i, tool) in self.tools.iter().enumerate() {
            let head = format!("{{\"name\": {}, {}: ", json!(tool.name), json!(arguments));
            let schema = spaced(closed(tool.parameters.clone()));
            rules +=
                &format!("call_{i}: {} arguments_{i} \"}}\"\narguments_{i}: %json {schema}\n", json!(head));
        }
        rules
    }

    /// `first`, and where several are allowed `next` any further times.
    fn repeated(&self, first: &str, next: &str) -> String {
        match self.parallel {
            true => format!("{first} ({next})~0..{}", MOST_CALLS - 1),
            false => first.to_owned(),
        }
    }
}

/// Arguments that are described are all there are, unless it is said that there may be others.
fn closed(mut schema: Value) -> Value {
    if schema.get("properties").is_some() && schema.get("additionalProperties").is_none() {
        schema["additionalProperties"] = false.into();
    }
    schema
}

/// An id as OpenAI's look.
fn call_id() -> String {
    crate::request_id::fresh("call_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_tell_the_syntax() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/tests/fixtures/templates");
        for (file, name) in [
            ("qwen2.5", Some("hermes")),
            ("qwen3", Some("hermes")),
            ("mistral-nemo", Some("mistral")),
            ("llama-3.1", Some("llama3_json")),
            ("smollm2", None),
        ] {
            let template = std::fs::read_to_string(format!("{folder}/{file}.jinja")).unwrap();
            assert_eq!(syntax(None, Some(&template)).map(|s| s.name), name, "{file}");
        }
        assert_eq!(syntax(Some("mistral"), None).map(|s| s.name), Some("mistral"));
        assert!(syntax(Some("nothing"), None).is_none());
    }
}
