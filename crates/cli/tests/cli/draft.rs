//! A model that guesses the tokens of another: the same answers within the same budget.

use crate::support::{json, root, run, stderr, tiny_model};

/// Tokens that the tiny model goes on from for long.
const PROMPT: &[&str] = &["--tokens", "1,40,7,9,3,1,40,7", "-n", "60", "--ignore-eos"];

#[test]
fn a_plan_counts_the_bytes_of_a_draft_model() {
    let plan = |more: &[&str]| {
        let report = json(&[&["plan", "--serve", &tiny_model(), "--memory", "2MiB"], more].concat());
        let kinds = report["tiers"]["device"]["by_kind"].clone();
        let bytes = |kind: &str| kinds[kind].as_u64().unwrap_or_else(|| panic!("{kind}: {kinds}"));
        (bytes("parameters"), bytes("kv_cache") / report["kv_tokens"].as_u64().expect("tokens"))
    };
    let alone = plan(&[]);
    assert_eq!(plan(&["--draft", &tiny_model()]), (2 * alone.0, 2 * alone.1));
}

#[test]
fn a_plan_counts_the_time_of_a_draft_model() {
    let plan = |more: &[&str]| json(&[&["plan", "--serve", &tiny_model()], more].concat());
    let batches = |report: serde_json::Value| report["batches"].as_array().expect("a list").clone();
    assert!(batches(plan(&[])).iter().all(|batch| batch["guessing"].is_null()));
    for batch in batches(plan(&["--draft", &tiny_model(), "--draft-tokens", "3"])) {
        let guessing = &batch["guessing"];
        let number = |value: &serde_json::Value| value.as_f64().unwrap_or_else(|| panic!("{batch}"));
        let (step, alone) = (number(&guessing["step_s"]), number(&batch["step_s"]));
        // The draft model is the model: three steps of its own before each of the model's.
        assert!((number(&guessing["draft_s"]) / alone - 3.0).abs() < 1e-9, "{batch}");
        assert!(step > 3.999 * alone, "{batch}");
        let [none, all] = [0, 1].map(|i| number(&guessing["tok_s"][i]));
        assert!((all / none - 4.0).abs() < 1e-9 && none < number(&batch["tok_s"]), "{batch}");
        assert!((number(&guessing["pays_from"]) - step / alone).abs() < 1e-9, "{batch}");
    }
}

#[test]
fn a_plan_counts_adapters() {
    let model = root().join("tests/fixtures/parity/llama-gqa-tied/model").display().to_string();
    let adapter = root().join("tests/fixtures/lora/plain/adapter").display().to_string();
    let bytes = |adapters: &[&str]| {
        let named: Vec<String> = adapters.iter().map(|name| format!("{name}{adapter}")).collect();
        let flags = named.iter().flat_map(|value| ["--adapter", value.as_str()]);
        let report = json(&["plan", "--serve", &model].into_iter().chain(flags).collect::<Vec<_>>());
        let kinds = report["tiers"]["device"]["by_kind"].clone();
        ["parameters", "activations"].map(|kind| kinds[kind].as_u64().expect("a number"))
    };
    let [none, one, two, merged] = [&[][..], &["a="], &["a=", "b="], &[""]].map(bytes);
    assert!(one[0] > none[0] && two[0] - one[0] == one[0] - none[0], "{none:?} {one:?} {two:?}");
    assert!(one[1] > none[1] && two[1] == one[1], "rows with adapters take working memory: {none:?} {one:?}");
    assert_eq!(merged[1], none[1], "what is merged takes no working memory");
}

#[test]
fn a_draft_model_changes_no_answer() {
    let generate = |more: &[&str]| json(&[&["generate", &tiny_model()], PROMPT, more].concat());
    for sampling in [&[][..], &["--temperature", "0.8", "--seed", "3"], &["--kv-dtype", "int8"]] {
        let alone = generate(sampling);
        let drafted = generate(&[sampling, &["--draft", &tiny_model(), "--draft-tokens", "3"]].concat());
        assert_eq!(alone["tokens"], drafted["tokens"], "{sampling:?}");
        let guessed = &drafted["speculation"];
        assert_eq!(guessed["draft_tokens"], guessed["accepted_tokens"], "it knows itself: {guessed}");
        // As large as the model it makes one guess at a time: each further one would cost a pass as long as the model's.
        assert!(guessed["steps"].as_u64() < Some(35), "{guessed}");
    }
}

#[test]
fn draft_models_that_cannot_serve_are_refused() {
    let other = root().join("tests/fixtures/parity/qwen3/model").display().to_string();
    let model = tiny_model();
    for (more, code, words) in [
        (&["--draft", &other][..], 1, "vocabulary"),
        (&["--draft", "/nowhere"], 2, "/nowhere"),
        (&["--draft", &model, "--speculative", "ngram"], 2, "cannot be used with"),
        (&["--draft-tokens", "3"], 2, "required"),
        (&["--draft", &model, "--draft-tokens", "99"], 1, "from 1 to 32"),
        (&["--draft", &model, "--memory", "600KiB"], 1, "device"),
    ] {
        let output = run(&[&["generate", &model], PROMPT, more].concat());
        assert_eq!(output.status.code(), Some(code), "{more:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{more:?}: {}", stderr(&output));
    }
}
