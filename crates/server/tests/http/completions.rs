//! `/v1/completions`.

use crate::harness::{MODEL, Server, engine, reference, service, tokenizer};
use hearth_engine::EngineConfig;
use hearth_server::{ServerConfig, Service};
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

/// Prompt ids, answer ids (with the closing token) and answer text of the first reference answer.
fn known_answer() -> (Vec<u32>, Vec<u32>, String) {
    let reference = reference();
    let answer = &reference["answers"][0];
    let ids = |key: &str| serde_json::from_value(answer[key].clone()).unwrap();
    (ids("prompt_ids"), ids("ids"), answer["text"].as_str().unwrap().to_owned())
}

fn floats(values: &Value) -> Vec<Option<f64>> {
    values.as_array().unwrap().iter().map(Value::as_f64).collect()
}

#[test]
fn a_greedy_completion_is_the_reference_s() {
    let (prompt, ids, text) = known_answer();
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 50, "temperature": 0, "return_token_ids": true});
    let answer = Server::shared().ok(PATH, &body);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], MODEL);
    let choice = &answer["choices"][0];
    assert_eq!(
        (choice["text"].as_str(), choice["finish_reason"].as_str()),
        (Some(text.as_str()), Some("stop"))
    );
    assert_eq!(choice["token_ids"], json!(ids[..ids.len() - 1]));
    assert_eq!(choice["logprobs"], Value::Null);
    let (p, c) = (prompt.len(), ids.len() - 1);
    let usage = json!({"prompt_tokens": p, "completion_tokens": c, "total_tokens": p + c,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(answer["usage"], usage);
}

#[test]
fn text_and_its_ids_give_the_same_completion() {
    let text = "What is the capital of Fra";
    let ids = tokenizer().encode(text, true).unwrap();
    let server = Server::shared();
    let body = |prompt: Value| json!({"prompt": prompt, "temperature": 0, "ignore_eos": true});
    let [a, b] = [json!(text), json!(ids)].map(|p| server.ok(PATH, &body(p))["choices"].clone());
    assert_eq!(a, b);
    let all = server.ok(PATH, &body(json!([text, "x", text])));
    let choices = all["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    assert_eq!((&choices[0]["text"], &choices[2]["text"]), (&a[0]["text"], &a[0]["text"]));
    assert_eq!(choices[2]["index"], 2);
}

/// vLLM's field and the arrays of `echo` are two ways to write one computation, whatever else is asked for.
#[test]
fn prompt_logprobs_are_those_of_echo() {
    let ids = [5, 6, 7, 40, 5, 6];
    let body = json!({"prompt": ids, "max_tokens": 0, "echo": true, "logprobs": 2, "temperature": 0});
    let echo = Server::shared().ok(PATH, &body)["choices"][0]["logprobs"].clone();
    for (alternatives, also_echo) in [(0, false), (2, false), (5, true), (1, true)] {
        let mut asked = if also_echo { body.clone() } else { json!({"prompt": ids, "max_tokens": 1}) };
        asked["prompt_logprobs"] = alternatives.into();
        let answer = Server::shared().ok(PATH, &asked);
        let choice = &answer["choices"][0];
        if also_echo {
            assert_eq!(choice["logprobs"], echo, "what echo shows is its own");
        }
        let rows = choice["prompt_logprobs"].as_array().unwrap();
        assert_eq!((rows.len(), &rows[0]), (ids.len(), &Value::Null));
        for (i, row) in rows.iter().enumerate().skip(1) {
            let own = &row[ids[i].to_string()];
            assert_eq!(own["logprob"], echo["token_logprobs"][i]);
            assert_eq!(own["decoded_token"], echo["tokens"][i]);
            let rank = own["rank"].as_u64().unwrap();
            let entries = row.as_object().unwrap().len() as u64;
            assert_eq!(entries, alternatives + u64::from(rank > alternatives), "position {i}: {row}");
        }
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    }
}

#[test]
fn max_tokens_is_sixteen_when_not_said() {
    let answer = Server::shared().ok(PATH, &json!({"prompt": [5, 6], "ignore_eos": true}));
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

/// The request `lm-eval --model local-completions` sends, and the arithmetic it does on the answer.
#[test]
fn harnesses_score_continuations_with_echo() {
    let (context, answer, _) = known_answer();
    let (right, wrong) = (&answer[..4], [300, 301]);
    let prompts = [
        [&context[..], right].concat(),
        [&context[..], &wrong[..]].concat(),
        [&context[..], &answer[..answer.len() - 1]].concat(),
    ];
    let body = json!({"model": MODEL, "prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": true,
        "temperature": 0, "seed": 1234});
    let out = Server::shared().ok(PATH, &body);
    let score = |index: usize| {
        let logprobs = &out["choices"][index]["logprobs"];
        let own = floats(&logprobs["token_logprobs"]);
        for array in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(
                logprobs[array].as_array().unwrap().len(),
                prompts[index].len() + 1,
                "{array} of {index}"
            );
        }
        assert_eq!((own[0], &logprobs["top_logprobs"][0]), (None, &Value::Null));
        let range = context.len()..own.len() - 1;
        let sum: f64 = own[range.clone()].iter().map(|v| v.unwrap()).sum();
        let greedy = range.into_iter().all(|i| {
            let top = logprobs["top_logprobs"][i].as_object().unwrap();
            own[i] == top.values().filter_map(Value::as_f64).max_by(f64::total_cmp)
        });
        (sum, greedy)
    };
    assert!(score(0).1 && score(2).1 && !score(1).1);
    assert!(score(0).0 > -0.1, "{}", score(0).0);
    assert!(score(1).0 < -5.0, "{}", score(1).0);
    // The third prompt is followed by the closing token: it ends the text, and yet has its entry.
    assert_eq!(out["choices"][2]["finish_reason"], "stop");
    assert_eq!(out["choices"][2]["logprobs"]["tokens"].as_array().unwrap().last().unwrap(), "<|im_end|>");
}

#[test]
fn echoed_and_generated_log_probabilities_are_the_same_numbers() {
    let (prompt, ids, text) = known_answer();
    let server = Server::shared();
    let body = json!({"prompt": prompt, "max_tokens": 50, "temperature": 0, "logprobs": 2});
    let generated = server.ok(PATH, &body)["choices"][0]["logprobs"].clone();
    let whole = [&prompt[..], &ids[..ids.len() - 1]].concat();
    let body = json!({"prompt": whole, "max_tokens": 0, "temperature": 0, "logprobs": 2, "echo": true});
    let echoed = server.ok(PATH, &body)["choices"][0].clone();
    assert_eq!(echoed["finish_reason"], "length");
    let tail = |key: &str| json!(echoed["logprobs"][key].as_array().unwrap()[prompt.len()..]);
    for key in ["tokens", "token_logprobs", "top_logprobs"] {
        assert_eq!(generated[key], tail(key), "{key}");
    }
    assert_eq!(generated["text_offset"][1], 3, "\"The\" has three characters: {text}, {generated}");
}

#[test]
fn echo_gives_the_prompt_in_the_client_s_words() {
    let server = Server::shared();
    let text = "Hello!";
    let body = json!({"prompt": text, "max_tokens": 0, "echo": true, "logprobs": 0});
    let choice = server.ok(PATH, &body)["choices"][0].clone();
    assert_eq!(choice["text"], text);
    let offsets = &choice["logprobs"]["text_offset"];
    assert_eq!(offsets, &json!([0, 4, 5]));
    let streamed = server
        .stream(PATH, &json!({"prompt": [294, 81, 3], "max_tokens": 2, "echo": true, "ignore_eos": true}));
    assert_eq!(streamed[0]["choices"][0]["text"], text);
}

#[test]
fn a_stream_is_the_answer_in_pieces() {
    let server = Server::shared();
    let body = json!({"prompt": ["Hello!", "What is"], "n": 2, "seed": 7, "max_tokens": 30, "logprobs": 2,
        "temperature": 1.5, "ignore_eos": true});
    let whole = server.ok(PATH, &body);
    let chunks = server.stream(PATH, &body);
    for index in 0..4 {
        let of = |c: &&Value| c["choices"][0]["index"] == index;
        let mine: Vec<&Value> = chunks.iter().filter(of).map(|c| &c["choices"][0]).collect();
        let text: String = mine.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(whole["choices"][index]["text"], text);
        for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let all: Vec<&Value> = mine.iter().flat_map(|c| c["logprobs"][key].as_array().unwrap()).collect();
            assert_eq!(whole["choices"][index]["logprobs"][key], json!(all), "{key} of {index}");
        }
        let (last, before) = mine.split_last().unwrap();
        assert!(before.iter().all(|c| c.get("finish_reason") == Some(&Value::Null)));
        assert_eq!(last["finish_reason"], "length");
    }
    assert!(chunks.iter().all(|c| c["object"] == "text_completion" && c["id"] == chunks[0]["id"]));
    assert!(chunks.iter().all(|c| c.get("usage").is_none() && c["choices"].as_array().unwrap().len() == 1));
}

#[test]
fn usage_comes_only_when_asked_for() {
    let server = Server::shared();
    let body = |options: Value| json!({"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": true, "stream_options": options});
    let chunks = server.stream(PATH, &body(json!({"include_usage": true})));
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 4);
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert!(others.iter().all(|c| c.get("usage").is_none()));
    let chunks = server.stream(PATH, &body(json!({"continuous_usage_stats": true})));
    assert_eq!(chunks.last().unwrap()["usage"]["total_tokens"], 7);
    assert_eq!(chunks[0]["usage"]["completion_tokens"], 1);
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let (prompt, _, text) = known_answer();
    let server = Server::shared();
    for (stop, kept, reason) in [
        (json!("Paris"), "The capital of France is ", "stop"),
        (json!(["nothing like it", " is P"]), "The capital of France", "stop"),
        (json!(["The"]), "", "stop"),
        (json!(["Parisian"]), text.as_str(), "stop"),
        (json!(null), text.as_str(), "stop"),
    ] {
        let body = json!({"prompt": prompt, "max_tokens": 50, "temperature": 0, "stop": stop, "logprobs": 0});
        let choice = server.ok(PATH, &body)["choices"][0].clone();
        assert_eq!(
            (choice["text"].as_str(), choice["finish_reason"].as_str()),
            (Some(kept), Some(reason)),
            "{stop}"
        );
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
        let joined: String = tokens.iter().filter_map(Value::as_str).collect();
        assert!(joined.starts_with(kept), "{stop}: {joined:?}");
        // What was streamed was never more than the text.
        let mut shown = String::new();
        for chunk in server.stream(PATH, &body) {
            shown.push_str(chunk["choices"][0]["text"].as_str().unwrap());
            assert!(kept.starts_with(&shown), "{stop}: {shown:?}");
        }
        assert_eq!(shown, kept, "{stop}");
    }
}

#[test]
fn sampling_fields_reach_the_sampler() {
    let server = Server::shared();
    let text = |extra: Value| {
        let mut body = json!({"prompt": [5, 6, 7], "max_tokens": 24, "ignore_eos": true, "temperature": 1.5});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(PATH, &body)["choices"].clone()
    };
    assert_eq!(text(json!({"seed": 1})), text(json!({"seed": 1})));
    assert_ne!(text(json!({"seed": 1})), text(json!({"seed": 2})));
    let two = text(json!({"seed": 1, "n": 2}));
    assert_ne!(two[0]["text"], two[1]["text"]);
    let greedy = text(json!({"temperature": 0}));
    for equal in [
        json!({"top_k": 1}),
        json!({"top_p": 0}),
        json!({"min_p": 1.0}),
        json!({"temperature": 0, "top_k": -1}),
    ] {
        assert_eq!(text(equal.clone()), greedy, "{equal}");
    }
    let forced = text(json!({"logit_bias": {"3": 100}}));
    assert_eq!(forced[0]["text"], "!".repeat(24));
    let favoured = json!({"temperature": 0, "logit_bias": {"3": 30}});
    assert_eq!(text(favoured.clone()), forced);
    let mut penalized = favoured;
    penalized["frequency_penalty"] = 2.into();
    assert_ne!(text(penalized), forced, "24 times two is more than 30");
}

#[test]
fn a_batch_larger_than_the_queue_is_answered_in_full() {
    let config =
        EngineConfig { max_seqs: 1, max_waiting: 1, max_batch_tokens: 64, ..EngineConfig::default() };
    let server = Server::start(ServerConfig::new(MODEL), service(engine(config)));
    let prompts: Vec<[u32; 2]> = (3..40).map(|id| [id, id]).collect();
    let answer =
        server.ok(PATH, &json!({"prompt": prompts, "max_tokens": 3, "temperature": 0, "ignore_eos": true}));
    assert_eq!(answer["choices"].as_array().unwrap().len(), prompts.len());
    assert_eq!(answer["usage"]["completion_tokens"], 3 * prompts.len());
}

#[test]
fn a_model_without_a_tokenizer_takes_and_gives_ids() {
    let service = Service { tokenizer: None, template: None, ..service(engine(EngineConfig::default())) };
    let server = Server::start(ServerConfig::new(MODEL), service);
    let (prompt, ids, _) = known_answer();
    let choice = server
        .ok(PATH, &json!({"prompt": prompt, "max_tokens": 50, "temperature": 0, "logprobs": 1}))["choices"]
        [0]
    .clone();
    assert_eq!((&choice["text"], &choice["token_ids"]), (&json!(""), &json!(ids[..ids.len() - 1])));
    assert_eq!(choice["logprobs"]["tokens"][0], format!("token_id:{}", ids[0]));
    for (path, body) in [
        (PATH, json!({"prompt": "text"})),
        (PATH, json!({"prompt": [1], "stop": "x"})),
        ("/tokenize", json!({"prompt": "text"})),
        ("/detokenize", json!({"tokens": [1]})),
    ] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, 400, "{path}");
        assert!(answer.text.contains("no tokenizer"), "{}", answer.text);
    }
    let answer =
        server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "x"}]}));
    assert_eq!(answer.status, 400);
    assert!(answer.text.contains("no chat template"), "{}", answer.text);
}

#[test]
fn a_stop_string_may_stay_in_the_text() {
    let (prompt, _, _) = known_answer();
    let server = Server::shared();
    let body = json!({"prompt": prompt, "max_tokens": 50, "temperature": 0, "stop": [" is"],
        "include_stop_str_in_output": true});
    let choice = server.ok(PATH, &body)["choices"][0].clone();
    assert_eq!(choice["text"], "The capital of France is");
    assert_eq!(choice["finish_reason"], "stop");
}

#[test]
fn min_tokens_puts_off_every_kind_of_stop() {
    let (prompt, ids, _) = known_answer();
    let server = Server::shared();
    let count = |extra: Value| {
        let mut body = json!({"prompt": prompt, "max_tokens": 60, "temperature": 0});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(PATH, &body)["usage"]["completion_tokens"].as_u64().unwrap()
    };
    let natural = ids.len() as u64 - 1;
    assert_eq!(count(json!({"min_tokens": 3})), natural);
    assert!(count(json!({"min_tokens": natural + 5})) >= natural + 5);
    assert_eq!(count(json!({"stop": "The"})), 1);
    assert!(count(json!({"stop": "The", "min_tokens": 5})) >= 5);
    let refused = server.post(PATH, &json!({"prompt": [5], "max_tokens": 4, "min_tokens": 5}));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("min_tokens")));
}

#[test]
fn the_best_of_several_are_given() {
    let server = Server::shared();
    let body = |extra: Value| {
        let mut body = json!({"prompt": ["Hello!", "What"], "max_tokens": 6, "temperature": 1.5, "seed": 9,
            "ignore_eos": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(PATH, &body)
    };
    let all = body(json!({"n": 5, "logprobs": 0}));
    let best = body(json!({"n": 2, "best_of": 5}));
    let mean = |choice: &Value| {
        let logprobs = floats(&choice["logprobs"]["token_logprobs"]);
        logprobs.iter().map(|v| v.unwrap()).sum::<f64>() / logprobs.len() as f64
    };
    for prompt in 0..2 {
        let mut group = all["choices"].as_array().unwrap()[5 * prompt..][..5].to_vec();
        group.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        for (rank, choice) in group[..2].iter().enumerate() {
            let given = &best["choices"][2 * prompt + rank];
            assert_eq!((&given["text"], &given["logprobs"]), (&choice["text"], &Value::Null));
            assert_eq!(given["index"], 2 * prompt + rank);
        }
    }
    assert_eq!(best["choices"].as_array().unwrap().len(), 4);
    assert_eq!(best["usage"]["completion_tokens"], 60, "what was thrown away was generated too");
}
