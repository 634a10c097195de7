//! What a recipe says, and what it may not say.

use super::*;
use std::fs;

/// A recipe that says only what it must.
const LEAST: &str = "[model]\npath = 'm'\n[[data]]\npath = 'd.jsonl'\n";

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("folder");
        fs::write(path, text).expect("file");
    }
    folder
}

fn load(text: &str, overrides: &[&str]) -> Result<Recipe, RecipeError> {
    let folder = folder(&[("r.toml", text)]);
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    Recipe::load(&folder.path().join("r.toml"), &overrides)
}

#[test]
fn the_least_recipe_gets_the_documented_defaults() {
    let recipe = load(LEAST, &[]).expect("valid");
    assert_eq!(recipe.train.global_batch, 8);
    assert_eq!((recipe.optim.lr, recipe.optim.betas), (Some(1e-4), Some([0.9, 0.95])));
    assert_eq!(recipe.checkpoint.dir, "checkpoints/run");
    assert_eq!(recipe.data[0].format.name(), "chat");
}

#[test]
fn a_printed_recipe_reads_back_as_itself() {
    let recipe = load(LEAST, &["train.epochs=2", "sched.decay=3"]).expect("valid");
    assert_eq!(Recipe::parse(&recipe.to_toml(), "printed").expect("valid"), recipe);
}

#[test]
fn overrides_are_typed_as_toml_and_bare_strings_are_allowed() {
    let set = [
        "train.steps=7",
        "optim.lr=3e-5",
        "optim.betas=[0.8, 0.9]",
        "adapter.kind=lora",
        "adapter.targets=[\"k_proj\"]",
        "log.tensorboard=true",
        "checkpoint.dir=/tmp/some dir",
        "data.path=other.jsonl",
        "data.format=text",
    ];
    let recipe = load(LEAST, &set).expect("valid");
    assert_eq!(recipe.train.steps, Some(7));
    assert_eq!((recipe.optim.lr, recipe.optim.betas), (Some(3e-5), Some([0.8, 0.9])));
    assert_eq!(recipe.adapter.kind, choices::AdapterKind::Lora);
    assert_eq!(recipe.adapter.targets, ["k_proj"]);
    assert!(recipe.log.tensorboard);
    assert_eq!(recipe.checkpoint.dir, "/tmp/some dir");
    assert_eq!((recipe.data[0].path.as_str(), recipe.data[0].format.name()), ("other.jsonl", "text"));
}

#[test]
fn what_a_recipe_extends_is_overlaid_key_by_key() {
    let folder = folder(&[
        ("base/base.toml", "[model]\npath = 'm'\n[[data]]\npath = 'd.jsonl'\n[train]\nsteps = 5\nseed = 3\n"),
        ("base/m/config.json", "{}"),
        ("base/d.jsonl", ""),
        ("run.toml", "extends = 'base/base.toml'\n[train]\nepochs = 2\n"),
    ]);
    let recipe = Recipe::load(&folder.path().join("run.toml"), &[]).expect("valid");
    assert_eq!((recipe.train.steps, recipe.train.epochs, recipe.train.seed), (None, Some(2.0), 3));
    // The base's paths lead into the base's folder.
    assert_eq!(recipe.model.path, folder.path().join("base/m").display().to_string());
    assert_eq!(recipe.data[0].path, folder.path().join("base/d.jsonl").display().to_string());
}

#[test]
fn a_glob_is_looked_for_beside_the_recipe() {
    let text = "[model]\npath = 'm'\n[[data]]\npath = 'parts/*.jsonl'\n";
    let folder = folder(&[("r.toml", text), ("parts/a.jsonl", "")]);
    let recipe = Recipe::load(&folder.path().join("r.toml"), &[]).expect("valid");
    assert_eq!(recipe.data[0].path, folder.path().join("parts/*.jsonl").display().to_string());
}

#[test]
fn a_circle_of_extends_is_refused() {
    let folder = folder(&[("a.toml", "extends = 'b.toml'"), ("b.toml", "extends = 'a.toml'")]);
    let error = Recipe::load(&folder.path().join("a.toml"), &[]).expect_err("a circle").to_string();
    assert!(error.contains("circle"), "{error}");
}

#[test]
fn contradictions_and_wrong_values_get_one_sentence_that_says_what_to_change() {
    let cases: &[(&[&str], &str)] = &[
        (&["train.global_batch=5", "train.micro_batch=2"], "global_batch is 5 and micro_batch 2"),
        (&["train.global_batch=0"], "global_batch is 0"),
        (&["train.micro_batch=0"], "micro_batch is 0"),
        (&["train.micro_batch=-1"], "invalid value: integer `-1`"),
        (&["train.steps=0"], "steps is 0"),
        (&["train.epochs=0"], "epochs is 0"),
        (&["train.max_seq_len=1"], "max_seq_len is 1"),
        (&["train.max_seq_len=4", "data_opts.packing=true"], "to pack documents into"),
        (&["train.clip_norm=-1"], "clip_norm is -1"),
        (&["train.steps=3", "sched.warmup=4"], "warm-up must fit"),
        (&["sched.min_lr=1.0"], "min_lr is 1"),
        (&["optim.lr=nan"], "optim.lr = NaN"),
        (&["optim.betas=[0.9, 1.0]"], "optim.betas = [0.9, 1.0]"),
        (&["optim.momentum=0.5"], "momentum is nothing that kind = \"adamw\" has"),
        (&["optim.kind=sgd", "optim.momentum=1.0"], "optim.momentum = 1"),
        (&["optim.kind=lion", "optim.eps=1e-8"], "eps is nothing that kind = \"lion\" has"),
        (&["optim.kind=adafactor", "optim.decay_rate=0.8"], "optim.decay_rate = 0.8 must be below 0"),
        (&["optim.kind=adamm"], "did you mean \"adamw\"?"),
        (&["optim.state_dtype=f16"], "\"f16\" is not one of f32, bf16, f8"),
        (&["optim.momentun=0.9"], "did you mean `momentum`?"),
        (&["adapter.quant=q4_0"], "quant is for kind = \"qlora\""),
        (&["adapter.kind=qlora", "adapter.quant=q5_0"], "\"q5_0\" is not one of q4_0, q4_1, q8_0"),
        (&["parallel.data=0"], "must be at least 1"),
        (&["parallel.zero=4"], "zero is 4"),
        (&["parallel.timeout_s=0"], "timeout_s is 0"),
        (&["parallel.timeouts=5"], "did you mean `timeout_s`?"),
        (&["offload.ratio=1.5"], "ratio is 1.5"),
        (&["offload.grads=nvme"], "grads is \"nvme\"; say in which folder with nvme_path"),
        (&["precision.loss_scale=dynamic"], "loss_scale is for compute = \"f16\""),
        (&["precision.loss_scale=often"], "\"dynamic\" or a number"),
        (&["optim.betas=[0.9]"], "betas"),
        (&["adapter.kind=lora", "adapter.rank=0"], "rank is 0"),
        (&["adapter.kind=lora", "adapter.dropout=1.0"], "dropout is 1"),
        (&["adapter.kind=lora", "adapter.targets=[]"], "targets is empty"),
        (&["adapter.kind=lorra"], "did you mean \"lora\"?"),
        (&["sched.kind=cosin"], "did you mean \"cosine\"?"),
        (&["data_opts.val_fraction=1.0"], "val_fraction is 1"),
        (&["memory.device=lots"], "[memory] device: "),
        (&["optim.learning_rat=1"], "unknown key `learning_rat` in [optim]"),
        (&["nonsense"], "write it as table.key=value"),
        (&["data.7.path=x"], "no such entry"),
        (&["model.path="], "[model] path is missing"),
        (&["data.split=val"], "nothing to train on"),
    ];
    for (set, expected) in cases {
        let error = load(LEAST, set).expect_err(&format!("{set:?}")).to_string();
        assert!(error.contains(expected), "{set:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn steps_and_epochs_in_one_file_contradict() {
    let error = load(&format!("{LEAST}[train]\nsteps = 1\nepochs = 1\n"), &[]).expect_err("both").to_string();
    assert!(error.contains("both steps and epochs"), "{error}");
}

#[test]
fn what_a_later_version_serves_is_parsed_and_named() {
    let error = load(LEAST, &["parallel.tensor=2"]).expect_err("not yet").to_string();
    assert!(error.contains("is not available in this version; "), "{error}");
}

#[test]
fn broken_toml_is_refused_with_its_line() {
    let error = load("[model]\npath = 'm'\nsteps = = 3\n", &[]).expect_err("broken").to_string();
    assert!(error.contains("r.toml:3: not valid TOML"), "{error}");
}

#[test]
fn every_optimizer_gets_its_own_defaults_and_prints_them() {
    for (kind, shown) in [
        ("sgd", "momentum = 0.9"),
        ("lion", "betas = [0.9, 0.99]"),
        ("adafactor", "decay_rate = -0.8"),
        ("adamw", "betas = [0.9, 0.95]"),
    ] {
        let recipe = load(LEAST, &[&format!("optim.kind={kind}")]).expect(kind);
        let text = recipe.to_toml();
        assert!(text.contains(shown), "{kind}: {text}");
        assert_eq!(
            Recipe::parse(&text, "printed").expect("valid").checked("printed").expect("valid"),
            recipe
        );
    }
}
