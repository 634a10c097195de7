//! Whatever is wrong with what the user gives: one sentence on stderr, the right exit code, no panic, nothing left.

use crate::support::{root, run, stderr, tiny_data, tiny_model, tiny_recipe};
use std::fs;
use std::net::TcpListener;
use std::path::Path;

/// Runs, and expects this exit code and a last line on stderr that contains these words.
#[track_caller]
fn refuses(arguments: &[&str], code: i32, words: &str) {
    let output = run(arguments);
    let said = stderr(&output);
    let last = said.lines().last().unwrap_or_default();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(last.starts_with("hearth: ") && last.contains(words), "{arguments:?}: {said}");
    assert!(!said.contains("panicked") && !said.contains("this is a bug"), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?}: nothing is printed on failure");
}

#[test]
fn wrong_command_lines_exit_2_with_the_place_to_read_more() {
    let tiny = tiny_model();
    let cases: &[(&[&str], &str)] = &[
        (&[], "hearth --help"),
        (&["frobnicate"], "unrecognized subcommand 'frobnicate'"),
        (&["train"], "see hearth train --help"),
        (&["train", "--bogus"], "unexpected argument '--bogus'"),
        (&["generate", &tiny], "see hearth generate --help"),
        (&["generate", &tiny, "-p", "x", "--tokens", "1"], "cannot be used with"),
        (&["generate", &tiny, "-p", "x", "-n", "many"], "invalid value 'many'"),
        (&["convert", &tiny, "-o", "x", "--to", "pickle"], "invalid value 'pickle'"),
        (&["serve", &tiny, "--port", "99999"], "invalid value '99999'"),
        (&["bench", "everything", &tiny], "unrecognized subcommand 'everything'"),
    ];
    for (arguments, words) in cases {
        refuses(arguments, 2, words);
    }
}

#[test]
fn values_that_make_no_sense_exit_2() {
    let tiny = tiny_model();
    let cases: &[(&[&str], &str)] = &[
        (&["generate", &tiny, "--tokens", "1,x"], "\"x\" is not a token id"),
        (&["generate", &tiny, "--tokens", ","], "there are no tokens"),
        (&["generate", &tiny, "--tokens", "320"], "not below the vocabulary size 320"),
        (&["generate", &tiny, "-p", "x", "--memory", "lots"], "--memory: "),
        (&["generate", &tiny, "-p", "x", "--memory", "disk=1GiB"], "--memory: "),
        (&["generate", &tiny, "-p", "x", "-n", "100000"], "context limit of 512"),
        (&["generate", &tiny, "-p", "x", "--verify-golden"], "only bundles have"),
        (&["logits", &tiny, "--tokens", "9999"], "token id 9999 at position 0"),
        (&["convert", &tiny, "-o", "/nonexistent/x", "--quant", "q9"], "unknown storage format \"q9\""),
        (&["convert", &tiny, "-o", "/nonexistent/x", "--quant", "q6_k"], "can be read but not written"),
        (
            &["convert", &tiny, "-o", "/x/y", "--to", "safetensors", "--quant", "q4_0"],
            "safetensors cannot hold q4_0",
        ),
        (&["serve", &tiny, "--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        (&["serve", &tiny, "--api-key", ""], "--api-key is empty"),
        (&["serve", &tiny, "--max-seqs", "0"], "--max-seqs is 0"),
        (&["bench", "io", "--dir", "/nonexistent"], "--dir /nonexistent: there is no such folder"),
        (&["bench", "io", "--bytes", "lots"], "invalid value 'lots'"),
        (&["bench", "comm", "--ranks", "1"], "one rank has nobody to exchange with"),
        (&["bench", "adam", "--elements", "0"], "--elements is 0"),
        (&["bench", "train", &tiny, "--compute", "f64"], "--compute is \"f64\""),
        (&["bench", "train", &tiny, "--state-dtype", "f16"], "--state-dtype is \"f16\""),
        (&["bench", "train", &tiny, "--steps", "0"], "--steps is 0"),
        (&["bench", "prefill", &tiny, "--repeat", "0"], "--repeat is 0"),
        (&["bench", "adam", "--compute", "f16"], "--compute is \"f16\""),
        (&["ckpt", "inspect", "/nonexistent"], "there is no folder /nonexistent"),
        (&["ckpt", "inspect", &tiny], "holds no checkpoint"),
        (&["quickstart", "--model", "/nonexistent"], "--model /nonexistent: there is nothing"),
    ];
    for (arguments, words) in cases {
        refuses(arguments, 2, words);
    }
}

#[test]
fn files_that_are_not_there_are_named() {
    let cases: &[(&[&str], i32, &str)] = &[
        (&["train", "/nonexistent.toml"], 2, "/nonexistent.toml: cannot be read"),
        (&["data", "inspect", "/nonexistent.toml"], 2, "/nonexistent.toml: cannot be read"),
        (&["generate", "/nonexistent", "-p", "x"], 2, "there is no model at /nonexistent"),
        (&["chat", "/nonexistent"], 2, "there is no model at /nonexistent"),
        (&["convert", "/nonexistent", "-o", "/x"], 2, "there is no model at /nonexistent"),
        (&["eval", "/nonexistent", "--perplexity", "/none.txt"], 1, "cannot read the text /none.txt"),
    ];
    for (arguments, code, words) in cases {
        refuses(arguments, *code, words);
    }
    refuses(&["generate", &tiny_model(), "--adapter", "/none", "-p", "x"], 2, "there is no adapter at /none");
}

#[test]
fn recipes_are_refused_before_anything_is_done() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), "");
    let cases = [
        ("optim.learning_rate=1", "unknown key `learning_rate` in [optim]"),
        ("train.max_seq_length=9", "did you mean `max_seq_len`?"),
        ("train.micro_batch=3", "global_batch is 8 and micro_batch 3"),
        ("parallel.tensor=2", "not available in this version"),
        ("parallel.zero=4", "the stages are 0 to 3"),
        ("parallel.data=3", "cannot be shared out evenly among 3 ranks"),
        ("offload.optim=nvme", "say in which folder with nvme_path"),
        ("optim.kind=adafactor --set parallel.zero=1", "updates whole matrices"),
        ("model.path=/nonexistent", "there is no model at /nonexistent"),
        ("model.device=tpu", "device `tpu`"),
    ];
    for (set, words) in cases {
        let arguments: Vec<&str> = ["train", &recipe, "--set"].into_iter().chain(set.split(' ')).collect();
        refuses(&arguments, 2, words);
    }
    refuses(&["train", &recipe, "--memory", "gpu=1GiB"], 2, "--memory: ");
    assert!(!folder.path().join("run").exists(), "nothing is written for a recipe that is refused");
}

#[test]
fn data_that_is_empty_or_malformed_is_named_with_its_line() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), "");
    let cases = [
        ("", "empty"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\nnot json\n", "data.jsonl:2"),
        ("{\"text\": \"a\"}\n", "data.jsonl:1"),
    ];
    for (text, words) in cases {
        let data = folder.path().join("data.jsonl");
        fs::write(&data, text).expect("write");
        refuses(&["data", "inspect", &recipe, "--set", &format!("data.path={}", data.display())], 1, words);
    }
    refuses(&["train", &recipe, "--set", "data.path=/nonexistent.jsonl"], 1, "/nonexistent.jsonl");
}

/// A copy of the tiny model whose `file` is cut to `len` bytes.
fn cut(folder: &Path, file: &str, len: u64) -> String {
    let copy = folder.join("cut");
    fs::create_dir_all(&copy).expect("folder");
    for entry in fs::read_dir(tiny_model()).expect("the fixture") {
        let path = entry.expect("entry").path();
        fs::copy(&path, copy.join(path.file_name().expect("name"))).expect("copy");
    }
    let file = fs::OpenOptions::new().write(true).open(copy.join(file)).expect("open");
    file.set_len(len).expect("cut");
    copy.display().to_string()
}

#[test]
fn truncated_models_are_refused_wherever_they_are_opened() {
    let folder = tempfile::tempdir().expect("folder");
    let output = folder.path().join("out").display().to_string();
    for (file, len) in [
        ("model.safetensors", 5),
        ("model.safetensors", 50_000),
        ("config.json", 10),
        ("tokenizer.json", 100),
    ] {
        let model = cut(folder.path(), file, len);
        refuses(&["generate", &model, "-p", "x"], 1, file);
        refuses(&["convert", &model, "-o", &output], 1, file);
        refuses(&["serve", &model, "--port", "0"], 1, file);
        assert!(!Path::new(&output).exists(), "no output of a truncated model");
    }
    let gguf = folder.path().join("cut.gguf");
    fs::write(&gguf, b"GGUF\x03\0\0\0").expect("write");
    refuses(&["generate", &gguf.display().to_string(), "-p", "x"], 1, "cut.gguf");
}

#[test]
fn an_output_that_exists_is_never_overwritten() {
    let folder = tempfile::tempdir().expect("folder");
    let output = folder.path().display().to_string();
    refuses(&["convert", &tiny_model(), "-o", &output], 1, "already exists");
}

#[test]
fn a_port_in_use_is_named_with_the_way_out() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("address").port().to_string();
    refuses(&["serve", &tiny_model(), "--port", &port], 2, "--port 0 for any free one");
}

#[test]
fn a_budget_that_is_too_small_names_the_smallest_that_works() {
    let output = run(&["generate", &tiny_model(), "-p", "x", "--memory", "1KiB"]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let smallest = said.trim().rsplit(' ').next().expect("a size");
    let output = run(&["generate", &tiny_model(), "-p", "x", "--memory", smallest]);
    assert!(output.status.success(), "{smallest}: {}", stderr(&output));
}

#[test]
fn a_closed_pipe_ends_the_command_quietly() {
    let mut child =
        crate::support::hearth(&["logits", &tiny_model(), "--tokens", "1,2,3", "--all", "--json"])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stderr(&output).contains("hearth:"), "{}", stderr(&output));
}

#[test]
fn every_recipe_of_the_repository_is_valid() {
    let mut seen = 0;
    for entry in fs::read_dir(root().join("recipes")).expect("recipes") {
        let path = entry.expect("entry").path();
        hearth::recipe::Recipe::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        seen += 1;
    }
    assert!(seen >= 4);
    assert!(Path::new(&tiny_data()).exists());
}
