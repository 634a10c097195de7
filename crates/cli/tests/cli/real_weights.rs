//! SmolLM2-135M-Instruct against the figures transformers gives. Runs with `cargo xtask ci --real`, which sets
//! `HEARTH_REAL_WEIGHTS`; otherwise these tests have nothing to look at and say so.

use crate::support::json;
use hearth::fetch::{self, Asset};
use hearth::ui::Ui;
use std::path::PathBuf;

/// News articles used for perplexity, out of gensim's test data.
const LEE: Asset = Asset {
    about: "Lee news articles (27 MB)",
    package: "gensim",
    version: "4.4.0",
    member: Some("gensim/test/test_data/lee_background.cor"),
    file: "lee_background.cor",
    sha256: "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
};

fn fetched(asset: &Asset) -> Option<PathBuf> {
    if std::env::var_os("HEARTH_REAL_WEIGHTS").is_none() {
        eprintln!("skipped: HEARTH_REAL_WEIGHTS is not set");
        return None;
    }
    let cache = hearth::machine::cache_dir().expect("a cache folder");
    Some(fetch::asset(asset, &cache, &Ui::new(false)).expect("fetched"))
}

#[test]
fn real_weights_have_the_perplexity_transformers_measures() {
    let (Some(model), Some(text)) = (fetched(&fetch::SMOLLM2), fetched(&LEE)) else { return };
    let folder = tempfile::tempdir().expect("folder");
    let part = folder.path().join("part.txt");
    let text = std::fs::read_to_string(text).expect("UTF-8");
    std::fs::write(&part, text.chars().take(3000).collect::<String>()).expect("write");
    let (model, part) = (model.display().to_string(), part.display().to_string());
    let report = json(&["eval", &model, "--perplexity", &part, "--tokens", "256"]);
    let perplexity = report["perplexity"].as_f64().expect("a number");
    assert!((perplexity / 32.2786 - 1.0).abs() < 1e-3, "{perplexity}");
}

#[test]
fn real_weights_know_the_capital_of_france() {
    let Some(model) = fetched(&fetch::SMOLLM2) else { return };
    let mut chat = crate::support::hearth(&["chat", &model.display().to_string(), "-n", "16"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    let mut stdin = chat.stdin.take().expect("stdin");
    std::io::Write::write_all(&mut stdin, b"What is the capital of France?\n").expect("writes");
    drop(stdin);
    let output = chat.wait_with_output().expect("ends");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "The capital of France is Paris.");
}
