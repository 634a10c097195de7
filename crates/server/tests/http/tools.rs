//! Tool calls. The tiny model knows no tools: what it writes is forced, by a choice or by `tool_choice`.

use crate::harness::{MODEL, Server, engine, service};
use hearth_data::ChatTemplate;
use hearth_engine::EngineConfig;
use hearth_server::{ServerConfig, Service};
use serde_json::{Value, json};
use std::sync::OnceLock;

const PATH: &str = "/v1/chat/completions";

/// Templates in which each way of writing calls shows, and the tools do not: the tiny context has no room for them.
const HERMES: &str = "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}{% endfor %}";
const LLAMA: &str =
    "{% if tools %}\"parameters\" ipython{% endif %}{% for m in messages %}{{ m.role }}{% endfor %}";
const MISTRAL: &str = "{% if tools %}[TOOL_CALLS]{% endif %}{% for m in messages %}{{ m.role }}{% endfor %}";

fn start(template: &str) -> Server {
    let template = Some(ChatTemplate::new(template, None, None).unwrap());
    let service = Service { template, ..service(engine(EngineConfig::default())) };
    Server::start(ServerConfig::new(MODEL), service)
}

fn hermes() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| start(HERMES))
}

fn tools() -> Value {
    let city = json!({"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"],
        "additionalProperties": false});
    let add = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"]});
    json!([{"type": "function", "function": {"name": "weather", "description": "d", "parameters": city}},
        {"type": "function", "function": {"name": "add", "parameters": add}}])
}

fn body(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": tools(), "seed": 1,
        "max_tokens": 300});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// Function names and arguments of a message's calls.
fn calls(message: &Value) -> Vec<(String, Value)> {
    let calls = message["tool_calls"].as_array().unwrap_or_else(|| panic!("{message}"));
    calls
        .iter()
        .map(|call| {
            assert_eq!(call["type"], "function");
            assert!(!call["id"].as_str().unwrap().is_empty());
            let function = &call["function"];
            let arguments = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
            (function["name"].as_str().unwrap().to_owned(), arguments)
        })
        .collect()
}

/// The message that a stream's deltas add up to, as openai-python adds them, and the reason it ended for.
fn streamed(server: &Server, body: &Value) -> (Value, Value) {
    let mut message = json!({"content": "", "tool_calls": []});
    let chunks = server.stream(PATH, body);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    for chunk in &chunks {
        let delta = &chunk["choices"][0]["delta"];
        let content =
            message["content"].as_str().unwrap().to_owned() + delta["content"].as_str().unwrap_or("");
        message["content"] = content.into();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            let list = message["tool_calls"].as_array_mut().unwrap();
            if list.len() == index {
                list.push(call.clone());
            } else {
                let function = &mut list[index]["function"];
                let more = function["arguments"].as_str().unwrap().to_owned()
                    + call["function"]["arguments"].as_str().unwrap();
                function["arguments"] = more.into();
            }
        }
    }
    (message, chunks.last().unwrap()["choices"][0]["finish_reason"].clone())
}

#[test]
fn calls_in_the_text_become_tool_calls() {
    let call = "{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}";
    let one = format!("<tool_call>\n{call}\n</tool_call>");
    let rome = ("weather".to_owned(), json!({"city": "Rome"}));
    for (text, content, count) in [
        (one.clone(), Value::Null, 1),
        (format!("{one}\n{one}"), Value::Null, 2),
        (format!("I look.\n\n{one}"), json!("I look."), 1),
    ] {
        let body = body(json!({"guided_choice": [text]}));
        let choice = hermes().ok(PATH, &body)["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "tool_calls");
        assert_eq!(choice["message"]["content"], content);
        assert_eq!(calls(&choice["message"]), vec![rome.clone(); count]);
        let (message, reason) = streamed(hermes(), &body);
        assert_eq!(reason, "tool_calls");
        assert_eq!(message["content"], content.as_str().unwrap_or(""));
        assert_eq!(calls(&message), vec![rome.clone(); count]);
    }
}

#[test]
fn arguments_are_streamed_as_they_are_written() {
    let text = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>";
    let chunks = hermes().stream(PATH, &body(json!({"guided_choice": [text]})));
    let deltas: Vec<&Value> = chunks
        .iter()
        .filter_map(|c| {
            c["choices"][0]["delta"]["tool_calls"][0].as_object().map(|_| &c["choices"][0]["delta"])
        })
        .collect();
    assert!(deltas.len() > 3, "{deltas:?}");
    assert_eq!(deltas[0]["tool_calls"][0]["function"]["name"], "weather");
    assert!(deltas[1..].iter().all(|d| d["tool_calls"][0].get("id").is_none()));
}

#[test]
fn an_answer_without_calls_is_text() {
    let body = body(json!({"guided_choice": ["A <tool is\nno call. \n"]}));
    let choice = hermes().ok(PATH, &body)["choices"][0].clone();
    assert_eq!((&choice["finish_reason"], choice["message"].get("tool_calls")), (&json!("stop"), None));
    assert_eq!(choice["message"]["content"], "A <tool is\nno call. \n");
    assert_eq!(streamed(hermes(), &body).0["content"], "A <tool is\nno call. \n");
}

#[test]
fn required_calls_are_made_in_every_syntax() {
    for template in [HERMES, LLAMA, MISTRAL] {
        let server = start(template);
        for seed in 0..4 {
            let body =
                body(json!({"tool_choice": "required", "seed": seed, "parallel_tool_calls": seed > 1}));
            let choice = server.ok(PATH, &body)["choices"][0].clone();
            if choice["finish_reason"] == "length" {
                assert!(seed > 1, "one call is short: {choice}");
                continue;
            }
            assert_eq!(choice["finish_reason"], "tool_calls", "{template}: {choice}");
            assert_eq!(choice["message"]["content"], Value::Null);
            let made = calls(&choice["message"]);
            assert!(made.len() == 1 || seed > 1, "{choice}");
            for (name, arguments) in made {
                assert_eq!(arguments.as_object().map(|a| a.len()), Some(1), "nothing but what is described");
                let fits = match name.as_str() {
                    "weather" => arguments["city"] == "Rome" || arguments["city"] == "Paris",
                    "add" => arguments["a"].as_i64().is_some_and(|a| (0..10).contains(&a)),
                    _ => false,
                };
                assert!(fits, "{name} {arguments}");
            }
        }
    }
}

#[test]
fn a_named_function_is_called_once() {
    let named = json!({"type": "function", "function": {"name": "add"}});
    for seed in 0..4 {
        let body = body(json!({"tool_choice": named, "seed": seed, "ignore_eos": true}));
        let made = calls(&hermes().ok(PATH, &body)["choices"][0]["message"]);
        assert_eq!((made.len(), made[0].0.as_str()), (1, "add"));
        assert_eq!(calls(&streamed(hermes(), &body).0), made);
    }
}

#[test]
fn no_tools_are_shown_or_read_when_the_choice_is_none() {
    let text = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call>";
    let with = hermes().ok(PATH, &body(json!({"guided_choice": [text]})));
    let without = hermes().ok(PATH, &body(json!({"guided_choice": [text], "tool_choice": "none"})));
    assert_eq!(without["choices"][0]["message"]["content"], text);
    assert!(without["usage"]["prompt_tokens"].as_u64() < with["usage"]["prompt_tokens"].as_u64());
}

#[test]
fn what_cannot_be_demanded_is_refused() {
    let unknown = start("{{ tools }}{% for m in messages %}{{ m.role }}{% endfor %}");
    let refused = unknown.post(PATH, &body(json!({"tool_choice": "required", "max_tokens": 5})));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tool_choice")));
    let both = hermes().post(PATH, &body(json!({"tool_choice": "required", "guided_regex": "a"})));
    assert_eq!((both.status, &both.json()["error"]["param"]), (400, &json!("tool_choice")));
    let mut bad = body(json!({"tool_choice": "required"}));
    bad["tools"][0]["function"]["parameters"] = json!({"type": "nothing"});
    let bad = hermes().post(PATH, &bad);
    assert_eq!((bad.status, &bad.json()["error"]["param"]), (400, &json!("tools")));
}

/// Answers and streams with one call and with two, for whoever looks at their shape.
pub fn a_message_with_calls() -> Vec<(Value, Vec<Value>)> {
    let call = "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}</tool_call>";
    [call.to_owned(), format!("So: {call}{call}")]
        .map(|text| {
            let body = body(json!({"guided_choice": [text], "logprobs": true}));
            (hermes().ok(PATH, &body), hermes().stream(PATH, &body))
        })
        .into()
}
