//! A server under load, what it says of it, and the same again.

use crate::end_to_end::{serve_with, terminate};
use crate::support::{json, root, run, stderr, tiny_model};
use serde_json::{Value, json as value};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

fn post(url: &str, path: &str, body: &Value) -> Value {
    let answer = ureq::post(format!("{url}{path}")).header("x-request-id", "mine").send_json(body);
    answer.expect("200").body_mut().read_json().expect("JSON")
}

#[test]
fn what_was_recorded_under_load_comes_out_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("requests.jsonl").display().to_string();
    let page = folder.path().join("report.html").display().to_string();
    let (mut server, url) = serve_with(&tiny_model(), &["--record", &file, "--max-seqs", "4"]);
    let formats =
        [value!({}), value!({"guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}}})];
    for (seed, format) in formats.iter().cycle().take(6).enumerate() {
        let mut body = value!({"prompt": "What is", "max_tokens": 40, "n": 2, "temperature": 1.2, "top_p": 0.9,
            "frequency_penalty": 0.5, "stop": ["q"]});
        body.as_object_mut().expect("an object").extend(format.as_object().expect("an object").clone());
        if seed > 2 {
            body["seed"] = seed.into();
        }
        post(&url, "/v1/completions", &body);
    }
    let bench = json(&[
        "bench",
        "serve",
        &url,
        "--requests",
        "12",
        "--clients",
        "6",
        "--prompt-tokens",
        "40",
        "--output-tokens",
        "20",
        "--peak-gb-s",
        "10",
        "--html",
        &page,
    ]);
    check_bench(&bench, &page);
    let rate = json(&[
        "bench",
        "serve",
        &url,
        "--requests",
        "5",
        "--rate",
        "50",
        "--prompt-tokens",
        "9",
        "--output-tokens",
        "5",
        "--peak-gb-s",
        "10",
    ]);
    assert_eq!((&rate["errors"], &rate["arrivals"]), (&value!(0), &value!("50 arrivals/s")));
    terminate(&server.0);
    assert!(server.0.wait().expect("ends").success());

    let replay = json(&["replay", &tiny_model(), "--from", &file, "--max-seqs", "16"]);
    assert_eq!(replay["equal"], true, "{replay}");
    // Six requests with two sequences, both runs of the benchmark, and the two warming up before each.
    assert_eq!(replay["replayed"], 6 * 2 + 12 + 5 + 2 * 2);
    assert_eq!(json(&["replay", &tiny_model(), "--from", &file, "--id", "mine"])["replayed"], 12);

    let text = std::fs::read_to_string(&file).expect("the records");
    let mut line: Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
    let token = line["content"]["tokens"][1].as_u64().expect("a token");
    line["content"]["tokens"][1] = (token ^ 1).into();
    std::fs::write(&file, line.to_string()).expect("written");
    let output = run(&["replay", &tiny_model(), "--from", &file, "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("at 1: token"));
    line["weights"] = "0000000000000000".into();
    std::fs::write(&file, line.to_string()).expect("written");
    let output = run(&["replay", &tiny_model(), "--from", &file]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("other weights"), "{}", stderr(&output));
}

fn check_bench(bench: &Value, page: &str) {
    assert_eq!(
        (&bench["name"], &bench["requests"], &bench["errors"]),
        (&value!("serve"), &value!(12), &value!(0))
    );
    let positive = |of: &Value| of.as_f64().is_some_and(|number| number > 0.0);
    for key in ["tok_s", "requests_s", "prompt_tok_s", "of_peak", "wall_s", "peak_rss_bytes"] {
        assert!(positive(&bench[key]), "{key}: {bench}");
    }
    for key in ["ttft_ms", "tpot_ms", "e2e_ms"] {
        let p = &bench[key];
        assert!(positive(&p["p50"]) && p["p50"].as_f64() <= p["p99"].as_f64(), "{key}: {p}");
    }
    let samples = bench["samples"].as_array().expect("a list");
    let tokens: u64 = samples.iter().map(|s| s["output_tokens"].as_u64().expect("a count")).sum();
    assert!((12 * 10..12 * 40).contains(&tokens), "{tokens} tokens for a mean of 20");
    let html = std::fs::read_to_string(page).expect("the page");
    assert_eq!(html.matches("<svg").count(), 4);
    assert!(html.ends_with("</html>\n") && !html.contains("NaN"));
}

#[test]
fn requests_are_logged_without_their_words() {
    let (mut server, url) = serve_with(&tiny_model(), &["--log-requests"]);
    let mut log = BufReader::new(server.0.stderr.take().expect("piped")).lines();
    post(&url, "/v1/completions", &value!({"prompt": "a secret", "max_tokens": 5, "ignore_eos": true}));
    let line =
        log.find_map(|line| serde_json::from_str::<Value>(&line.expect("UTF-8")).ok()).expect("a line");
    assert_eq!(
        (&line["event"], &line["request_id"], &line["end"]),
        (&value!("request"), &value!("mine"), &value!("length"))
    );
    assert_eq!(line["generated_tokens"], 5);
    assert!(line["prefill_ms"].as_f64().is_some_and(|ms| ms > 0.0) && line["queue_ms"].as_f64().is_some());
    assert!(!line.to_string().contains("secret"));
    terminate(&server.0);
    server.0.wait().expect("ends");
}

#[test]
fn every_sequence_is_a_trace_with_its_three_parts() {
    let collector = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", collector.local_addr().expect("an address"));
    let (mut server, url) = serve_with(&tiny_model(), &["--otlp", &address]);
    post(&url, "/v1/completions", &value!({"prompt": "Hello!", "max_tokens": 5, "ignore_eos": true}));
    let (stream, _) = collector.accept().expect("the collector is called");
    let body = body(stream);
    let spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().expect("spans").clone();
    let names: Vec<&str> = spans.iter().filter_map(|span| span["name"].as_str()).collect();
    assert_eq!(names, ["completions", "queue", "prefill", "decode"]);
    assert!(spans[1..].iter().all(|span| span["parentSpanId"] == spans[0]["spanId"]));
    assert!(spans.iter().all(|span| span["traceId"] == spans[0]["traceId"]));
    let time =
        |span: &Value, key: &str| span[key].as_str().and_then(|t| t.parse::<u128>().ok()).expect("a time");
    for pair in spans[1..].windows(2) {
        assert_eq!(time(&pair[0], "endTimeUnixNano"), time(&pair[1], "startTimeUnixNano"));
    }
    terminate(&server.0);
    server.0.wait().expect("ends");
}

/// The JSON of a request, answered with 200.
fn body(mut stream: TcpStream) -> Value {
    let mut reader = BufReader::new(stream.try_clone().expect("a clone"));
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a head");
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).expect("the body");
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").expect("answered");
    serde_json::from_slice(&bytes).expect("JSON")
}

#[test]
fn wrong_wishes_are_refused() {
    for (arguments, words) in [
        (&["bench", "serve", "http://127.0.0.1:9"][..], "cannot be asked"),
        (&["bench", "serve", "http://127.0.0.1:9", "--clients", "0"], "--clients is 0"),
        (&["bench", "serve", "http://127.0.0.1:9", "--spread", "2"], "--spread is 2"),
        (&["bench", "serve", "http://127.0.0.1:9", "--rate", "0"], "--rate is 0"),
        (&["replay", &tiny_model(), "--from", "/nowhere"], "cannot read /nowhere"),
        (&["serve", &tiny_model(), "--tool-format", "x"], "known are hermes"),
        (&["serve", &tiny_model(), "--otlp", "ftp://x"], "http://"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{arguments:?}: {}", stderr(&output));
    }
    assert!(root().join("docs/serving.md").exists());
}

#[test]
fn adapters_answer_under_their_names_and_are_replayed() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("requests.jsonl").display().to_string();
    let directory = root().join("tests/fixtures/lora/plain/adapter").display().to_string();
    let adapter = format!("plain={directory}");
    let (mut server, url) = serve_with(&tiny_model(), &["--record", &file, "--adapter", &adapter]);
    let text = |model: Option<&str>| {
        let body = value!({"model": model, "prompt": "Hello!", "max_tokens": 20, "temperature": 0});
        post(&url, "/v1/completions", &body)["choices"][0]["text"].clone()
    };
    assert_ne!(text(Some("plain")), text(None));
    terminate(&server.0);
    assert!(server.0.wait().expect("ends").success());

    let replay = json(&["replay", &tiny_model(), "--from", &file, "--adapter", &adapter]);
    assert_eq!((&replay["equal"], &replay["replayed"]), (&value!(true), &value!(2)), "{replay}");
    let output = run(&["replay", &tiny_model(), "--from", &file]);
    assert!(stderr(&output).contains("recorded with an adapter"), "{}", stderr(&output));
    let output = run(&["eval", &tiny_model(), "--perplexity", &file, "--adapter", &adapter]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let output = run(&["serve", &tiny_model(), "--port", "0", "--adapter", &adapter, "--adapter", &adapter]);
    assert!(stderr(&output).contains("given twice"), "{}", stderr(&output));
    let generate = |more: &[&str]| {
        let all = ["generate", &tiny_model(), "-p", "Hello!", "-n", "60", "--ignore-eos"];
        json(&[&all[..], more].concat())
    };
    let (merged, live) = (generate(&["--adapter", &directory]), generate(&["--adapter", &adapter]));
    assert_eq!(live["tokens"], merged["tokens"], "the same model, but for the order of sums");
    let guessed = generate(&["--adapter", &adapter, "--speculative", "ngram", "--draft-tokens", "4"]);
    assert_eq!(guessed["tokens"], live["tokens"]);
    assert!(guessed["speculation"]["accepted_tokens"].as_u64().expect("a count") > 0, "{guessed}");
}
