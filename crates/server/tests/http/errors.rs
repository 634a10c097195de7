//! Requests that are refused.

use crate::harness::{Answer, MODEL, Server, client, engine, eventually, service};
use hearth_engine::EngineConfig;
use hearth_engine::api::{Request, Sampling};
use hearth_server::ServerConfig;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Every error has the shape OpenAI's clients parse.
fn check(answer: &Answer, status: u16, kind: &str, words: &str) {
    assert_eq!(answer.status, status, "{}", answer.text);
    let error = &answer.json()["error"];
    assert_eq!(error["type"], kind, "{error}");
    assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    assert!(error.get("param").is_some() && error.get("code").is_some(), "{error}");
    assert!(!answer.header("x-request-id").is_empty());
}

#[test]
fn wrong_requests_are_answered_with_a_sentence() {
    let server = Server::shared();
    let invalid = "invalid_request_error";
    let completions = |body: Value| server.post("/v1/completions", &body);
    check(&server.post_text("/v1/completions", "{"), 400, invalid, "not valid JSON");
    check(&server.post_text("/v1/completions", "\u{0}"), 400, invalid, "not valid JSON");
    check(&completions(json!({"prompt": ""})), 400, invalid, "prompt is empty");
    check(&completions(json!({"prompt": [[]]})), 400, invalid, "prompt is empty");
    check(&completions(json!({"prompt": [5, 320]})), 400, invalid, "vocabulary size 320");
    check(&completions(json!({"prompt": [5], "temperature": 9})), 400, invalid, "temperature");
    check(&completions(json!({"prompt": vec![5; 512]})), 400, invalid, "512 tokens");
    check(
        &completions(json!({"prompt": [[5], vec![5; 513]], "max_tokens": 0})),
        400,
        invalid,
        "context limit",
    );
    check(&completions(json!({"prompt": [5], "max_tokens": 512})), 400, invalid, "context limit of 512");
    check(&completions(json!({"prompt": vec!["x"; 100], "n": 100})), 400, invalid, "at most 1024");
    check(&completions(json!({"prompt": [5], "model": "other"})), 404, invalid, MODEL);
    check(&server.get("/v1/nothing"), 404, invalid, "/v1/nothing");
    check(&server.get("/v1/models/nothing"), 404, invalid, "nothing");
    check(&server.get("/v1/completions"), 405, invalid, "method GET");
    check(&server.post("/health", &json!({})), 405, invalid, "method POST");
    check(&server.post("/tokenize", &json!({"text": "x"})), 400, invalid, "\"prompt\" or \"messages\"");
    check(&server.post("/detokenize", &json!({"tokens": [320]})), 400, invalid, "token id 320");
    let long = completions(json!({"prompt": vec![5; 600]}));
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
}

#[test]
fn a_body_over_the_limit_is_refused_unread() {
    let config = ServerConfig { max_body_bytes: 1000, ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine(EngineConfig::default())));
    let fits = json!({"prompt": "x".repeat(400), "max_tokens": 0}).to_string();
    assert_eq!(server.post_text("/v1/completions", &fits).status, 200);
    let large = json!({"prompt": "x".repeat(1000)}).to_string();
    check(&server.post_text("/v1/completions", &large), 413, "invalid_request_error", "1000 bytes");
    // Without a length announced it is noticed on the way.
    let mut body = large.as_bytes();
    let send = client().post(server.url("/v1/completions")).send(ureq::SendBody::from_reader(&mut body));
    check(&Answer::of(send.unwrap()), 413, "invalid_request_error", "1000 bytes");
}

#[test]
fn what_there_is_no_room_for_is_refused_before_it_is_made() {
    let config = ServerConfig { max_traffic_bytes: 1 << 20, ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine(EngineConfig::default())));
    let asked =
        |n: usize, logprobs: usize| json!({"prompt": "x", "max_tokens": 100, "n": n, "logprobs": logprobs});
    assert_eq!(server.post("/v1/completions", &asked(1, 5)).status, 200);
    check(&server.post("/v1/completions", &asked(64, 5)), 400, "invalid_request_error", "fewer tokens");
    // A body that is announced and does not come keeps its room; its connection's end gives it back.
    let mut stuck = TcpStream::connect(server.address).unwrap();
    stuck.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n{").unwrap();
    eventually("a 429", || server.post("/v1/completions", &asked(4, 5)).status == 429);
    let refused = server.post("/v1/completions", &asked(4, 5));
    assert_eq!(
        (refused.json()["error"]["code"].as_str(), refused.header("retry-after").is_empty()),
        (Some("no_room"), false)
    );
    drop(stuck);
    eventually("an answer", || server.post("/v1/completions", &asked(4, 5)).status == 200);
}

/// A request whose body comes in chunks, so far the beginning of it.
fn begin_chunked(server: &Server) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    send_chunk(&mut stream, r#"{"prompt": "x", "max_tokens": 1, "user": ""#);
    stream
}

fn send_chunk(stream: &mut TcpStream, text: &str) {
    // The server may have hung up by now.
    let _ = stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
}

fn end_chunked(stream: &mut TcpStream) -> String {
    send_chunk(stream, "\"}");
    let _ = stream.write_all(b"0\r\n\r\n");
    status_line(stream)
}

fn status_line(stream: &TcpStream) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

fn is_answered(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let answered = stream.peek(&mut [0]).is_ok();
    stream.set_nonblocking(false).unwrap();
    answered
}

#[test]
fn a_body_of_unknown_length_takes_the_room_of_what_came_of_it() {
    let config = ServerConfig { max_traffic_bytes: 1 << 20, ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine(EngineConfig::default())));
    // Three at once, where one that might become as long as is allowed would not fit.
    let mut three = [(); 3].map(|()| begin_chunked(&server));
    for stream in &mut three {
        let line = end_chunked(stream);
        assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    }
    // Longer than all the room there is.
    let mut long = begin_chunked(&server);
    send_chunk(&mut long, &"x".repeat(66_000));
    let line = status_line(&long);
    assert!(line.starts_with("HTTP/1.1 413"), "{line}");
    // Two that grow beyond it together: one is refused, the other goes on.
    let mut two = [(); 2].map(|()| begin_chunked(&server));
    two.iter_mut().for_each(|stream| send_chunk(stream, &"x".repeat(24_000)));
    let mut refused = None;
    eventually("one is refused", || {
        refused = two.iter().position(is_answered);
        refused.is_some()
    });
    let line = status_line(&two[refused.unwrap()]);
    assert!(line.starts_with("HTTP/1.1 429"), "{line}");
    let other = &mut two[1 - refused.unwrap()];
    assert!(!is_answered(other));
    send_chunk(other, &"x".repeat(24_000));
    let line = end_chunked(other);
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    // All of it was given back.
    let body = json!({"prompt": "x", "max_tokens": 1, "user": "x".repeat(60_000)});
    eventually("room for a body that needs nearly all", || {
        server.post("/v1/completions", &body).status == 200
    });
}

#[test]
fn a_key_opens_everything_but_probes() {
    let config = ServerConfig { api_key: Some("secret".into()), ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine(EngineConfig::default())));
    for path in ["/v1/models", "/tokenizer_info", "/v1/completions", "/nothing"] {
        check(&server.get(path), 401, "authentication_error", "API key");
    }
    assert_eq!((server.get("/health").status, server.get("/metrics").status), (200, 200));
    for (key, status) in
        [("Bearer secret", 200), ("Bearer wrong", 401), ("Bearer secretly", 401), ("secret", 401)]
    {
        let call = client().get(server.url("/v1/models")).header("authorization", key).call();
        assert_eq!(call.unwrap().status(), status, "{key}");
    }
}

#[test]
fn a_full_queue_is_a_429_to_try_again() {
    let config = EngineConfig { max_seqs: 1, max_waiting: 0, ..EngineConfig::default() };
    let engine = engine(config);
    let server = Server::start(ServerConfig::new(MODEL), service(engine.clone()));
    for stream in [false, true] {
        let body = json!({"prompt": [5], "stream": stream});
        let mut refused = None;
        // The sequence that is in the way may end before the request comes: then once more.
        eventually("a request finds the engine occupied", || {
            let in_the_way = engine.submit(endless());
            refused = Some(server.post("/v1/completions", &body)).filter(|answer| answer.status != 200);
            drop(in_the_way);
            refused.is_some()
        });
        let answer = refused.unwrap();
        check(&answer, 429, "rate_limit_error", "limit 0");
        assert_eq!(answer.header("retry-after"), "1");
    }
}

/// As many tokens as the tiny model's context holds.
fn endless() -> Request {
    Request {
        prompt: vec![5],
        max_tokens: 511,
        stop_tokens: Vec::new(),
        sampling: Sampling::default(),
        logprobs: None,
        prompt_logprobs: None,
        adapter: None,
    }
}
