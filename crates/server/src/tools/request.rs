//! `tools`, `tool_choice`, `parallel_tool_calls`.

use crate::error::{ApiError, excerpt};
use crate::request::fields::{Fields, describe};
use serde_json::{Value, json};

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// JSON schema of its arguments.
    pub(crate) parameters: Value,
}

/// Whether the model is to call.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum ToolChoice {
    /// Tools are not shown.
    None,
    /// As it likes.
    #[default]
    Auto,
    /// One or more calls.
    Required,
    /// One call of this function.
    Named(String),
}

/// The tools of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tools {
    pub(crate) tools: Vec<Tool>,
    pub(crate) choice: ToolChoice,
    /// More than one call may be made.
    pub(crate) parallel: bool,
}

const MOST_TOOLS: usize = 128;
const LONGEST_NAME: usize = 64;

impl Tools {
    /// Whether the answer may hold calls.
    pub(crate) fn on(&self) -> bool {
        !self.tools.is_empty() && self.choice != ToolChoice::None
    }

    /// Whether it must.
    pub(crate) fn forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// The tools that may be called.
    pub(crate) fn callable(&self) -> Vec<&Tool> {
        let named = |tool: &&Tool| match &self.choice {
            ToolChoice::Named(name) => tool.name == *name,
            _ => true,
        };
        self.tools.iter().filter(named).collect()
    }
}

/// Takes the fields; gives the tools too as the client wrote them, for the template.
pub(crate) fn take(fields: &mut Fields) -> Result<(Tools, Vec<Value>), ApiError> {
    let shown = fields.list("tools")?.unwrap_or_default();
    if shown.len() > MOST_TOOLS {
        let message = format!("\"tools\" has {} entries; at most {MOST_TOOLS} are allowed", shown.len());
        return Err(fields.refuse("tools", message));
    }
    let tools = shown.iter().enumerate().map(|(i, value)| tool(value, &format!("tools[{i}]")));
    let tools: Vec<Tool> = tools.collect::<Result<_, _>>()?;
    let choice = choice(fields, &tools)?;
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let shown = if choice == ToolChoice::None { Vec::new() } else { shown };
    Ok((Tools { parallel: parallel && !matches!(choice, ToolChoice::Named(_)), tools, choice }, shown))
}

fn tool(value: &Value, at: &str) -> Result<Tool, ApiError> {
    let refuse = |name: &str, expected: &str, value: &Value| {
        let param = format!("{at}{name}");
        let message = format!("{param:?} must be {expected}, not {}", describe(value));
        Err(ApiError::field(param, message))
    };
    if !value.is_object() {
        return refuse("", "an object with \"type\" and \"function\"", value);
    }
    match &value["type"] {
        Value::String(kind) if kind == "function" => {}
        other => return refuse(".type", "\"function\"", other),
    }
    let function = &value["function"];
    let Some(name) = function["name"].as_str() else {
        return refuse(".function.name", "a string", &function["name"]);
    };
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(fine) {
        let expected = format!("1 to {LONGEST_NAME} letters, digits, underscores, hyphens or dots");
        return refuse(".function.name", &expected, &function["name"]);
    }
    let parameters = match &function["parameters"] {
        Value::Null => json!({"type": "object"}),
        Value::Object(_) => function["parameters"].clone(),
        other => return refuse(".function.parameters", "a JSON schema", other),
    };
    Ok(Tool { name: name.to_owned(), parameters })
}

fn choice(fields: &mut Fields, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    let expected =
        "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let choice = match fields.take("tool_choice") {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(fields.wrong("tool_choice", expected, &Value::String(word))),
        },
        Some(value) => match value["function"]["name"].as_str() {
            Some(name) if value["type"] == "function" => ToolChoice::Named(name.to_owned()),
            _ => return Err(fields.wrong("tool_choice", expected, &value)),
        },
    };
    match &choice {
        ToolChoice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
            let message = format!("\"tool_choice\" names {}, which is not in \"tools\"", excerpt(name));
            Err(fields.refuse("tool_choice", message))
        }
        ToolChoice::Required if tools.is_empty() => {
            Err(fields.refuse("tool_choice", "\"tool_choice\" is \"required\", but there are no \"tools\""))
        }
        _ => Ok(choice),
    }
}
