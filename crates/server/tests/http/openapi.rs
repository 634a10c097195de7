//! What is served is what the document says.

use crate::harness::{MODEL, Server};
use crate::schema::errors;
use serde_json::{Value, json};
use std::sync::OnceLock;

fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| Server::shared().get("/openapi.json").json())
}

/// Holds a value against a schema of the document.
pub fn conforms(schema: &str, value: &Value) {
    let reference = json!({"$ref": format!("#/components/schemas/{schema}")});
    let errors = errors(document(), &reference, value);
    assert!(errors.is_empty(), "{schema}: {errors:#?} in\n{value:#}");
}

fn may_stream(body: &Value) -> bool {
    ["best_of", "prompt_logprobs"].iter().all(|field| body.get(field).is_none())
}

/// Sends a request that the document must describe, and holds the answer against it.
fn check(path: &str, body: Value) {
    let operation = &document()["paths"][path]["post"];
    let name = |schema: &Value| schema["$ref"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    conforms(&name(&operation["requestBody"]["content"]["application/json"]["schema"]), &body);
    let content = &operation["responses"]["200"]["content"];
    let answer = Server::shared().ok(path, &body);
    conforms(&name(&content["application/json"]["schema"]), &answer);
    if let Some(chunk) = content.get("text/event-stream").filter(|_| may_stream(&body)) {
        for value in Server::shared().stream(path, &body) {
            conforms(&name(&chunk["schema"]), &value);
        }
    }
}

#[test]
fn answers_and_chunks_are_as_described() {
    let path = "/v1/completions";
    check(path, json!({"prompt": "Hello!", "model": MODEL}));
    check(
        path,
        json!({"prompt": [[5, 6], [7]], "n": 2, "logprobs": 3, "echo": true, "return_token_ids": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "max_tokens": 4}),
    );
    check(
        path,
        json!({"prompt": ["a", "b"], "best_of": 3, "stop": ["x"], "min_tokens": 1, "logit_bias": {"5": 1}}),
    );
    check(path, json!({"prompt": ["Hello!", "x"], "n": 2, "prompt_logprobs": 3, "max_tokens": 1}));
    check(path, json!({"prompt": [5], "guided_json": {"type": "integer", "maximum": 9, "minimum": 0}}));
    let path = "/v1/chat/completions";
    let messages = json!([{"role": "user", "content": "hi"}]);
    check(path, json!({"messages": messages}));
    check(
        path,
        json!({"messages": messages, "n": 2, "logprobs": true, "top_logprobs": 2, "max_tokens": 5,
        "ignore_eos": true, "return_token_ids": true, "stream_options": {"include_usage": true}}),
    );
    check(path, json!({"messages": messages, "response_format": {"type": "json_object"}, "max_tokens": 20}));
    check(path, json!({"messages": messages, "prompt_logprobs": 0, "max_tokens": 2, "n": 2}));
    check("/v1/embeddings", json!({"input": ["a", "b"], "dimensions": 3}));
    check("/v1/embeddings", json!({"input": [5, 6], "encoding_format": "base64", "pooling": "last"}));
    check("/tokenize", json!({"prompt": "Hello!", "return_token_strs": true}));
    check("/tokenize", json!({"messages": messages}));
    check("/detokenize", json!({"tokens": [5, 6]}));
}

#[test]
fn tool_calls_are_as_described() {
    for (message, delta) in crate::tools::a_message_with_calls() {
        conforms("ChatResponse", &message);
        delta.iter().for_each(|chunk| conforms("ChatChunk", chunk));
    }
}

#[test]
fn what_is_asked_for_without_a_body_is_as_described() {
    let server = Server::shared();
    conforms("ModelList", &server.get("/v1/models").json());
    conforms("Model", &server.get(&format!("/v1/models/{MODEL}")).json());
    conforms("TokenizerInfo", &server.get("/tokenizer_info").json());
    conforms("Health", &server.get("/health").json());
    for (path, kind) in
        [("/metrics", "text/plain"), ("/openapi.json", "application/json"), ("/", "text/html")]
    {
        let answer = server.get(path);
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.header("content-type").starts_with(kind), "{path}");
    }
}

#[test]
fn every_path_takes_the_methods_described_and_no_other() {
    let server = Server::shared();
    for (path, item) in document()["paths"].as_object().unwrap() {
        let path = path.replace("{id}", MODEL);
        let (get, post) = (server.get(&path), server.post(&path, &json!({})));
        assert_eq!(get.status == 405, item.get("get").is_none(), "GET {path}: {}", get.status);
        assert_eq!(post.status == 405, item.get("post").is_none(), "POST {path}: {}", post.status);
        if post.status != 200 {
            conforms("Error", &post.json());
        }
    }
    assert_eq!(document()["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn errors_are_as_described() {
    let server = Server::shared();
    for (path, body) in [("/v1/completions", "{"), ("/v1/chat/completions", "[]"), ("/nothing", "{}")] {
        conforms("Error", &server.post_text(path, body).json());
    }
}
