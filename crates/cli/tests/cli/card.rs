//! `hearth train` with `model.device = "cuda:0"`, from outside, with a driver that runs kernels on the CPU and with none.

use crate::support::{folder_hashes, hearth, json, root, stderr};
use hearth_cuda_stand_in::StandIn;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;

/// Four steps of two micro-batches each, some of the data held out.
const RUN: &str = "[train]\nsteps = 4\nglobal_batch = 2\n[data_opts]\nval_fraction = 0.2\n[optim]\nlr = 1e-3\n\
                   weight_decay = 0.1\n[sched]\nkind = 'constant'\nwarmup = 1\n[eval]\nevery = 2\n";

const CARD: [&str; 2] = ["--set", "model.device=cuda:0"];

/// A machine with a card.
struct Machine {
    driver: StandIn,
    folder: tempfile::TempDir,
    recipe: String,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name).display().to_string();
        // Few tokens: a card's kernel takes milliseconds here.
        let document =
            |i: usize| (0..3 + i % 4).map(|j| ((i * 7 + j * j * 5) % 37).to_string()).collect::<Vec<_>>();
        let rows = (0..10).map(|i| format!("{{\"input_ids\": [{}]}}\n", document(i).join(", ")));
        std::fs::write(at("data.jsonl"), rows.collect::<String>()).expect("data");
        let (model, recipe) = (root().join("tests/fixtures/parity/llama-gqa-tied/model"), at("recipe.toml"));
        let text = format!(
            "[model]\npath = {:?}\n[[data]]\npath = {:?}\nformat = \"tokens\"\n[checkpoint]\nevery = 2\n{RUN}",
            model.display().to_string(),
            at("data.jsonl"),
        );
        std::fs::write(&recipe, text).expect("a recipe");
        Self { driver: StandIn::new(), folder, recipe }
    }

    /// Runs with the card behaving like this.
    fn output(&self, settings: &str, arguments: &[&str]) -> Output {
        let mut command = hearth(arguments);
        command.env("HEARTH_CUDA_DRIVER", self.driver.path()).env("HEARTH_NVRTC", self.driver.path());
        command.env("HEARTH_STAND_IN", settings).env("XDG_CACHE_HOME", self.folder.path().join("cache"));
        command.output().expect("the binary starts")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Trains into `run` on the card.
    fn train(&self, settings: &str, run: &str, more: &[&str]) -> Output {
        let dir = format!("checkpoint.dir={}", self.at(run).display());
        let arguments = ["train", &self.recipe, "--json", "--set", &dir];
        self.output(settings, &[&arguments, &CARD[..], more].concat())
    }

    /// The same, which succeeds.
    fn trained(&self, settings: &str, run: &str, more: &[&str]) -> Value {
        report(&self.train(settings, run, more))
    }

    /// Trains into `run` on the CPU.
    fn on_cpu(&self, run: &str, more: &[&str]) -> Value {
        let dir = format!("checkpoint.dir={}", self.at(run).display());
        json(&[&["train", &self.recipe, "--set", &dir], more].concat())
    }
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A number of every line of `metrics.jsonl`.
fn series(run: &Path, key: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.map(|line| line[key].as_f64().unwrap_or_else(|| panic!("{key}: {line}"))).collect()
}

#[track_caller]
fn near(a: &[f64], b: &[f64], within: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= within * b.abs(), "step {}: {a} beside {b}", i + 1);
    }
}

/// The last line on stderr, and the exit code.
#[track_caller]
fn refused(output: &Output, code: i32, words: &str) {
    let said = stderr(output);
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("hearth: ") && last.contains(words), "{words}: {said}");
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains("panicked") && output.stdout.is_empty(), "{said}");
}

#[test]
fn steps_on_a_card_are_the_cpus_to_1e_5_and_bf16_to_its_rounding() {
    let machine = Machine::new();
    let cpu = machine.on_cpu("cpu", &[]);
    let card = machine.trained("", "card", &[]);
    for key in ["loss", "grad_norm"] {
        near(&series(&machine.at("card"), key), &series(&machine.at("cpu"), key), 1e-5);
    }
    for key in ["lr", "tokens", "trained_tokens", "tokens_total", "params_bytes", "step"] {
        assert_eq!(series(&machine.at("card"), key), series(&machine.at("cpu"), key), "{key}");
    }
    let held_out = |report: &Value| report["eval_loss"].as_f64().expect("a held-out loss");
    near(&[held_out(&card)], &[held_out(&cpu)], 1e-5);
    assert_eq!(card["steps"], 4);
    let bf16 = ["--set", "precision.compute=bf16"];
    machine.trained("policy=3,schedule=1", "bf16", &bf16);
    near(&series(&machine.at("bf16"), "loss"), &series(&machine.at("cpu"), "loss"), 1e-2);
}

#[test]
fn a_run_that_was_stopped_goes_on_with_the_same_bits_wherever_its_state_lies() {
    let machine = Machine::new();
    for compute in ["f32", "bf16"] {
        let (whole, parts) = (format!("{compute}-whole"), format!("{compute}-parts"));
        let compute = format!("precision.compute={compute}");
        let set = ["--set", &compute];
        machine.trained("", &whole, &set);
        // Lost after the second step's checkpoint, wherever that is: what it left is gone on from.
        let lost = (0..).map(|n| format!("launches={}", 450 + 150 * n));
        let lost = lost.map(|settings| machine.train(&settings, &parts, &set));
        let mut early = lost.inspect(|lost| assert!(!lost.status.success(), "it is lost at some time"));
        let lost = early.find(|_| machine.at(&parts).join("step-2").exists());
        refused(&lost.expect("one of them"), 75, "step-2 is kept: go on from it with --resume");
        let host = ["params", "grads", "optim"].map(|key| format!("offload.{key}=cpu"));
        let host = host.each_ref().map(|set| ["--set", set]).concat();
        let resumed = machine.trained("policy=1", &parts, &[&set[..], &host, &["--resume"]].concat());
        assert_eq!(resumed["steps"], 4);
        let last = |run: &str| folder_hashes(&machine.at(run).join("step-4"));
        assert_eq!(last(&whole), last(&parts), "{compute}");
        assert_eq!(series(&machine.at(&whole), "loss"), series(&machine.at(&parts), "loss"));
    }
}

#[test]
fn either_trainer_goes_on_from_the_others_checkpoint() {
    let machine = Machine::new();
    machine.on_cpu("cpu", &[]);
    let two = ["--set", "train.steps=2"];
    let four = ["--resume"];
    let want = series(&machine.at("cpu"), "loss");
    machine.on_cpu("from-cpu", &two);
    machine.trained("", "from-cpu", &four);
    near(&series(&machine.at("from-cpu"), "loss"), &want, 1e-5);
    machine.trained("", "from-card", &two);
    let first = folder_hashes(&machine.at("from-card/step-2"));
    let names: Vec<&str> = first.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"model.safetensors") && names.contains(&"optimizer.safetensors"), "{names:?}");
    machine.on_cpu("from-card", &four);
    near(&series(&machine.at("from-card"), "loss"), &want, 1e-5);
    let checked = json(&["ckpt", "verify", &machine.at("from-card/step-4").display().to_string()]);
    assert_eq!(checked["ok"], true, "{checked}");
}

#[test]
fn what_was_planned_is_what_the_ledger_sees_and_a_budget_moves_units_to_the_host() {
    let machine = Machine::new();
    let plan = |more: &[&str]| {
        let arguments = ["train", &machine.recipe, "--json", "--dry-run"];
        report(&machine.output("", &[&arguments, &CARD[..], more].concat()))
    };
    let whole = plan(&[]);
    let card = &whole["card"];
    assert_eq!((card["card"].as_str(), card["units"].as_u64()), (Some("stand-in"), Some(4)), "{card}");
    assert_eq!(card["units_on_host"].as_u64(), Some(0), "{card}");
    let bytes = card["tiers"]["device"]["peak_bytes"].as_u64().expect("bytes");
    let forecast = report(&machine.output("", &["plan", &machine.recipe, "--json", CARD[0], CARD[1]]));
    assert_eq!(forecast["tiers"], card["tiers"]);
    assert!(forecast["step_s"].as_f64() > Some(0.0) && forecast["tok_s"].as_f64() > Some(0.0), "{forecast}");
    assert!(["compute", "link", "memory"].contains(&forecast["bound_by"].as_str().expect("a word")));
    let free = machine.trained("", "free", &[]);
    assert_eq!(free["tiers"], free["planned_tiers"]);
    assert_eq!(free["tiers"]["device"]["peak_bytes"].as_u64(), Some(bytes));
    let mut last = Vec::new();
    for (run, limit) in [("less", bytes - 1), ("least", bytes - bytes / 20)] {
        let memory = format!("device={limit}");
        let moved = plan(&["--memory", &memory]);
        assert!(moved["card"]["units_on_host"].as_u64() > Some(0), "{moved}");
        let done = machine.trained("", run, &["--memory", &memory]);
        assert_eq!(done["tiers"], done["planned_tiers"]);
        assert_eq!(done["tiers"]["device"]["budget_bytes"].as_u64(), Some(limit));
        assert!(done["tiers"]["device"]["peak_bytes"].as_u64() <= Some(limit), "{done}");
        last.push(folder_hashes(&machine.at(run).join("step-4")));
    }
    last.push(folder_hashes(&machine.at("free").join("step-4")));
    assert!(last.iter().all(|hashes| *hashes == last[0]), "where units lie changes no bit");
    let small = machine.train("", "small", &["--memory", "device=1KiB"]);
    refused(&small, 1, "device tier: the run will need ");
    assert!(stderr(&small).contains("memory.device is 1KiB; what would help: memory.device = \""));
    let host = format!("device={},host=1KiB", bytes - 1);
    refused(&machine.train("", "small", &["--memory", &host]), 1, "host tier: the run will need ");
    assert!(!machine.at("small").exists(), "nothing is left behind");
}

#[test]
fn what_a_cards_trainer_does_not_do_is_refused_with_key_and_value() {
    let machine = Machine::new();
    let gemma = format!("model.path={}", root().join("tests/fixtures/parity/gemma/model").display());
    let cases: [(&[&str], &str); 9] = [
        (&["adapter.kind=lora"], "adapter.kind = \"lora\" is not done on a card"),
        (&["adapter.kind=qlora"], "adapter.kind = \"qlora\" is not done on a card"),
        (&["method.kind=dpo"], "method.kind = \"dpo\" is not done on a card"),
        (&["optim.kind=lion"], "optim.kind = \"lion\" is not done on a card"),
        (&["optim.state_dtype=bf16"], "optim.state_dtype = \"bf16\" is not done on a card"),
        (&["precision.compute=f16"], "precision.compute = \"f16\" is not done on a card"),
        (&["parallel.data=2"], "parallel.data = 2 is not done on a card"),
        (
            &["offload.optim=nvme", "offload.nvme_path=/nonexistent"],
            "offload.optim = \"nvme\" is not done on a card",
        ),
        (&[&gemma], "model type `gemma` is not trained on a card"),
    ];
    for (keys, words) in cases {
        // No card is needed to say so, nor the data.
        let mut set: Vec<&str> = keys.iter().flat_map(|key| ["--set", *key]).collect();
        set.extend(["--set", "train.max_seq_len=64"]);
        refused(&machine.train("count=0", "refused", &set), 2, words);
    }
    assert!(!machine.at("refused").exists(), "nothing is left behind");
}

#[test]
fn a_machine_without_what_a_card_needs_is_a_sentence_and_nothing_hangs() {
    let machine = Machine::new();
    let cases = [
        ("version=11040", "made for CUDA 11.4, 12.0 or newer is needed"),
        ("count=0", "the NVIDIA driver finds no card"),
        ("major=7", "stand-in has compute capability 7.0, 8.0 or newer is needed"),
    ];
    for (settings, words) in cases {
        refused(&machine.train(settings, "none", &[]), 2, words);
    }
    let train = ["train", &machine.recipe, CARD[0], CARD[1]];
    let none = hearth(&train).env("HEARTH_CUDA_DRIVER", "/nonexistent").output().expect("starts");
    refused(&none, 2, "/nonexistent");
    let mut blind = hearth(&train);
    blind.env("HEARTH_CUDA_DRIVER", machine.driver.path()).env("HEARTH_NVRTC", "/nonexistent");
    refused(&blind.output().expect("starts"), 2, "/nonexistent");
    // Before the first checkpoint.
    refused(&machine.train("launches=20", "lost", &[]), 75, "no checkpoint was saved yet");
    let full = machine.train("allocations=9", "full", &[]);
    refused(&full, 1, "another program may hold the rest");
}
