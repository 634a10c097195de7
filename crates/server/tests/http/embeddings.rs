//! `/v1/embeddings`.

use crate::harness::{MODEL, Server, engine, service, tokenizer};
use hearth_engine::EngineConfig;
use hearth_server::ServerConfig;
use serde_json::{Value, json};

const PATH: &str = "/v1/embeddings";

fn vectors(answer: &Value) -> Vec<Vec<f64>> {
    let data = answer["data"].as_array().unwrap();
    data.iter().map(|d| serde_json::from_value(d["embedding"].clone()).unwrap()).collect()
}

fn length(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn texts_and_their_ids_have_the_same_vectors() {
    let server = Server::shared();
    let (a, b) = ("What is the capital of France?", "Hello!");
    let ids = |text: &str| tokenizer().encode(text, true).unwrap();
    let texts = server.ok(PATH, &json!({"model": MODEL, "input": [a, b, a]}));
    assert_eq!((&texts["object"], &texts["model"]), (&json!("list"), &json!(MODEL)));
    assert_eq!(texts["data"][2]["index"], 2);
    assert_eq!(texts["data"][0]["object"], "embedding");
    let count = 2 * ids(a).len() + ids(b).len();
    assert_eq!(texts["usage"], json!({"prompt_tokens": count, "total_tokens": count}));
    let texts = vectors(&texts);
    assert_eq!(texts[0], texts[2]);
    assert_ne!(texts[0], texts[1]);
    assert_eq!(texts[..2], vectors(&server.ok(PATH, &json!({"input": [ids(a), ids(b)]}))));
    assert_eq!(texts[..1], vectors(&server.ok(PATH, &json!({"input": ids(a)}))));
}

#[test]
fn base64_holds_the_same_floats() {
    use base64::Engine as _;
    let server = Server::shared();
    let plain = vectors(&server.ok(PATH, &json!({"input": [5, 6, 7]})));
    let encoded = server.ok(PATH, &json!({"input": [5, 6, 7], "encoding_format": "base64"}));
    let text = encoded["data"][0]["embedding"].as_str().unwrap();
    let bytes = base64::prelude::BASE64_STANDARD.decode(text).unwrap();
    let floats: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(floats, plain[0].iter().map(|&x| x as f32).collect::<Vec<_>>());
}

#[test]
fn vectors_have_length_one_whatever_is_cut_off() {
    let server = Server::shared();
    let whole = vectors(&server.ok(PATH, &json!({"input": [5, 6, 7]}))).remove(0);
    let cut = vectors(&server.ok(PATH, &json!({"input": [5, 6, 7], "dimensions": 8}))).remove(0);
    assert!((length(&whole) - 1.0).abs() < 1e-6 && (length(&cut) - 1.0).abs() < 1e-6);
    assert_eq!(cut.len(), 8);
    let scale = length(&whole[..8]);
    assert!(cut.iter().zip(&whole).all(|(c, w)| (c * scale - w).abs() < 1e-6));
    let raw = vectors(&server.ok(PATH, &json!({"input": [5, 6, 7], "normalize": false}))).remove(0);
    assert!(raw.iter().zip(&whole).all(|(r, w)| (r / length(&raw) - w).abs() < 1e-6));
}

#[test]
fn the_mean_is_that_of_the_last_vectors_of_all_beginnings() {
    let server = Server::shared();
    let ids = [5, 6, 7, 8];
    let vector = |ids: &[u32], pooling: &str| {
        let body = json!({"input": [ids], "pooling": pooling, "normalize": false});
        vectors(&server.ok(PATH, &body)).remove(0)
    };
    let mean = vector(&ids, "mean");
    let lasts: Vec<Vec<f64>> = (1..=4).map(|n| vector(&ids[..n], "last")).collect();
    for (i, &m) in mean.iter().enumerate() {
        let expected = lasts.iter().map(|v| v[i]).sum::<f64>() / 4.0;
        assert!((m - expected).abs() < 1e-6, "{m} {expected}");
    }
}

#[test]
fn neither_chunks_nor_company_change_a_bit() {
    let input: Vec<u32> = (0..300).map(|i| i * 7 % 320).collect();
    let config =
        EngineConfig { max_seqs: 3, max_batch_tokens: 17, max_waiting: 2, ..EngineConfig::default() };
    let small = Server::start(ServerConfig::new(MODEL), service(engine(config)));
    let alone = vectors(&Server::shared().ok(PATH, &json!({"input": input})));
    let inputs: Vec<&[u32]> =
        (0..12).map(|i| if i == 7 { &input[..] } else { &input[i..9 * i + 5] }).collect();
    let among = vectors(&small.ok(PATH, &json!({"input": inputs})));
    assert_eq!(alone[0], among[7]);
}

#[test]
fn what_cannot_be_embedded_is_refused() {
    let server = Server::shared();
    for (body, param) in [
        (json!({"input": ""}), "input"),
        (json!({"input": [[]]}), "input"),
        (json!({"input": vec![5; 513]}), "input"),
        (json!({"input": vec!["x"; 1025]}), "input"),
        (json!({"input": [5], "dimensions": 1 << 20}), "dimensions"),
        (json!({"input": [5], "model": "other"}), "model"),
    ] {
        let answer = server.post(PATH, &body);
        assert!([400, 404].contains(&answer.status), "{}", answer.text);
        assert_eq!(answer.json()["error"]["param"], param, "{}", answer.text);
    }
}
