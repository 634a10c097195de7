//! Running the built binary and looking at what it says.

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The binary, with no input and no say of the machine's own settings.
pub fn hearth(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs to the end.
pub fn run(arguments: &[&str]) -> Output {
    hearth(arguments).output().expect("the binary starts")
}

/// Runs, expects success, and reads the one JSON object on stdout.
pub fn json(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"))
}

/// What was said on stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

/// The tiny chat model among the fixtures.
pub fn tiny_model() -> String {
    root().join("tests/fixtures/tiny-chat/model").display().to_string()
}

/// Conversations for it.
pub fn tiny_data() -> String {
    root().join("tests/fixtures/tiny-chat/train.jsonl").display().to_string()
}

/// A recipe for the tiny model in `folder`, with checkpoints in it; `more` is added.
pub fn tiny_recipe(folder: &Path, more: &str) -> String {
    let path = folder.join("recipe.toml");
    let text = format!(
        "[model]\npath = {:?}\n[[data]]\npath = {:?}\n[checkpoint]\ndir = {:?}\nevery = 2\n{more}",
        tiny_model(),
        tiny_data(),
        folder.join("run").display().to_string()
    );
    std::fs::write(&path, text).expect("a recipe");
    path.display().to_string()
}

/// Every file of a checkpoint with its sha256, but for the manifest, which says who wrote it.
pub fn folder_hashes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())).flatten();
    let mut hashes: Vec<(String, Vec<u8>)> = entries
        .map(|entry| {
            let bytes = std::fs::read(entry.path()).expect("a file");
            (entry.file_name().to_string_lossy().into_owned(), Sha256::digest(bytes).to_vec())
        })
        .filter(|(name, _)| name != "checkpoint.json")
        .collect();
    hashes.sort();
    assert!(hashes.len() >= 2, "{}: weights and optimizer", folder.display());
    hashes
}
