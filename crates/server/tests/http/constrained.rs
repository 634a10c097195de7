//! Output that must conform to a format.

use crate::harness::{MODEL, Server, engine, service};
use hearth_engine::EngineConfig;
use hearth_server::{ServerConfig, Service};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn schema() -> Value {
    json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"], "properties": {
        "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n"]}, "maxItems": 3}}})
}

fn completion(extra: Value) -> Value {
    let mut body = json!({"prompt": [5, 6, 7], "max_tokens": 200, "temperature": 1.3, "seed": 3});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    assert!(choices.iter().all(|c| c["finish_reason"] == "stop"), "{answer}");
    choices
        .iter()
        .map(|c| c["text"].as_str().or(c["message"]["content"].as_str()).unwrap().to_owned())
        .collect()
}

fn conforms(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    let object = value.as_object().unwrap();
    assert_eq!(object.keys().collect::<Vec<_>>(), ["name", "age", "tags"]);
    assert!(value["name"].as_str().unwrap().chars().count() <= 6, "{text}");
    assert!((0..100).contains(&value["age"].as_i64().unwrap()), "{text}");
    let tags = value["tags"].as_array().unwrap();
    assert!(tags.len() <= 3 && tags.iter().all(|t| *t == "a" || *t == "b\n"), "{text}");
}

#[test]
fn every_choice_conforms_to_the_schema() {
    let server = Server::shared();
    for format in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema()}}}),
        json!({"guided_json": schema(), "temperature": 0}),
        json!({"structured_outputs": {"json": schema()}, "ignore_eos": true}),
    ] {
        let mut body = completion(format);
        body["n"] = 4.into();
        texts(&server.ok(COMPLETIONS, &body)).iter().for_each(|text| conforms(text));
    }
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema()}}});
    conforms(&texts(&server.ok(CHAT, &body))[0]);
}

#[test]
fn any_object_is_one_object() {
    let body = completion(json!({"response_format": {"type": "json_object"}, "n": 8, "max_tokens": 120}));
    let answer = Server::shared().ok(COMPLETIONS, &body);
    let mut complete = 0;
    for choice in answer["choices"].as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        match choice["finish_reason"].as_str().unwrap() {
            "stop" => {
                let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
                assert!(value.is_object());
                complete += 1;
            }
            // A free string may go on for ever.
            _ => assert!(text.starts_with('{'), "{text}"),
        }
    }
    assert!(complete > 0, "{answer}");
}

#[test]
fn expressions_grammars_and_choices_are_kept_to() {
    let server = Server::shared();
    let of = |format: Value| texts(&server.ok(COMPLETIONS, &completion(format)));
    for n in 0..6 {
        let text = of(json!({"guided_regex": "[0-9]{3}-[a-f]+z", "seed": n})).remove(0);
        let (digits, letters) = text.split_once('-').unwrap();
        assert!(digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");
        let letters = letters.strip_suffix('z').unwrap();
        assert!(!letters.is_empty() && letters.bytes().all(|b| (b'a'..=b'f').contains(&b)), "{text}");
        let text = of(json!({"guided_choice": ["Paris", "Pa\"ris", "né🙂"], "seed": n})).remove(0);
        assert!(["Paris", "Pa\"ris", "né🙂"].contains(&text.as_str()), "{text}");
        let grammar = "start: sum\nsum: NUMBER (\"+\" NUMBER)~1..3\nNUMBER: /[1-9][0-9]?/";
        let text = of(json!({"guided_grammar": grammar, "seed": n})).remove(0);
        let numbers: Vec<u32> = text.split('+').map(|n| n.parse().unwrap()).collect();
        assert!((2..=4).contains(&numbers.len()), "{text}");
    }
}

#[test]
fn the_model_prefers_among_what_is_allowed() {
    let question = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let body = json!({"messages": question, "temperature": 0,
        "guided_choice": ["The capital of France is Rome.", "The capital of France is Paris."]});
    assert_eq!(texts(&Server::shared().ok(CHAT, &body)), ["The capital of France is Paris."]);
}

#[test]
fn constrained_output_does_not_depend_on_company_chunks_or_streaming() {
    let server = Server::shared();
    let config = EngineConfig { max_seqs: 4, max_batch_tokens: 5, ..EngineConfig::default() };
    let small = Server::start(ServerConfig::new(MODEL), service(engine(config)));
    let body = |seed: u64| completion(json!({"guided_json": schema(), "seed": seed}));
    let alone: Vec<String> =
        (0..6).map(|seed| texts(&server.ok(COMPLETIONS, &body(seed))).remove(0)).collect();
    let mut many = body(0);
    many["n"] = 6.into();
    assert_eq!(texts(&server.ok(COMPLETIONS, &many)), alone);
    assert_eq!(texts(&small.ok(COMPLETIONS, &many)), alone);
    let streamed: String = server
        .stream(COMPLETIONS, &body(2))
        .iter()
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(streamed, alone[2]);
}

#[test]
fn formats_that_cannot_be_used_are_refused() {
    let server = Server::shared();
    let deep =
        (0..500).fold(json!({"type": "integer"}), |schema, _| json!({"type": "array", "items": schema}));
    for (extra, param) in [
        (json!({"guided_json": {"type": "nothing"}}), "guided_json"),
        (json!({"guided_json": {"$ref": "https://example.com/x.json"}}), "guided_json"),
        (json!({"guided_json": {"$ref": "#/nowhere"}}), "guided_json"),
        (json!({"guided_json": {"not": {"type": "string"}}}), "guided_json"),
        (json!({"guided_regex": "a("}), "guided_regex"),
        (json!({"guided_regex": "(".repeat(100_000)}), "guided_regex"),
        (json!({"guided_regex": "(".repeat(100_000) + &")".repeat(100_000)}), "guided_regex"),
        (
            json!({"guided_grammar": format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000))}),
            "guided_grammar",
        ),
        (
            json!({"guided_grammar": format!("start: A\nA: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000))}),
            "guided_grammar",
        ),
        (
            json!({"guided_grammar": format!("start: {}\"a\"{}", "[".repeat(100_000), "]".repeat(100_000))}),
            "guided_grammar",
        ),
        (json!({"guided_regex": "x".repeat(300_000)}), "guided_regex"),
        (json!({"guided_grammar": "start: nothing"}), "guided_grammar"),
        (json!({"guided_grammar": ""}), "guided_grammar"),
        (json!({"guided_grammar": "start: start"}), "guided_grammar"),
        (json!({"guided_choice": ["a"], "min_tokens": 3}), "min_tokens"),
        (json!({"guided_choice": ["a"], "guided_regex": "a"}), "guided_choice"),
    ] {
        let answer = server.post(COMPLETIONS, &completion(extra.clone()));
        assert_eq!(answer.status, 400, "{extra}: {}", answer.text);
        assert_eq!(answer.json()["error"]["param"], param, "{extra}: {}", answer.text);
        assert!(answer.text.len() < 700, "{}", answer.text);
    }
    // Large counts are no large expressions: they are never written out.
    let counted = completion(json!({"guided_regex": "(a{1000}){1000}{1000}", "max_tokens": 5}));
    assert_eq!(server.ok(COMPLETIONS, &counted)["choices"][0]["finish_reason"], "length");
    // Deep nesting is either compiled or refused; never a crash.
    assert!([200, 400].contains(&server.post(COMPLETIONS, &completion(json!({"guided_json": deep}))).status));
    server.ok(COMPLETIONS, &json!({"prompt": [5]}));
}

#[test]
fn a_model_without_words_has_no_formats() {
    let without = Service { tokenizer: None, template: None, ..service(engine(EngineConfig::default())) };
    let server = Server::start(ServerConfig::new(MODEL), without);
    let answer = server.post(COMPLETIONS, &completion(json!({"guided_regex": "a"})));
    assert_eq!(answer.status, 400, "{}", answer.text);
    let endless = Service { eos_tokens: Vec::new(), ..service(engine(EngineConfig::default())) };
    let server = Server::start(ServerConfig::new(MODEL), endless);
    let answer = server.post(COMPLETIONS, &completion(json!({"guided_regex": "a"})));
    assert!(answer.status == 400 && answer.text.contains("end-of-sequence"), "{}", answer.text);
}
