//! The model's own chat template, rendered as Hugging Face `transformers` does.

mod generation;
mod python;

use crate::error::Error;
use crate::message::{Content, Message};
use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use serde_json::{Map, Value};
use std::ops::Range;

const NAME: &str = "chat_template";
const MARKED: &str = "chat_template_with_marks";

/// A Jinja chat template, ready to render conversations.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
    takes_parts: bool,
    has_generation: bool,
}

/// A rendered conversation and the byte ranges in it that the assistant wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Marked {
    /// The text.
    pub text: String,
    /// What stands inside `{% generation %}` blocks, in order.
    pub assistant: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles `source`. The special tokens are what `bos_token` and `eos_token` mean inside the template.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`] when the source is not valid Jinja.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self, Error> {
        let mut environment = python::environment();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|e| Error::TemplateSyntax(e.to_string()))?,
        );
        let generation = generation::replace(source);
        let syntax = |e: minijinja::Error| Error::TemplateSyntax(describe(&e));
        environment.add_template_owned(NAME, generation.plain).map_err(syntax)?;
        environment.add_template_owned(MARKED, generation.marked).map_err(syntax)?;
        let mut template = Self {
            environment,
            source: source.to_owned(),
            bos_token: bos_token.unwrap_or_default().to_owned(),
            eos_token: eos_token.unwrap_or_default().to_owned(),
            takes_parts: false,
            has_generation: generation.found,
        };
        template.takes_parts = template.probe_parts();
        Ok(template)
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template itself marks what the assistant says with `{% generation %}` blocks.
    pub fn has_generation_blocks(&self) -> bool {
        self.has_generation
    }

    /// The text of a conversation. `add_generation_prompt` ends it with the header of an assistant turn. `extra`
    /// holds further variables of the template, such as `tools` or `enable_thinking`.
    ///
    /// # Errors
    /// [`Error::TemplateRender`], with the template's own words where it raises an exception.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, Error> {
        self.render_template(NAME, messages, add_generation_prompt, extra)
    }

    /// A whole conversation with what stands in `{% generation %}` blocks marked.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_marked(&self, messages: &[Message], extra: &Map<String, Value>) -> Result<Marked, Error> {
        let text = self.render_template(MARKED, messages, false, extra)?;
        Ok(generation::unmark(&text))
    }

    fn render_template(
        &self,
        name: &str,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, Error> {
        let mut variables = Map::new();
        variables.insert("bos_token".into(), self.bos_token.as_str().into());
        variables.insert("eos_token".into(), self.eos_token.as_str().into());
        variables.insert("tools".into(), Value::Null);
        variables.insert("documents".into(), Value::Null);
        variables.insert("add_generation_prompt".into(), add_generation_prompt.into());
        variables.insert("messages".into(), messages.iter().map(|m| self.message_value(m)).collect());
        variables.extend(extra.iter().map(|(k, v)| (k.clone(), v.clone())));
        let failed = |e: minijinja::Error| Error::TemplateRender(describe(&e));
        let template = self.environment.get_template(name).map_err(failed)?;
        template.render(Serde(&variables)).map_err(failed)
    }

    fn message_value(&self, message: &Message) -> Value {
        let mut out = Map::new();
        out.insert("role".into(), message.role.as_str().into());
        match &message.content {
            Some(Content::Parts(parts)) if self.takes_parts => {
                out.insert("content".into(), parts.clone().into());
            }
            Some(_) => {
                out.insert("content".into(), message.text().into());
            }
            // Templates ask `message.content is none` as well as `is defined`; transformers passes the null on.
            None => {
                out.insert("content".into(), Value::Null);
            }
        }
        // Clients send `"name": null` for what is not there; templates ask whether it `is defined`.
        let there = message.extra.iter().filter(|(_, value)| !value.is_null());
        out.extend(there.map(|(key, value)| (key.clone(), value.clone())));
        Value::Object(out)
    }

    /// Whether the template can take a list of parts for `content`: it then shows a part's text and not the list.
    fn probe_parts(&mut self) -> bool {
        const PROBE: &str = "probe-of-parts";
        let part = serde_json::json!({"type": "text", "text": PROBE});
        let message =
            Message { role: "user".into(), content: Some(Content::Parts(vec![part])), extra: Map::new() };
        self.takes_parts = true;
        self.render(&[message], false, &Map::new()).is_ok_and(|text| {
            text.contains(PROBE) && !["'type'", "\"type\""].iter().any(|key| text.contains(key))
        })
    }
}

/// The error with the reasons behind it, in one line.
fn describe(error: &minijinja::Error) -> String {
    let mut text = match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("{detail} (line {line} of the template)"),
        (Some(detail), None) => detail.to_owned(),
        (None, Some(line)) => format!("{} (line {line} of the template)", error.kind()),
        (None, None) => error.kind().to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
