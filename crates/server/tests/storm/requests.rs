//! What is asked for: requests whose answers are known, any others, and bytes that are no requests at all.

use serde_json::{Value, json};

/// How many requests have known answers.
pub const KNOWN: u64 = 24;
const VOCABULARY: u64 = 320;
/// Tokens that a sequence may reach.
const CONTEXT: u64 = 256;

/// Numbers without end, the same for the same seed.
pub struct Dice(pub u64);

impl Dice {
    /// Below `n`.
    pub fn roll(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.roll(n) == 0
    }

    fn of<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.roll(list.len() as u64) as usize].clone()
    }

    fn tokens(&mut self, most: u64) -> Value {
        (0..1 + self.roll(most)).map(|_| 3 + self.roll(VOCABULARY - 3)).collect()
    }
}

/// Number `kind` of the requests whose answers are known.
pub fn known(kind: u64) -> Vec<u8> {
    let mut dice = Dice(kind * 977 + 5);
    let mut body = json!({
        "max_tokens": 1 + dice.roll(20),
        "temperature": dice.of(&[0.0, 0.7, 1.3]),
        "seed": kind,
        "return_token_ids": true,
        "n": 1 + dice.roll(3),
        "stream": dice.one_in(2),
        "user": dice.of(&["ann", "bob"]),
    });
    // Some do not say how long they are.
    let send = if kind % 3 == 2 { post_in_chunks } else { post };
    if kind.is_multiple_of(4) {
        body["messages"] = json!([{"role": "user", "content": "x".repeat(dice.roll(40) as usize)}]);
        return send("/v1/chat/completions", &body);
    }
    body["prompt"] = dice.tokens(40);
    match kind % 8 {
        1 => body["logprobs"] = 3.into(),
        2 => body["guided_regex"] = "[a-c]{2,6}".into(),
        3 => body["stop"] = json!(["e", "th"]),
        5 => (body["echo"], body["logprobs"]) = (true.into(), 1.into()),
        _ => {}
    }
    send("/v1/completions", &body)
}

/// Any request at all, most of them possible.
pub fn hostile(dice: &mut Dice) -> Vec<u8> {
    match dice.roll(16) {
        0 => return get(dice.of(&["/metrics", "/health", "/v1/models", "/nothing", "/openapi.json", "/"])),
        1 => return post("/tokenize", &json!({"prompt": "abc ".repeat(dice.roll(500) as usize)})),
        2 => return post("/v1/embeddings", &json!({"input": dice.tokens(60), "user": "eve"})),
        3 => {
            let inputs: Vec<Value> = (0..1 + dice.roll(16)).map(|_| dice.tokens(9)).collect();
            return post_in_chunks("/v1/embeddings", &json!({"input": inputs}));
        }
        _ => {}
    }
    let longest = if dice.one_in(8) { 2 * CONTEXT } else { CONTEXT / 4 };
    let mut body = json!({
        "prompt": dice.tokens(longest),
        "max_tokens": dice.roll(CONTEXT * 3 / 4),
        "stream": dice.one_in(2),
        "ignore_eos": dice.one_in(2),
        "priority": dice.roll(3),
    });
    match dice.roll(10) {
        0 => (body["n"], body["logprobs"]) = ((1 + dice.roll(16)).into(), 20.into()),
        1 => body["logprobs"] = dice.roll(21).into(),
        2 => body["response_format"] = json!({"type": "json_object"}),
        3 => (body["n"], body["best_of"]) = (1.into(), 3.into()),
        4 => body["prompt"] = json!([dice.tokens(30), dice.tokens(30), dice.tokens(9)]),
        _ => {}
    }
    post("/v1/completions", &body)
}

/// A request that must be refused: fields of the wrong kind and sizes that can never be.
pub fn impossible(dice: &mut Dice) -> Vec<u8> {
    let wrong = [
        ("prompt", json!([VOCABULARY])),
        ("prompt", json!({"a": [1]})),
        ("prompt", json!([[]])),
        ("prompt", json!(vec![5; 2000])),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("many")),
        ("max_tokens", json!(u64::MAX)),
        ("max_tokens", json!(1e300)),
        ("n", json!(0)),
        ("n", json!(1u64 << 40)),
        ("best_of", json!(1000)),
        ("temperature", json!("hot")),
        ("top_p", json!(-3)),
        ("logprobs", json!(1_000_000)),
        ("logit_bias", json!({"-5": 1})),
        ("stop", json!(vec!["x"; 100])),
        ("guided_regex", json!("(((")),
        ("guided_grammar", json!("start: nothing")),
        ("response_format", json!({"type": "poem"})),
        ("model", json!("another")),
        ("suffix", json!("end")),
    ];
    let (field, value) = dice.of(&wrong);
    let mut body = json!({"prompt": [5, 6], "max_tokens": 4});
    body[field] = value;
    post("/v1/completions", &body)
}

/// Bytes that are no request: the server refuses them or hangs up.
pub fn nonsense(dice: &mut Dice) -> Vec<u8> {
    let head = "POST /v1/completions HTTP/1.1\r\nhost: storm\r\n";
    let text = match dice.roll(8) {
        0 => format!("{head}content-length: 18446744073709551615\r\n\r\n{{"),
        1 => format!("{head}content-length: 99999999\r\n\r\n{}", "x".repeat(1000)),
        2 => format!("{head}content-length: -1\r\n\r\n{{}}"),
        3 => format!("{head}transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\nx"),
        4 => format!("{head}transfer-encoding: chunked\r\n\r\nzz\r\n"),
        5 => format!("{head}content-length: 4\r\n\r\n{{\"a\""),
        6 => format!("{head}x: {}\r\n\r\n", "y".repeat(3000)),
        _ => {
            let noise = (0..1 + dice.roll(200)).map(|_| dice.roll(256) as u8);
            // An end, so that it is not the time that tells.
            return noise.chain(*b"\r\n\r\n").collect();
        }
    };
    text.into_bytes()
}

/// The same with the wish that the connection be closed after the answer.
pub fn last(request: Vec<u8>) -> Vec<u8> {
    let line = request.windows(2).position(|w| w == b"\r\n").map_or(0, |at| at + 2);
    [&request[..line], b"connection: close\r\n", &request[line..]].concat()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: storm\r\n\r\n").into_bytes()
}

pub fn post(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!("{}content-length: {}\r\n\r\n{body}", head(path), body.len()).into_bytes()
}

fn post_in_chunks(path: &str, body: &Value) -> Vec<u8> {
    let chunk = |part: &[u8]| [format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat();
    let chunks: Vec<Vec<u8>> = body.to_string().as_bytes().chunks(40).map(chunk).collect();
    let head = format!("{}transfer-encoding: chunked\r\n\r\n", head(path));
    [head.as_bytes(), &chunks.concat(), b"0\r\n\r\n"].concat()
}

fn head(path: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: storm\r\ncontent-type: application/json\r\n")
}
