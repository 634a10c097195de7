//! Clients that are slow, stuck or half gone.

use crate::harness::{MODEL, Server, engine, eventually, first_event, long_request, service};
use hearth_engine::EngineConfig;
use hearth_server::ServerConfig;
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_millis(200);

fn impatient() -> Server {
    let config = ServerConfig {
        header_timeout: LIMIT,
        body_timeout: LIMIT,
        write_timeout: LIMIT,
        ..ServerConfig::new(MODEL)
    };
    Server::start(config, service(engine(EngineConfig::default())))
}

fn open(server: &Server, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(bytes.as_bytes()).unwrap();
    stream
}

/// What the server says until it closes, which it must do by itself.
fn answer(mut stream: TcpStream) -> String {
    let (mut out, started) = (Vec::new(), Instant::now());
    // A reset after the answer is a close as well.
    let _ = stream.read_to_end(&mut out);
    assert!(started.elapsed() < Duration::from_secs(20), "the server did not close");
    String::from_utf8_lossy(&out).into_owned()
}

const HEAD: &str = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n";

#[test]
fn heads_that_do_not_come_close_the_connection() {
    let server = impatient();
    for head in ["", "P", "POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: "] {
        answer(open(&server, head));
    }
    // Drop by drop is no better.
    let mut stream = open(&server, "GET /health HTTP/1.1\r\n");
    let closed = std::iter::repeat_with(|| {
        std::thread::sleep(LIMIT / 4);
        stream.write_all(b"x: y\r\n").is_err()
    });
    assert!(closed.take(100).any(|closed| closed), "fed with drops it stays open");
}

#[test]
fn a_body_that_does_not_come_is_a_408() {
    let server = impatient();
    let text = answer(open(&server, &(HEAD.to_owned() + "{\"prompt\": ")));
    assert!(text.starts_with("HTTP/1.1 408") && text.contains("did not arrive within 0.2 seconds"), "{text}");
}

#[test]
fn a_body_that_breaks_off_is_a_400() {
    let server = impatient();
    let stream = open(&server, &(HEAD.to_owned() + "{\"prompt\": "));
    stream.shutdown(Shutdown::Write).unwrap();
    let text = answer(stream);
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 400"), "{text}");
    let chunked = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n";
    let text = answer(open(&server, chunked));
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 400"), "{text}");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn idle_connections_are_closed_and_busy_ones_are_not() {
    let server = impatient();
    let health = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let text = answer(open(&server, health));
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    // A request that takes longer than every timeout but its own.
    let mut body = long_request();
    body["stream"] = false.into();
    body["n"] = 16.into();
    assert_eq!(server.post("/v1/completions", &body).status, 200);
}

#[test]
fn a_client_that_reads_nothing_loses_its_request() {
    let engine = engine(EngineConfig::default());
    let config = ServerConfig { write_timeout: LIMIT, ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine.clone()));
    let mut body = long_request();
    // Enough to fill the buffers of both ends many times over.
    body["logprobs"] = 10.into();
    let stream = server.connect("/v1/completions", &body);
    first_event(&stream);
    eventually("the stuck request is cancelled", || engine.stats().cancelled > 0);
    eventually("the engine is idle", || {
        let stats = engine.stats();
        stats.running + stats.waiting + stats.kv_blocks_used == 0
    });
}

#[test]
fn more_connections_than_allowed_wait_for_their_turn() {
    let config = ServerConfig { max_connections: 2, header_timeout: LIMIT, ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine(EngineConfig::default())));
    let stuck = [open(&server, "G"), open(&server, "G")];
    // Both places are taken until their heads are overdue; then it is this one's turn.
    assert_eq!(server.get("/health").status, 200);
    drop(stuck);
    for _ in 0..10 {
        server.ok("/v1/completions", &json!({"prompt": [5], "max_tokens": 1}));
    }
}

#[test]
fn who_waits_too_long_is_told_when_to_come_back() {
    let engine = engine(EngineConfig { max_seqs: 1, max_batch_tokens: 8, ..EngineConfig::default() });
    let config = ServerConfig { max_queue_time: Some(Duration::ZERO), ..ServerConfig::new(MODEL) };
    let server = Server::start(config, service(engine));
    // What finds room at once does not wait; the second of two must.
    server.ok("/v1/completions", &json!({"prompt": [5], "max_tokens": 1}));
    let body = json!({"prompt": [[5], [6]], "max_tokens": 500, "ignore_eos": true});
    let answer = server.post("/v1/completions", &body);
    let after: u32 = answer.header("retry-after").parse().unwrap();
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("queue_timeout")));
    assert!((1..=60).contains(&after), "{after}");
}
