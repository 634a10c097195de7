//! `POST /v1/chat/completions`.

use super::fields::{Fields, describe};
use super::options::{MOST_LOGPROBS, Options};
use super::prompt;
use crate::error::{ApiError, excerpt};
use crate::state::Service;
use crate::tools::request::{self as tools, Tools};
use hearth_data::{ChatTemplate, Content, Message};
use serde_json::{Map, Value};

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatRequest {
    pub(crate) model: Option<String>,
    pub(crate) conversation: Conversation,
    /// `None` = up to the context limit.
    pub(crate) max_tokens: Option<usize>,
    /// Alternatives per position.
    pub(crate) logprobs: Option<usize>,
    pub(crate) options: Options,
}

/// What the template renders.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Message>,
    pub(crate) add_generation_prompt: bool,
    /// Further variables of the template.
    pub(crate) extra: Map<String, Value>,
    /// What the answer may call.
    pub(crate) tools: Tools,
}

/// Parses a body.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn parse(body: &[u8], vocab_size: usize) -> Result<ChatRequest, ApiError> {
    let mut fields = Fields::parse(body)?;
    Ok(ChatRequest {
        model: fields.string("model")?,
        conversation: conversation(&mut fields)?,
        max_tokens: max_tokens(&mut fields)?,
        logprobs: logprobs(&mut fields)?,
        options: Options::take(&mut fields, vocab_size)?,
    })
}

/// The newer name wins where a client sends both.
fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let old = fields.integer("max_tokens", 1..=i64::MAX)?;
    let new = fields.integer("max_completion_tokens", 1..=i64::MAX)?;
    Ok(new.or(old).map(|tokens| tokens as usize))
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let on = fields.boolean("logprobs")?.unwrap_or(false);
    match fields.count("top_logprobs", MOST_LOGPROBS)? {
        Some(top) if top > 0 && !on => {
            Err(fields.refuse("top_logprobs", "\"top_logprobs\" needs \"logprobs\": true"))
        }
        top => Ok(on.then_some(top.unwrap_or(0))),
    }
}

/// Takes the conversation and everything that is rendered with it.
pub(crate) fn conversation(fields: &mut Fields) -> Result<Conversation, ApiError> {
    let messages = messages(fields)?;
    let mut extra = match fields.object("chat_template_kwargs")? {
        Some(kwargs) => kwargs.rest(),
        None => Map::new(),
    };
    let (tools, shown) = tools::take(fields)?;
    if !shown.is_empty() {
        extra.insert("tools".into(), Value::Array(shown));
    }
    let add_generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
    Ok(Conversation { messages, add_generation_prompt, extra, tools })
}

fn messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let list = fields
        .list("messages")?
        .ok_or_else(|| fields.refuse("messages", "\"messages\" is missing; it must be a list of messages"))?;
    if list.is_empty() {
        return Err(fields.refuse("messages", "\"messages\" is an empty list"));
    }
    list.into_iter().enumerate().map(|(index, value)| message(value, &format!("messages[{index}]"))).collect()
}

fn message(value: Value, at: &str) -> Result<Message, ApiError> {
    let wrong = |name: &str, expected: &str, value: &Value| {
        let param = format!("{at}{name}");
        let message = format!("{param:?} must be {expected}, not {}", describe(value));
        ApiError::field(param, message)
    };
    let Value::Object(mut map) = value else {
        return Err(wrong("", "an object with \"role\" and \"content\"", &value));
    };
    // Clients send `"name": null`; a template that asks whether `name` is defined must not see it.
    map.retain(|_, value| !value.is_null());
    let role = match map.remove("role") {
        Some(Value::String(role)) => role,
        other => return Err(wrong(".role", "a string", &other.unwrap_or(Value::Null))),
    };
    let content = match map.remove("content") {
        None => None,
        Some(Value::String(text)) => Some(Content::Text(text)),
        Some(Value::Array(parts)) => {
            for (index, part) in parts.iter().enumerate() {
                check_part(part, &format!("{at}.content[{index}]"))?;
            }
            Some(Content::Parts(parts))
        }
        Some(other) => return Err(wrong(".content", "a string or a list of parts", &other)),
    };
    if let Some(calls) = map.get_mut("tool_calls") {
        parse_arguments(calls);
    }
    Ok(Message { role, content, extra: map })
}

fn check_part(part: &Value, at: &str) -> Result<(), ApiError> {
    let refuse = |message: String| Err(ApiError::field(at, message));
    match part.get("type").and_then(Value::as_str) {
        Some("text") if part.get("text").is_some_and(Value::is_string) => Ok(()),
        Some("text") => refuse(format!("\"{at}.text\" must be a string")),
        Some(other) => refuse(format!(
            "{at:?} is of type {}; this model takes parts of type \"text\" only",
            excerpt(other)
        )),
        None => refuse(format!("{at:?} must be an object with a \"type\", not {}", describe(part))),
    }
}

/// OpenAI writes a call's arguments as JSON in a string; templates expect the object.
fn parse_arguments(calls: &mut Value) {
    for call in calls.as_array_mut().into_iter().flatten() {
        let Some(arguments) = call.get_mut("function").and_then(|f| f.get_mut("arguments")) else { continue };
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Map<_, _>>(text).ok());
        if let Some(parsed) = parsed {
            *arguments = Value::Object(parsed);
        }
    }
}

impl Conversation {
    /// Its token ids as the model's template renders them. Special tokens are the template's business.
    ///
    /// # Errors
    /// 400 when there is no template or tokenizer, or the template refuses the conversation.
    pub(crate) fn ids(&self, service: &Service) -> Result<Vec<u32>, ApiError> {
        let template = service.template.as_ref().ok_or_else(|| {
            ApiError::field("messages", "this model has no chat template: use /v1/completions")
        })?;
        let text = self.render(template)?;
        prompt::encode(service.text_tokenizer()?, &text, false)
    }

    fn render(&self, template: &ChatTemplate) -> Result<String, ApiError> {
        if self.extra.contains_key("tools") && !template.source().contains("tools") {
            return Err(ApiError::field("tools", "this model's chat template has no place for tools"));
        }
        template
            .render(&self.messages, self.add_generation_prompt, &self.extra)
            .map_err(|error| ApiError::field("messages", error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn accepted(body: Value) -> ChatRequest {
        parse(body.to_string().as_bytes(), 320).unwrap_or_else(|e| panic!("{body}: {e}"))
    }

    fn hi() -> Value {
        json!([{"role": "user", "content": "hi"}])
    }

    #[test]
    fn messages_keep_what_templates_look_at() {
        let request = accepted(json!({"messages": [
            {"role": "user", "content": "hi", "name": null},
            {"role": "assistant", "content": null, "tool_calls": [
                {"function": {"name": "f", "arguments": "{\"x\": 1}"}},
                {"function": {"name": "g", "arguments": "not json"}}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
        ]}));
        let [first, second, third] = &request.conversation.messages[..] else { panic!("three messages") };
        assert_eq!((first.text().as_str(), first.extra.len()), ("hi", 0));
        assert_eq!(second.content, None);
        let arguments = |i: usize| &second.extra["tool_calls"][i]["function"]["arguments"];
        assert_eq!((arguments(0), arguments(1)), (&json!({"x": 1}), &json!("not json")));
        assert_eq!((third.text().as_str(), &third.extra["name"]), ("a\nb", &json!("n")));
    }

    #[test]
    fn the_newer_name_of_max_tokens_wins() {
        let most = |extra: Value| {
            let mut body = json!({"messages": hi()});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            accepted(body).max_tokens
        };
        assert_eq!(most(json!({})), None);
        assert_eq!(most(json!({"max_tokens": 5})), Some(5));
        assert_eq!(most(json!({"max_completion_tokens": 7, "max_tokens": 5})), Some(7));
        assert_eq!(most(json!({"max_completion_tokens": null, "max_tokens": 5})), Some(5));
    }

    #[test]
    fn tools_are_shown_unless_the_choice_is_none() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let shown = |choice: Value| {
            let body = json!({"messages": hi(), "tools": tools, "tool_choice": choice});
            accepted(body).conversation.extra.contains_key("tools")
        };
        assert!(shown(json!(null)) && shown(json!("auto")));
        assert!(!shown(json!("none")));
    }

    #[test]
    fn logprobs_count_alternatives() {
        let count = |logprobs: Value, top: Value| {
            accepted(json!({"messages": hi(), "logprobs": logprobs, "top_logprobs": top})).logprobs
        };
        assert_eq!(count(json!(null), json!(null)), None);
        assert_eq!(count(json!(false), json!(0)), None);
        assert_eq!(count(json!(true), json!(null)), Some(0));
        assert_eq!(count(json!(true), json!(5)), Some(5));
    }

    #[test]
    fn wrong_requests_are_refused_with_the_field_named() {
        for (body, param, words) in [
            (json!({}), "messages", "missing"),
            (json!({"messages": []}), "messages", "empty"),
            (json!({"messages": "hi"}), "messages", "a list"),
            (json!({"messages": ["hi"]}), "messages[0]", "an object"),
            (json!({"messages": [{"content": "x"}]}), "messages[0].role", "a string"),
            (json!({"messages": [{"role": 1}]}), "messages[0].role", "a string"),
            (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content", "5"),
            (
                json!({"messages": [{"role": "user", "content": ["x"]}]}),
                "messages[0].content[0]",
                "an object",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
                "messages[0].content[0]",
                "must be a string",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
                "messages[0].content[0]",
                "\"image_url\"",
            ),
            (json!({"messages": hi(), "max_tokens": 0}), "max_tokens", "at least 1"),
            (json!({"messages": hi(), "max_completion_tokens": "x"}), "max_completion_tokens", "integer"),
            (json!({"messages": hi(), "logprobs": 1}), "logprobs", "a boolean"),
            (json!({"messages": hi(), "logprobs": true, "top_logprobs": 21}), "top_logprobs", "from 0 to 20"),
            (json!({"messages": hi(), "top_logprobs": 2}), "top_logprobs", "needs"),
            (json!({"messages": hi(), "tools": {}}), "tools", "a list"),
            (json!({"messages": hi(), "tools": ["x"]}), "tools[0]", "an object"),
            (json!({"messages": hi(), "tools": [{"type": "x"}]}), "tools[0].type", "\"x\""),
            (
                json!({"messages": hi(), "tools": [{"type": "function"}]}),
                "tools[0].function.name",
                "a string",
            ),
            (
                json!({"messages": hi(), "tools": [{"type": "function", "function": {"name": "a b"}}]}),
                "tools[0].function.name",
                "letters",
            ),
            (
                json!({"messages": hi(), "tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}),
                "tools[0].function.parameters",
                "a JSON schema",
            ),
            (json!({"messages": hi(), "tool_choice": "required"}), "tool_choice", "no \"tools\""),
            (json!({"messages": hi(), "tool_choice": "maybe"}), "tool_choice", "\"maybe\""),
            (json!({"messages": hi(), "tool_choice": {"type": "function"}}), "tool_choice", "an object"),
            (
                json!({"messages": hi(), "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice",
                "\"g\"",
            ),
            (json!({"messages": hi(), "parallel_tool_calls": "x"}), "parallel_tool_calls", "a boolean"),
            (json!({"messages": hi(), "chat_template_kwargs": 1}), "chat_template_kwargs", "an object"),
        ] {
            let error = parse(body.to_string().as_bytes(), 320).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
            assert!(error.message.contains(words), "{body}: {error}");
        }
    }
}
