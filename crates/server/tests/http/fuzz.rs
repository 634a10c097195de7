//! Hostile requests over real sockets: whatever comes is answered, and never by a failure of the server's.

use crate::harness::{Answer, MODEL, Server, client, engine, eventually, service};
use crate::openapi::conforms;
use hearth_engine::EngineConfig;
use hearth_server::ServerConfig;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// Requests of each kind: a second or two.
const REQUESTS: usize = 400;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

fn nasty(random: &mut Random) -> Value {
    let deep =
        (0..60).fold(json!(1), |inner, i| if i % 2 == 0 { json!([inner]) } else { json!({"a": inner}) });
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(0.5),
        json!(-0.0),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!("x"),
        json!("\u{0}\u{7f}\u{202e}🙂\u{fffd}"),
        json!("a".repeat(3000)),
        json!("<|im_end|>"),
        json!("none"),
        json!("required"),
        json!("base64"),
        json!("[a-z]{2,4}"),
        json!("start: \"a\" | start \"b\""),
        json!([]),
        json!([null]),
        json!([5, 6, 7]),
        json!([[5], [6]]),
        json!(["a", "b"]),
        json!([5, "x"]),
        json!([1e9]),
        json!({}),
        json!({"type": "json_object"}),
        json!({"type": "object", "properties": {"a": {"type": "string"}}}),
        json!({"type": "json_schema", "json_schema": {"schema": {"enum": [1, "x", null]}}}),
        json!({"include_usage": true}),
        json!({"5": -100, "6": 1e9}),
        json!({"5": 2}),
        json!([{"role": "user", "content": "hi"}]),
        json!([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]),
        json!([{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        json!([{"type": "function", "function": {"name": "f"}}]),
        deep,
    ];
    random.of(&values).clone()
}

const BASES: [(&str, &str); 5] = [
    ("/v1/completions", "CompletionRequest"),
    ("/v1/chat/completions", "ChatRequest"),
    ("/v1/embeddings", "EmbeddingsRequest"),
    ("/tokenize", "TokenizeRequest"),
    ("/detokenize", "DetokenizeRequest"),
];

/// A request that would be fine, but for one or two of the documented fields.
fn request(random: &mut Random, document: &Value) -> (&'static str, Value) {
    let (path, schema) = *random.of(&BASES);
    let mut body = match path {
        "/v1/completions" => json!({"prompt": [5, 6], "max_tokens": 4}),
        "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
        "/v1/embeddings" => json!({"input": "hi"}),
        "/tokenize" => json!({"prompt": "hi"}),
        _ => json!({"tokens": [5]}),
    };
    let properties = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
    let names: Vec<&String> = properties.keys().collect();
    for _ in 0..1 + random.below(2) {
        body[random.of(&names).as_str()] = nasty(random);
    }
    (path, body)
}

/// Every answer is a success or the client's fault, in the documented shape.
fn check(answer: &Answer, what: &str) {
    assert!(
        answer.status == 200 || (400..500).contains(&answer.status),
        "{what}: {} {}",
        answer.status,
        answer.text
    );
    match answer.status {
        200 => assert!(!answer.text.is_empty(), "{what}"),
        _ => conforms("Error", &answer.json()),
    }
}

#[test]
fn hostile_fields_are_answered_or_refused() {
    let engine = engine(EngineConfig::default());
    let server = Server::start(ServerConfig::new(MODEL), service(engine.clone()));
    let document = server.get("/openapi.json").json();
    let (mut random, mut refused) = (Random(1), 0);
    let agent = client();
    for _ in 0..REQUESTS {
        let (path, body) = request(&mut random, &document);
        let asked = Instant::now();
        let response = agent.post(server.url(path)).content_type("application/json").send(body.to_string());
        let answer = Answer::of(response.unwrap());
        check(&answer, &format!("{path} {body}"));
        assert!(asked.elapsed() < Duration::from_secs(10), "{path} took {:?}: {body}", asked.elapsed());
        refused += usize::from(answer.status != 200);
    }
    let varied = (REQUESTS / 10..=REQUESTS * 9 / 10).contains(&refused);
    assert!(varied, "{refused} of {REQUESTS} were refused: the generator is dull");
    eventually("nothing is left", || {
        let stats = engine.stats();
        stats.running + stats.waiting + stats.kv_blocks_used == 0
    });
    assert_eq!(server.get("/health").status, 200);
}

/// A request as bytes, some of them wrong.
fn bytes(random: &mut Random) -> Vec<u8> {
    let body = r#"{"prompt": [5, 6], "max_tokens": 2, "stop": ["é"], "stream": false}"#;
    let mut bytes = match random.below(3) {
        0 => format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()),
        1 => format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
            body.len()
        ),
        _ => "GET /v1/models/x%ff HTTP/1.1\r\nhost: x\r\nauthorization: Bearer x\r\n\r\n".to_owned(),
    }
    .into_bytes();
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len());
        match random.below(4) {
            _ if bytes.len() < 2 => bytes.push(random.next() as u8),
            0 => bytes[at] = random.next() as u8,
            1 => bytes.insert(at, random.next() as u8),
            2 => drop(bytes.remove(at)),
            _ => bytes.truncate(at.max(1)),
        }
    }
    bytes
}

#[test]
fn hostile_bytes_never_stop_the_server() {
    let limit = Duration::from_millis(300);
    let config = ServerConfig { header_timeout: limit, body_timeout: limit, ..ServerConfig::new(MODEL) };
    let engine = engine(EngineConfig::default());
    let server = Server::start(config, service(engine.clone()));
    let mut random = Random(2);
    for _ in 0..REQUESTS {
        let bytes = bytes(&mut random);
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // The server may close before it has read everything.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        let what = String::from_utf8_lossy(&bytes).into_owned();
        let hangs = read.is_err_and(|e| {
            matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
        });
        assert!(!hangs, "no end of the answer to {what:?}: {text}");
        for status in text.match_indices("HTTP/1.1 ").map(|(at, head)| &text[at + head.len()..]) {
            assert!(status.starts_with('2') || status.starts_with('4'), "{what:?}: {text}");
        }
    }
    assert_eq!(server.get("/health").status, 200);
    eventually("nothing is left", || engine.stats().running + engine.stats().waiting == 0);
}
