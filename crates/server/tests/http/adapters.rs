//! Adapters by name: asked for, listed, loaded and unloaded while others run.

use crate::harness::{MODEL, Server, engine, service};
use crate::openapi::conforms;
use hearth_engine::EngineConfig;
use hearth_server::{ServerConfig, Service};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/lora")
}

/// Has the adapter `plain`, and a folder with `rslora/adapter` and more.
fn server(folder: Option<PathBuf>) -> Server {
    let engine = engine(EngineConfig { adapter_rank: 16, ..EngineConfig::default() });
    let plain = engine.load_adapter(&fixtures().join("plain/adapter")).unwrap();
    let service = Service { adapters: vec![("plain".into(), plain)], ..service(engine) };
    Server::start(ServerConfig { adapter_folder: folder, ..ServerConfig::new(MODEL) }, service)
}

fn complete(server: &Server, model: &str) -> Value {
    let body = json!({"model": model, "prompt": "Hello!", "max_tokens": 12, "logprobs": 2,
        "ignore_eos": true, "temperature": 0});
    let answer = server.ok("/v1/completions", &body);
    assert_eq!(answer["model"], model);
    answer["choices"][0].clone()
}

#[test]
fn an_adapter_is_asked_for_by_its_name_alone_or_behind_the_models() {
    let server = server(None);
    let (base, bare) = (complete(&server, MODEL), complete(&server, "plain"));
    assert_ne!(base, bare);
    assert_eq!(complete(&server, &format!("{MODEL}:plain")), bare);
    assert_eq!(complete(&server, MODEL), base);
    for model in ["rslora", "tiny/chat:rslora", "other:plain", "plain:plain", ":plain", "plain:"] {
        let answer = server.post("/v1/completions", &json!({"model": model, "prompt": "x"}));
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (404, &json!("model_not_found")),
            "{model}"
        );
    }
    let chat = |model: &str| {
        let messages = json!([{"role": "user", "content": "hi"}]);
        server.ok(
            "/v1/chat/completions",
            &json!({"model": model, "messages": messages, "logprobs": true, "seed": 1}),
        )
    };
    assert_ne!(chat("plain")["choices"], chat(MODEL)["choices"]);
    let embed = |model: &str| server.ok("/v1/embeddings", &json!({"model": model, "input": "hi"}));
    assert_ne!(embed("plain")["data"], embed(MODEL)["data"]);
}

#[test]
fn adapters_are_listed_with_their_parent() {
    let server = server(None);
    let list = server.get("/v1/models").json();
    conforms("ModelList", &list);
    let of = |i: usize| (list["data"][i]["id"].clone(), list["data"][i]["parent"].clone());
    assert_eq!((of(0), of(1)), ((json!(MODEL), Value::Null), (json!("plain"), json!(MODEL))));
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!(server.get("/v1/models/plain").json()["parent"], MODEL);
    let metrics = server.get("/metrics").text;
    assert!(
        metrics.contains("vllm:lora_requests_info{max_lora=\"1\",running_lora_adapters=\"\""),
        "{metrics}"
    );
}

#[test]
fn adapters_come_and_go_while_requests_go_on_with_theirs() {
    let server = server(Some(fixtures()));
    let load = |body: Value| server.post("/v1/load_lora_adapter", &body);
    let answer =
        server.ok("/v1/load_lora_adapter", &json!({"lora_name": "new", "lora_path": "rslora/adapter"}));
    conforms("Model", &answer);
    assert_eq!(answer["parent"], MODEL);
    let (plain, new) = (complete(&server, "plain"), complete(&server, "new"));
    assert_ne!(plain, new);

    let body = json!({"model": "new", "prompt": "Hello!", "max_tokens": 400, "ignore_eos": true, "stream": true,
        "temperature": 0});
    let mut running = BufReader::new(server.connect("/v1/completions", &body)).lines().map(Result::unwrap);
    let begun = running.find(|line| line.starts_with("data: ")).unwrap();
    let again = load(json!({"lora_name": "new", "lora_path": "plain/adapter"}));
    assert_eq!((again.status, &again.json()["error"]["param"]), (400, &json!("lora_name")));
    server.ok(
        "/v1/load_lora_adapter",
        &json!({"lora_name": "new", "lora_path": "plain/adapter", "load_inplace": true}),
    );
    assert_eq!(complete(&server, "new"), plain, "replaced for those who come now");
    let gone = server.ok("/v1/unload_lora_adapter", &json!({"lora_name": "new"}));
    conforms("UnloadAdapterResponse", &gone);
    assert_eq!(server.post("/v1/completions", &json!({"model": "new", "prompt": "x"})).status, 404);
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({"lora_name": "new"})).status, 404);
    let lines: Vec<String> = running.take_while(|line| line != "data: [DONE]").collect();
    let disturbed = [begun, lines.join("\n")].join("\n");
    assert!(!disturbed.contains("error"), "{disturbed}");

    // The same request of an adapter that nobody touches says the same.
    server.ok("/v1/load_lora_adapter", &json!({"lora_name": "new", "lora_path": "rslora/adapter"}));
    let undisturbed = server.post("/v1/completions", &body).text;
    let text = |sse: &str| -> String {
        let data = sse.lines().filter_map(|line| line.strip_prefix("data: {"));
        let chunk = |data: &str| serde_json::from_str::<Value>(&format!("{{{data}")).unwrap();
        data.map(|data| chunk(data)["choices"][0]["text"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(text(&disturbed), text(&undisturbed));
}

#[test]
fn loading_is_off_unless_asked_for_and_confined_to_the_folder() {
    let closed = server(None);
    for (path, body) in [
        ("/v1/load_lora_adapter", json!({"lora_name": "x", "lora_path": "plain/adapter"})),
        ("/v1/unload_lora_adapter", json!({"lora_name": "plain"})),
    ] {
        let answer = closed.post(path, &body);
        assert_eq!(answer.status, 403, "{}", answer.text);
        conforms("Error", &answer.json());
    }
    let open = server(Some(fixtures().join("plain")));
    for (body, param, words) in [
        (json!({"lora_path": "adapter"}), "lora_name", "missing"),
        (json!({"lora_name": "x"}), "lora_path", "missing"),
        (json!({"lora_name": 5, "lora_path": "adapter"}), "lora_name", "a string"),
        (json!({"lora_name": "", "lora_path": "adapter"}), "lora_name", "empty"),
        (json!({"lora_name": "a\nb", "lora_path": "adapter"}), "lora_name", "control"),
        (json!({"lora_name": "x".repeat(1000), "lora_path": "adapter"}), "lora_name", "256"),
        (json!({"lora_name": MODEL, "lora_path": "adapter"}), "lora_name", "own name"),
        (json!({"lora_name": "x", "lora_path": "../rslora/adapter"}), "lora_path", "no adapter"),
        (json!({"lora_name": "x", "lora_path": "/etc"}), "lora_path", "no adapter"),
        (json!({"lora_name": "x", "lora_path": "."}), "lora_path", "no adapter"),
        (json!({"lora_name": "x", "lora_path": "y".repeat(100_000)}), "lora_path", "no adapter"),
        (json!({"lora_name": "x", "lora_path": "adapter", "load_inplace": 1}), "load_inplace", "boolean"),
    ] {
        let answer = open.post("/v1/load_lora_adapter", &body);
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
        assert!(answer.text.len() < 500);
    }
    open.ok("/v1/load_lora_adapter", &json!({"lora_name": "x", "lora_path": "adapter"}));
}
