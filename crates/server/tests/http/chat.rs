//! `/v1/chat/completions`.

use crate::harness::{MODEL, Server, reference};
use serde_json::{Value, json};

const PATH: &str = "/v1/chat/completions";

fn question() -> Value {
    json!({"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0})
}

fn with(extra: Value) -> Value {
    let mut body = question();
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn every_reference_answer_is_given() {
    for answer in reference()["answers"].as_array().unwrap() {
        let body = json!({"model": MODEL, "messages": [{"role": "user", "content": answer["prompt"]}], "temperature": 0});
        let out = Server::shared().ok(PATH, &body);
        assert_eq!(out["object"], "chat.completion");
        let choice = &out["choices"][0];
        assert_eq!(
            choice["message"],
            json!({"role": "assistant", "content": answer["text"], "refusal": null})
        );
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(out["usage"]["prompt_tokens"], answer["prompt_ids"].as_array().unwrap().len());
    }
}

#[test]
fn typed_parts_and_null_names_are_as_good_as_text() {
    let server = Server::shared();
    let body = json!({"temperature": 0, "max_completion_tokens": 20, "messages": [
        {"role": "user", "name": null, "content": [{"type": "text", "text": "What is the capital of France?"}]}]});
    let plain = server.ok(PATH, &question());
    assert_eq!(server.ok(PATH, &body)["choices"][0]["message"], plain["choices"][0]["message"]);
}

#[test]
fn a_stream_begins_with_role_and_first_token_together() {
    let server = Server::shared();
    let chunks = server.stream(PATH, &with(json!({"stream_options": {"include_usage": true}})));
    let first = &chunks[0]["choices"][0];
    assert_eq!(first["delta"], json!({"role": "assistant", "content": "The"}));
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(12)));
    let (last, before) = chunks.split_last().unwrap();
    assert!(before.iter().all(|c| c["choices"][0].get("finish_reason") == Some(&Value::Null)));
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert!(chunks[1..].iter().all(|c| c["choices"][0]["delta"].get("role").is_none()));
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk"));
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "The capital of France is Paris.");
}

#[test]
fn logprobs_name_tokens_bytes_and_alternatives() {
    let server = Server::shared();
    let body = with(json!({"logprobs": true, "top_logprobs": 3}));
    let whole = server.ok(PATH, &body)["choices"][0]["logprobs"]["content"].clone();
    let content = whole.as_array().unwrap();
    assert_eq!(content.len(), 12);
    for entry in content {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the token is the best alternative, by the very same number.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&entry["token"], &entry["logprob"]));
        let bytes: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
        assert_eq!(String::from_utf8(bytes).unwrap(), entry["token"].as_str().unwrap());
    }
    let streamed: Vec<Value> = server
        .stream(PATH, &body)
        .iter()
        .filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(json!(streamed), whole);
}

#[test]
fn choices_are_independent_and_seeded() {
    let server = Server::shared();
    let body = with(json!({"n": 3, "seed": 5, "temperature": 2, "max_tokens": 12, "ignore_eos": true}));
    let texts = |out: &Value| -> Vec<String> {
        let choices = out["choices"].as_array().unwrap();
        choices.iter().map(|c| c["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let out = server.ok(PATH, &body);
    assert_eq!(texts(&out), texts(&server.ok(PATH, &body)));
    assert_eq!(out["usage"]["completion_tokens"], 36);
    assert_ne!(texts(&out)[0], texts(&out)[1]);
}

#[test]
fn what_the_template_cannot_render_is_refused() {
    let server = Server::shared();
    for (body, param, words) in [
        (json!({"messages": [{"role": "wizard", "content": "x"}]}), "messages", "unknown role wizard"),
        (
            with(json!({"tools": [{"type": "function", "function": {"name": "f"}}]})),
            "tools",
            "no place for tools",
        ),
    ] {
        let answer = server.post(PATH, &body);
        assert_eq!(answer.status, 400, "{}", answer.text);
        assert_eq!(answer.json()["error"]["param"], param);
        assert!(answer.text.contains(words), "{}", answer.text);
    }
}
