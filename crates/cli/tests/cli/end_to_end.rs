//! The whole way with the built binary, on the tiny model.

use crate::support::{hearth, json, run, stderr, tiny_model, tiny_recipe};
use serde_json::{Value, json as object};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Keeps no process behind when a test fails.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn terminate(child: &Child) {
    let status = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    assert!(status.success());
}

/// Starts a server on a free port and waits for the line that says where.
fn serve(model: &str) -> (Killed, String) {
    serve_with(model, &[])
}

/// The same with further arguments. What it logs can be read.
pub fn serve_with(model: &str, more: &[&str]) -> (Killed, String) {
    let mut command = hearth(&[&["serve", model, "--port", "0"], more].concat());
    if more.contains(&"--log-requests") {
        command.stderr(Stdio::piped());
    }
    let mut child = command.stdout(Stdio::piped()).spawn().expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    let line = lines.next().expect("a line").expect("UTF-8");
    let url = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
    // Goes on reading, so that the server never blocks on a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (Killed(child), url)
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn train_convert_generate_serve() {
    let folder = tempfile::tempdir().expect("folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    let recipe = tiny_recipe(
        folder.path(),
        "[adapter]\nkind = 'lora'\n[train]\nsteps = 4\nglobal_batch = 2\n[data_opts]\nval_fraction = 0.2\n[optim]\nlr = 1e-2\n",
    );

    let trained = json(&["train", &recipe]);
    assert_eq!(trained["steps"], 4);
    assert!(trained["loss"].as_f64().is_some() && trained["eval_loss"].as_f64().is_some(), "{trained}");
    let metrics = lines(&folder.path().join("run/metrics.jsonl"));
    assert_eq!(metrics.len(), 4);
    for key in ["step", "loss", "lr", "grad_norm", "tokens", "tok_s"] {
        assert!(metrics.iter().all(|line| line[key].is_number()), "{key}");
    }
    let adapter = trained["checkpoint"].as_str().expect("a checkpoint");

    let bundle = at("bundle");
    let convert =
        ["convert", &tiny_model(), "--adapter", adapter, "-o", &bundle, "--to", "bundle", "--quant", "q8_0"];
    let converted = json(&convert);
    assert!(
        converted["bytes_out"].as_u64() > Some(0) && converted["bytes_in"].as_u64() > Some(0),
        "{converted}"
    );

    let generated =
        json(&["generate", &bundle, "-p", "What is", "-n", "8", "--ignore-eos", "--verify-golden"]);
    assert_eq!(generated["tokens"].as_array().map(Vec::len), Some(8), "{generated}");
    assert!(generated["text"].as_str().is_some_and(|text| !text.is_empty()));

    let (mut server, url) = serve(&bundle);
    let request = object!({"prompt": "What is", "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let mut response = ureq::post(format!("{url}/v1/completions")).send_json(&request).expect("an answer");
    let answer: Value = response.body_mut().read_json().expect("JSON");
    assert_eq!(answer["choices"][0]["text"], generated["text"], "server and command agree");
    terminate(&server.0);
    assert_eq!(server.0.wait().expect("ends").code(), Some(0), "SIGTERM drains and exits 0");
}

#[test]
fn merged_weights_give_the_adapters_logits() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe =
        tiny_recipe(folder.path(), "[adapter]\nkind = 'lora'\n[train]\nsteps = 2\nglobal_batch = 2\n");
    let trained = json(&["train", &recipe, "--set", "optim.lr=0.05"]);
    let adapter = trained["checkpoint"].as_str().expect("a checkpoint");
    let merged = folder.path().join("merged").display().to_string();
    json(&["convert", adapter, "-o", &merged, "--to", "safetensors"]);
    let live = json(&["logits", &tiny_model(), "--adapter", adapter, "--tokens", "5,6,7"]);
    let merged = json(&["logits", &merged, "--tokens", "5,6,7"]);
    let base = json(&["logits", &tiny_model(), "--tokens", "5,6,7"]);
    assert_eq!(live, merged);
    assert_ne!(base, merged, "the adapter changes something");
}

#[test]
fn ranks_that_are_stopped_save_and_one_rank_goes_on_to_the_same_numbers() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), "[train]\nsteps = 6\nglobal_batch = 2\n[optim]\nlr = 1e-3\n");
    let whole = folder.path().join("whole").display().to_string();
    json(&["train", &recipe, "--set", &format!("checkpoint.dir={whole}")]);

    let two = ["train", &recipe, "--set", "parallel.data=2", "--set", "parallel.zero=2"];
    let mut child = hearth(&two).stderr(Stdio::piped()).spawn().expect("starts");
    let mut said = BufReader::new(child.stderr.take().expect("stderr")).lines().map_while(Result::ok);
    assert!(said.any(|line| line.starts_with("1/6")), "the first step is reported");
    terminate(&child);
    said.for_each(drop);
    assert_eq!(child.wait().expect("ends").code(), Some(0), "SIGTERM saves and exits 0");
    let done = json(&["train", &recipe, "--resume"]);
    assert_eq!(done["steps"], 6);

    let numbers = |path: &Path| {
        let keep = |line: Value| (line["step"].clone(), line["loss"].clone(), line["grad_norm"].clone());
        lines(path).into_iter().map(keep).collect::<Vec<_>>()
    };
    let resumed = numbers(&folder.path().join("run/metrics.jsonl"));
    assert_eq!(resumed, numbers(&Path::new(&whole).join("metrics.jsonl")));

    let checkpoint = done["checkpoint"].as_str().expect("a checkpoint");
    json(&["generate", checkpoint, "-p", "Hello", "-n", "2"]);
    let exported = folder.path().join("exported").display().to_string();
    json(&["ckpt", "export", &folder.path().join("run").display().to_string(), "-o", &exported]);
    let logits = |model: &str| json(&["logits", model, "--tokens", "5,6"]);
    assert_eq!(logits(&exported), logits(checkpoint));

    let inspected = json(&["ckpt", "inspect", &folder.path().join("run").display().to_string()]);
    assert_eq!((inspected["ok"].as_bool(), inspected["step"].as_u64()), (Some(true), Some(6)));
}

#[test]
fn every_form_of_a_model_gives_the_same_logits() {
    let folder = tempfile::tempdir().expect("folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    let source = json(&["logits", &tiny_model(), "--tokens", "1,2,3", "--all"]);
    assert_eq!(source["logits"].as_array().map(Vec::len), Some(3));
    for (to, name) in [("bundle", "bundle"), ("safetensors", "hf"), ("gguf", "m.gguf")] {
        json(&["convert", &tiny_model(), "-o", &at(name), "--to", to]);
        assert_eq!(json(&["logits", &at(name), "--tokens", "1,2,3", "--all"]), source, "{to}");
        let text = |model: &str| json(&["generate", model, "-p", "Hello", "-n", "6"])["text"].clone();
        assert_eq!(text(&at(name)), text(&tiny_model()), "{to}: the tokenizer came along");
    }
}

#[test]
fn a_changed_bundle_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = folder.path().join("bundle");
    json(&["convert", &tiny_model(), "-o", &bundle.display().to_string()]);
    let weights = bundle.join("weights.bin");
    let mut bytes = std::fs::read(&weights).expect("weights");
    bytes[100] ^= 1;
    std::fs::write(&weights, bytes).expect("write");
    let output = run(&["generate", &bundle.display().to_string(), "-p", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("weights.bin"), "{}", stderr(&output));
}

#[test]
fn chat_works_through_a_pipe() {
    let mut child = hearth(&["chat", &tiny_model(), "-n", "8"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    child.stdin.take().expect("stdin").write_all(b"Hello!\n\nWho are you?\n").expect("writes");
    let output = child.wait_with_output().expect("ends");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().filter(|l| !l.is_empty()).count(), 2);
}

#[test]
fn preference_pairs_are_shown_with_their_prompt_once_and_only_dpo_takes_them() {
    let folder = tempfile::tempdir().expect("folder");
    let pairs = folder.path().join("pairs.jsonl");
    let row = r#"{"prompt": "Who?", "system": "", "chosen": "Me.", "rejected": "No."}"#;
    std::fs::write(&pairs, format!("{row}\n{row}\n")).expect("write");
    let recipe = tiny_recipe(folder.path(), "");
    let path = format!("data.path={}", pairs.display());
    let set = ["--set", &path, "--set", "data.format=preference"];
    let report = json(&[&["data", "inspect", &recipe][..], &set].concat());
    assert_eq!(report["examples"], 2, "{report}");
    let pair = &report["pairs"][0];
    assert_eq!(pair["chosen"][0]["trained"], true, "{report}");
    assert!(pair["prompt"][0]["text"].as_str().is_some_and(|text| text.contains("Who?")), "{report}");
    let refused = run(&[&["train", &recipe][..], &set].concat());
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("only [method] kind = \"dpo\" learns from"), "{}", stderr(&refused));
}

#[test]
fn the_measuring_commands_print_their_keys() {
    let folder = tempfile::tempdir().expect("folder");
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "The capital of France is Paris. ".repeat(20)).expect("write");
    let recipe = tiny_recipe(folder.path(), "");
    let text = text.display().to_string();
    let tiny = tiny_model();
    let dir = folder.path().display().to_string();
    let cases: &[(&[&str], &[&str])] = &[
        (&["data", "inspect", &recipe], &["examples", "tokens", "trained_tokens"]),
        (&["train", &recipe, "--dry-run"], &["steps", "parameters", "tokens"]),
        (&["eval", &tiny, "--perplexity", &text, "--context", "32"], &["perplexity", "tokens"]),
        (
            &["bench", "prefill", &tiny, "--tokens", "16"],
            &["name", "tok_s", "of_peak", "peak_rss_bytes", "samples"],
        ),
        (&["bench", "decode", &tiny, "-n", "4"], &["name", "tok_s", "of_peak", "peak_rss_bytes", "samples"]),
        (
            &["bench", "train", &tiny, "--seq", "16"],
            &["name", "tok_s", "of_peak", "peak_rss_bytes", "samples"],
        ),
        (
            &["bench", "io", "--dir", &dir, "--bytes", "32MiB"],
            &["name", "gb_s", "of_peak", "peak_rss_bytes", "samples", "read_gb_s", "write_gb_s"],
        ),
        (
            &["bench", "comm", "--bytes", "1MiB"],
            &["name", "gb_s", "of_peak", "peak_rss_bytes", "samples", "operations"],
        ),
        (
            &["bench", "adam", "--elements", "100000", "--state-dtype", "bf16"],
            &["name", "gb_s", "of_peak", "peak_rss_bytes", "samples", "bytes_per_parameter"],
        ),
        (&["doctor"], &["cpu", "memory", "disk", "gpus", "mpi", "nccl", "peaks"]),
    ];
    for (arguments, keys) in cases {
        let report = json(arguments);
        for key in *keys {
            assert!(report.get(*key).is_some(), "{arguments:?}: {key} is missing in {report}");
        }
    }
}

#[test]
fn quickstart_goes_the_whole_way_on_ones_own_model_and_data() {
    let folder = tempfile::tempdir().expect("folder");
    let output = hearth(&[
        "quickstart",
        "--model",
        &tiny_model(),
        "--data",
        &crate::support::tiny_data(),
        "--steps",
        "3",
        "--json",
    ])
    .env("XDG_CACHE_HOME", folder.path())
    .output()
    .expect("starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    for key in ["loss_before", "loss_after", "train_tok_s", "bundle_bytes", "decode_tok_s", "wall_s"] {
        assert!(report[key].is_number(), "{key}: {report}");
    }
    assert_eq!(report["answers"].as_array().map(Vec::len), Some(3));
    let left: Vec<_> = std::fs::read_dir(folder.path().join("hearth")).expect("cache").flatten().collect();
    assert_eq!(left.len(), 1, "only the bundle is left: {left:?}");
}

#[test]
fn quickstart_without_a_network_says_so_and_how_to_go_on() {
    let folder = tempfile::tempdir().expect("folder");
    let output = hearth(&["quickstart"])
        .env("XDG_CACHE_HOME", folder.path())
        .env("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        .env("PIP_RETRIES", "0")
        .output()
        .expect("starts");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.lines().last().is_some_and(|l| l.contains("--model PATH --data PATH")), "{said}");
}
