//! Clients that go away, servers that go away.

use crate::harness::{
    LONG_TOKENS, MODEL, Server, engine, eventually, first_event, long_request, rest, service,
};
use hearth_engine::api::EngineStats;
use hearth_engine::{EngineConfig, EngineHandle};
use hearth_server::{ServeError, ServerConfig};
use serde_json::json;
use std::net::TcpStream;
use std::time::Duration;

/// Waits until [`long_request`] has been cancelled and all it held is free. An idle engine alone proves nothing: there
/// is a moment between two sequences of a request.
fn eventually_cancelled(engine: &EngineHandle) {
    let over = |s: EngineStats| s.cancelled > 0 && s.running + s.waiting + s.kv_blocks_used == 0;
    eventually("the engine is idle after a cancellation", || over(engine.stats()));
    let stats = engine.stats();
    assert!(stats.generated_tokens < LONG_TOKENS, "{stats:?}");
}

#[test]
fn a_client_that_leaves_a_stream_cancels_its_sequences() {
    let engine = engine(EngineConfig::default());
    let server = Server::start(ServerConfig::new(MODEL), service(engine.clone()));
    let stream = server.connect("/v1/completions", &long_request());
    first_event(&stream);
    drop(stream);
    eventually_cancelled(&engine);
}

#[test]
fn a_client_that_leaves_before_the_answer_cancels_its_sequences() {
    let engine = engine(EngineConfig::default());
    let server = Server::start(ServerConfig::new(MODEL), service(engine.clone()));
    let mut body = long_request();
    body["stream"] = false.into();
    let stream = server.connect("/v1/completions", &body);
    eventually("the engine is busy", || engine.stats().generated_tokens > 0);
    drop(stream);
    eventually_cancelled(&engine);
}

#[test]
fn a_stop_string_frees_the_sequence_at_once() {
    let engine = engine(EngineConfig::default());
    let server = Server::start(ServerConfig::new(MODEL), service(engine.clone()));
    let mut body = long_request();
    for (name, value) in [("logit_bias", json!({"3": 100})), ("stop", json!("!!")), ("stream", json!(false))]
    {
        body[name] = value;
    }
    let answer = server.ok("/v1/completions", &body);
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["usage"]["completion_tokens"]),
        (&json!(""), &json!(256))
    );
    eventually_cancelled(&engine);
}

#[test]
fn requests_in_flight_finish_after_shutdown_begins() {
    let mut server = Server::start(ServerConfig::new(MODEL), service(engine(EngineConfig::default())));
    let mut body = long_request();
    body["n"] = 8.into();
    body["stream_options"] = json!({"include_usage": true});
    let stream = server.connect("/v1/completions", &body);
    first_event(&stream);
    server.begin_shutdown();
    let text = rest(stream);
    assert!(text.contains("data: [DONE]"), "{text}");
    assert!(text.contains("\"completion_tokens\":4000"), "{text}");
    server.wait().unwrap();
    assert!(TcpStream::connect(server.address).is_err(), "the port is closed");
}

#[test]
fn a_drain_ends_after_its_timeout() {
    let config = ServerConfig { drain_timeout: Duration::ZERO, ..ServerConfig::new(MODEL) };
    let engine = engine(EngineConfig::default());
    let mut server = Server::start(config, service(engine.clone()));
    let stream = server.connect("/v1/completions", &long_request());
    first_event(&stream);
    server.begin_shutdown();
    let end = server.wait();
    assert!(matches!(end, Err(ServeError::DrainTimeout { sequences, .. }) if sequences > 0), "{end:?}");
    let text = rest(stream);
    assert!(text.contains("data: {\"error\":") && text.contains("shutting_down"), "{text}");
    assert!(!text.contains("[DONE]"));
    eventually("the engine is idle", || engine.stats().running + engine.stats().waiting == 0);
}

#[test]
fn a_request_that_takes_too_long_ends_with_an_error() {
    let config =
        ServerConfig { request_timeout: Some(Duration::from_millis(50)), ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine(EngineConfig::default())));
    let mut body = long_request();
    let streamed = server.post("/v1/completions", &body);
    assert_eq!(streamed.status, 200);
    let last = streamed.text.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("data: {\"error\":") && last.contains("0.05 seconds"), "{last}");
    body["stream"] = false.into();
    let answer = server.post("/v1/completions", &body);
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (504, &json!("timeout")));
}
