//! Requests that would take more memory than there is for answers: refused before it is taken.

use crate::requests::{last, post};
use crate::wire::{self, Answer};
use crate::{BUDGET, Server, TRAFFIC, heap_alone, idle};
use hearth_memory::{Budget, Ledger, heap};
use hearth_server::ServerConfig;
use serde_json::{Value, json};
use std::io::Write;

/// Beside what bodies and answers may take: a connection and this client.
const BESIDE: u64 = 4 << 20;

fn ask(server: &Server, path: &str, body: &Value) -> Answer {
    let mut stream = wire::connect(server.address);
    stream.write_all(&last(post(path, body))).expect("the server reads");
    let mut bytes = Vec::new();
    wire::rest(&mut stream, &mut bytes);
    let (mut answers, whole) = wire::answers(&bytes);
    assert!(whole && answers.len() == 1, "{}", String::from_utf8_lossy(&bytes));
    answers.remove(0)
}

/// Only bodies and numbers of sequences that the room itself does not allow are to be refused by it.
fn generous(config: ServerConfig) -> ServerConfig {
    ServerConfig { max_sequences_per_request: 1 << 20, ..config }
}

#[test]
fn what_never_fits_is_refused_before_memory_is_taken_for_it() {
    let _alone = heap_alone();
    let server = Server::with(&Ledger::new(Budget::device(BUDGET)), generous);
    let inputs = |count: usize| json!({"input": vec![json!([5]); count]});
    // What is made once is made now.
    assert_eq!(ask(&server, "/v1/embeddings", &inputs(20)).status, 200);
    let prompt = |n: usize| json!({"prompt": [5, 6], "n": n, "max_tokens": 1});
    assert_eq!(ask(&server, "/v1/completions", &prompt(4)).status, 200);
    let before = heap::current().expect("the counter is installed");
    heap::reset_peak();
    heap::set_limit(Some(before + TRAFFIC + BESIDE));
    // 12,800 sequences of 200 tokens: 10 MB of token ids alone.
    let copies = json!({"prompt": vec![vec![5; 200]; 100], "n": 128, "max_tokens": 1});
    // 8,000 vectors of 64 components: 16 MB as values alone.
    for (path, body, field) in
        [("/v1/completions", copies, "max_tokens"), ("/v1/embeddings", inputs(8_000), "input")]
    {
        let answer = ask(&server, path, &body);
        let said = answer.values().remove(0);
        assert_eq!((answer.status, &said["error"]["param"]), (400, &json!(field)), "{said}");
        assert!(
            said["error"]["message"].as_str().is_some_and(|text| text.contains("ask for fewer")),
            "{said}"
        );
    }
    // What does fit is answered within it.
    assert_eq!(ask(&server, "/v1/embeddings", &inputs(500)).status, 200);
    let peak = heap::peak().expect("the counter is installed") - before;
    heap::set_limit(None);
    assert!(peak <= TRAFFIC + BESIDE, "{peak} bytes");
    idle(&server.engine);
    server.stop();
}
