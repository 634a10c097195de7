//! Models, tokenizer, health and metrics.

use crate::harness::{MODEL, Server, client, engine, eventually, reference, service};
use hearth_engine::EngineConfig;
use hearth_server::ServerConfig;
use serde_json::{Value, json};

#[test]
fn models_are_listed_and_found_by_name_and_alias() {
    let config = ServerConfig { model_aliases: vec!["other".into()], ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine(EngineConfig::default())));
    let list = server.get("/v1/models").json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!(MODEL)));
    assert_eq!(list["data"][0]["max_model_len"], 512);
    assert_eq!(server.get(&format!("/v1/models/{MODEL}")).json(), list["data"][0]);
    let answer = server.ok("/v1/completions", &json!({"model": "other", "prompt": [5]}));
    assert_eq!(answer["model"], "other");
}

#[test]
fn the_tokenizer_can_be_used_from_afar() {
    let server = Server::shared();
    let reference = reference();
    for case in reference["tokenize"].as_array().unwrap() {
        let tokens = server.ok("/tokenize", &json!({"prompt": case["text"], "add_special_tokens": false}));
        assert_eq!(tokens["tokens"], case["ids"]);
        assert_eq!(tokens["count"], case["ids"].as_array().unwrap().len());
        let text = server.ok("/detokenize", &json!({"tokens": case["ids"]}));
        assert_eq!(text["prompt"], case["text"]);
    }
    for case in reference["template"].as_array().unwrap() {
        let body =
            json!({"messages": case["messages"], "add_generation_prompt": case["add_generation_prompt"]});
        assert_eq!(server.ok("/tokenize", &body)["tokens"], case["ids"]);
    }
    let strings = server.ok("/tokenize", &json!({"prompt": "Hello!", "return_token_strs": true}));
    assert_eq!(strings["token_strs"].as_array().unwrap().len(), 3);
    let info = server.get("/tokenizer_info").json();
    assert_eq!((&info["eos_token"], &info["bos_token"]), (&json!("<|im_end|>"), &json!("<|im_start|>")));
    assert!(info["chat_template"].as_str().unwrap().contains("add_generation_prompt"));
}

#[test]
fn request_ids_are_given_back() {
    let server = Server::shared();
    let call = |id: &str| {
        let answer = client().get(server.url("/health")).header("x-request-id", id).call().unwrap();
        answer.headers()["x-request-id"].to_str().unwrap().to_owned()
    };
    assert_eq!(call("mine-17"), "mine-17");
    assert!(call(&"x".repeat(257)).starts_with("req-"));
    assert_ne!(server.get("/health").header("x-request-id"), server.get("/health").header("x-request-id"));
}

/// The value of a metric with these labels.
fn figure(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

#[test]
fn metrics_count_what_happened() {
    let engine = engine(EngineConfig::default());
    let server = Server::start(ServerConfig::new(MODEL), service(engine.clone()));
    let body = json!({"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 4, "ignore_eos": true});
    server.ok("/v1/completions", &body);
    server.post("/v1/completions", &json!({}));
    server.get("/nothing");
    // The engine tells callers first and keeps its books after, both before the sequence counts as gone.
    eventually("the last step is booked", || engine.stats().running == 0);
    let answer = server.get("/metrics");
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
    let text = &answer.text;
    for (series, value) in [
        ("hearth_http_requests_total{code=\"200\",route=\"/v1/completions\"}", 1.0),
        ("hearth_http_requests_total{code=\"400\",route=\"/v1/completions\"}", 1.0),
        ("hearth_http_requests_total{code=\"404\",route=\"other\"}", 1.0),
        ("hearth_sequences_finished_total{reason=\"length\"}", 2.0),
        ("hearth_time_to_first_token_seconds_count", 2.0),
        ("hearth_queue_seconds_count", 2.0),
        ("vllm:generation_tokens_total{model_name=\"tiny/chat\"}", 8.0),
        ("hearth_time_per_output_token_seconds_count", 2.0),
        ("hearth_e2e_request_latency_seconds_count", 2.0),
        ("hearth_generated_tokens_total{model_name=\"tiny/chat\"}", 8.0),
        ("hearth_prompt_tokens_total{model_name=\"tiny/chat\"}", 5.0),
        ("vllm:num_requests_waiting{model_name=\"tiny/chat\"}", 0.0),
        ("vllm:num_requests_running{model_name=\"tiny/chat\"}", 0.0),
        ("vllm:kv_cache_usage_perc{model_name=\"tiny/chat\"}", 0.0),
    ] {
        assert_eq!(figure(text, series), Some(value), "{series} in\n{text}");
    }
}

#[test]
fn without_a_model_the_server_says_that_it_is_loading() {
    let server = Server::loading(ServerConfig::new(MODEL));
    let health = server.get("/health");
    assert_eq!((health.status, health.json()), (503, json!({"status": "loading"})));
    let refused = server.post("/v1/completions", &json!({"prompt": [5]}));
    let error: Value = refused.json()["error"].clone();
    assert_eq!(
        (refused.status, refused.header("retry-after"), &error["code"]),
        (503, "1", &json!("loading"))
    );
    assert_eq!(server.get("/metrics").status, 200);
    server.state.ready(service(engine(EngineConfig::default())));
    assert_eq!(server.get("/health").status, 200);
    server.ok("/v1/completions", &json!({"prompt": [5]}));
}
