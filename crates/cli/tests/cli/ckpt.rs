//! `hearth ckpt`.

use crate::support::{json, run, stderr, tiny_recipe};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A run of four steps of the tiny model, saved after two and four.
fn trained(folder: &Path) -> PathBuf {
    let recipe = tiny_recipe(folder, "[train]\nsteps = 4\nglobal_batch = 2\n");
    json(&["train", &recipe]);
    folder.join("run")
}

fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).expect("a file");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(file, bytes).expect("written");
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn inspect_and_verify_say_what_a_checkpoint_is_and_name_damaged_ones() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = trained(folder.path());
    let whole = json(&["ckpt", "inspect", &text(&dir)]);
    assert_eq!(
        (whole["step"].as_u64(), whole["world"].as_u64(), whole["stage"].as_u64()),
        (Some(4), Some(1), Some(0))
    );
    assert!(whole["tensors"].as_u64().is_some_and(|tensors| tensors > 10 && tensors % 3 == 0), "{whole}");
    assert_eq!(json(&["ckpt", "verify", &text(&dir)])["damaged"], Value::Array(vec![]));
    assert_eq!(json(&["ckpt", "inspect", &text(&dir.join("step-2"))])["step"], 2);

    flip(&dir.join("step-4/optimizer.safetensors"));
    let inspected = json(&["ckpt", "inspect", &text(&dir)]);
    assert_eq!((inspected["ok"].as_bool(), inspected["step"].as_u64()), (Some(true), Some(2)));
    let output = run(&["ckpt", "verify", &text(&dir), "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!((report["ok"].as_bool(), report["step"].as_u64()), (Some(false), Some(2)));
    let damaged = report["damaged"][0].as_str().expect("a sentence");
    assert!(
        damaged.contains("step-4") && damaged.contains("optimizer.safetensors does not match"),
        "{damaged}"
    );

    // The last verified one is never removed, whatever is to be kept.
    json(&["ckpt", "prune", &text(&dir), "--keep", "1"]);
    assert!(dir.join("step-2").exists());
}

#[test]
fn exports_in_any_format_and_number_of_files_are_the_model() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = trained(folder.path());
    let logits = |model: &Path| json(&["logits", &text(model), "--tokens", "5,6"])["logits"][0].clone();
    let numbers = |row: Value| {
        row.as_array().expect("a row").iter().map(|v| v.as_f64().expect("a number")).collect::<Vec<_>>()
    };
    let trained = numbers(logits(&dir.join("step-4")));
    for (dtype, size, tolerance) in [("f32", "5GB", 0.0), ("bf16", "20KB", 0.05), ("f16", "1", 0.01)] {
        let out = folder.path().join(dtype);
        let report =
            json(&["ckpt", "export", &text(&dir), "-o", &text(&out), "--dtype", dtype, "--shard-size", size]);
        assert_eq!(report["exported"], text(&out));
        assert_eq!(out.join("model.safetensors.index.json").exists(), size != "5GB");
        let exported = numbers(logits(&out));
        let largest = trained.iter().fold(0f64, |a, b| a.max(b.abs()));
        for (a, b) in trained.iter().zip(&exported) {
            assert!((a - b).abs() <= tolerance * largest, "{dtype}: {a} became {b}");
        }
    }
}

#[test]
fn what_cannot_be_done_is_one_sentence_and_changes_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = trained(folder.path());
    let (run_dir, step, out) = (text(&dir), text(&dir.join("step-4")), text(&folder.path().join("out")));
    let cases: [(&[&str], i32, &str); 5] = [
        (&["ckpt", "prune", &step], 2, "is one checkpoint; give the run's folder"),
        (&["ckpt", "export", &run_dir, "-o", &out, "--shard-size", "0"], 2, "--shard-size is 0"),
        (&["ckpt", "export", &run_dir, "-o", &out, "--dtype", "q4_0"], 2, "invalid value 'q4_0'"),
        (&["ckpt", "export", &run_dir, "-o", &out, "--base", &step], 2, "is a whole model, not an adapter"),
        (&["ckpt", "export", &run_dir, "-o", &run_dir], 1, "exists"),
    ];
    for (arguments, code, words) in cases {
        let output = run(arguments);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(words) && said.trim_end().lines().count() == 1, "{arguments:?}: {said}");
    }
    assert!(!folder.path().join("out").exists());
    assert_eq!(json(&["ckpt", "verify", &run_dir])["ok"], true);
}
