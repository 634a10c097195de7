//! A recipe on many ranks comes to the same bytes as on one, keeps its budgets, and ends well when it cannot go on.

use crate::support::{folder_hashes, json, run, stderr, tiny_model, tiny_recipe};
use hearth::commands::verify::{self, Trace};
use hearth::open::Model;
use hearth::recipe::Recipe;
use hearth::training::Job;
use hearth::ui::{Report, Ui};
use std::fs;
use std::path::Path;

/// Few steps of few sequences, which two ranks can share.
const SHORT: &str = "keep = 0\n[train]\nsteps = 4\nglobal_batch = 4\n[optim]\nlr = 1e-2\n";

/// `--set` for each of these.
fn set<'a>(recipe: &'a str, keys: &[&'a str]) -> Vec<&'a str> {
    let sets = keys.iter().flat_map(|key| ["--set", key]);
    [recipe].into_iter().chain(sets).collect()
}

#[test]
fn verify_finds_partitioned_and_offloaded_ranks_equal_to_one_plain_rank() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), SHORT);
    let nvme = format!("offload.nvme_path={}", folder.path().join("nvme").display());
    let everything_away = [
        "parallel.data=2",
        "parallel.zero=3",
        "offload.params=nvme",
        "offload.grads=nvme",
        "offload.optim=nvme",
        &nvme,
    ];
    let split = ["parallel.data=4", "parallel.zero=2", "offload.optim=cpu", "offload.ratio=0.5"];
    let other_optimizer = ["parallel.data=2", "parallel.zero=1", "optim.kind=lion", "optim.state_dtype=bf16"];
    let qlora = ["parallel.data=2", "parallel.zero=3", "adapter.kind=qlora", "adapter.quant=q8_0"];
    for keys in [&everything_away[..], &split, &other_optimizer, &qlora] {
        let report = json(&[&["verify"][..], &set(&recipe, keys), &["--steps", "3"]].concat());
        assert_eq!(report["equal"], true, "{keys:?}: {report}");
        assert!(report["first_difference"].is_null(), "{keys:?}: {report}");
        assert!(report["states"].as_u64() > Some(0), "{keys:?}: {report}");
    }
    assert!(!folder.path().join("run").exists(), "verify writes no checkpoint");
    assert_eq!(
        fs::read_dir(folder.path().join("nvme")).expect("made").count(),
        0,
        "nothing is left on the disk"
    );
}

fn trace(recipe: &str, keys: &[&str], steps: usize) -> Trace {
    let keys: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
    let recipe = Recipe::load(Path::new(recipe), &keys).expect("valid");
    let ui = Ui::silent();
    let model = Model::open(Path::new(&tiny_model()), &ui).expect("the fixture");
    let mut job = Job::new(&recipe, model, 1, 1, &ui).expect("a run");
    job.config.checkpoint = None;
    verify::plain_trace(job, steps).expect("trains")
}

#[test]
fn verify_names_what_differs_first() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), SHORT);
    let first = |keys: &[&str], steps| {
        let difference = verify::compare(&trace(&recipe, keys, steps), &trace(&recipe, &[], steps));
        difference.map(|d| (d.step, d.quantity))
    };
    assert_eq!(first(&[], 2), None);
    assert_eq!(first(&["train.seed=1"], 1), Some((Some(1), "loss".into())));
    assert_eq!(first(&["optim.lr=2e-2"], 2), Some((Some(2), "loss".into())));
    let (step, state) = first(&["optim.lr=2e-2"], 1).expect("other weights");
    assert!(step.is_none() && state.starts_with("weight."), "{state}");
}

#[test]
fn a_difference_is_a_failure() {
    let difference = verify::Difference {
        step: Some(2),
        quantity: "grad_norm".into(),
        recipe: "1.5".into(),
        plain: "1.25".into(),
    };
    let layout = verify::Layout { data: 2, zero: 1, offload: Default::default() };
    let report = verify::VerifyReport {
        equal: false,
        first_difference: Some(difference),
        steps: 3,
        states: 9,
        layout,
    };
    assert!(!report.ok());
    assert!(report.text().contains("differs at step 2: grad_norm is 1.5, on one plain rank 1.25"));
}

#[test]
fn two_ranks_write_the_checkpoint_of_one() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), SHORT);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    let dir = |path: &Path| format!("checkpoint.dir={}", path.display());
    json(&[&["train"][..], &set(&recipe, &[&dir(&one)])].concat());
    let keys = [&dir(&two), "parallel.data=2", "parallel.zero=3"];
    let done = json(&[&["train"][..], &set(&recipe, &keys)].concat());
    assert_eq!(done["steps"], 4, "{done}");
    for step in ["step-2", "step-4"] {
        assert_eq!(folder_hashes(&two.join(step)), folder_hashes(&one.join(step)), "{step}");
    }
    let inspected = json(&["ckpt", "inspect", &two.display().to_string()]);
    assert_eq!((&inspected["world"], &inspected["stage"]), (&2.into(), &3.into()), "{inspected}");

    // One rank goes on from the first half of what two began.
    fs::remove_dir_all(two.join("step-4")).expect("removed");
    let done = json(&[&["train"][..], &set(&recipe, &[&dir(&two)]), &["--resume"]].concat());
    assert_eq!(done["steps"], 4, "{done}");
    assert_eq!(folder_hashes(&two.join("step-4")), folder_hashes(&one.join("step-4")), "after a resume");
}

#[test]
fn a_training_budget_that_is_too_small_says_the_smallest_that_works_and_what_else_would() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), SHORT);
    let nvme = format!("offload.nvme_path={}", folder.path().join("nvme").display());
    let on_disk = ["offload.optim=nvme", &nvme];
    let cases: [(&str, &str, &[&str], &str); 4] = [
        ("device", "", &[], ", activation.checkpoint = \"full\", offload.optim = \"cpu\" or \"nvme\""),
        ("device", "", &["parallel.data=2", "activation.checkpoint=full"], "parallel.zero = 1"),
        ("host", "", &["offload.optim=cpu", "parallel.data=2"], "2 ranks together will need"),
        ("nvme", "device=1GiB,", &on_disk, "the run will need"),
    ];
    for (tier, more, keys, words) in cases {
        let small = format!("{more}{tier}=32KiB");
        let output = run(&[&["train"][..], &set(&recipe, keys), &["--memory", &small]].concat());
        let said = stderr(&output);
        let last = said.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{small}: {said}");
        assert!(last.contains("is 32KiB; what would help") && last.contains(words), "{small}: {said}");
        assert!(!folder.path().join("run").exists(), "{small}: refused before anything begins");

        let marker = format!("memory.{tier} = \"");
        let smallest = last.split(&marker).nth(1).and_then(|rest| rest.split('"').next()).expect("a size");
        let enough = format!("{more}{tier}={smallest}");
        json(&[&["train"][..], &set(&recipe, keys), &["--memory", &enough]].concat());
        fs::remove_dir_all(folder.path().join("run")).expect("removed");
    }
    // The recipe's own limits count as well, and the command line's take their place.
    let limited = set(&recipe, &["memory.device=64KiB"]);
    assert_eq!(run(&[&["train"][..], &limited].concat()).status.code(), Some(1));
    json(&[&["train"][..], &limited, &["--memory", "device=256MiB"]].concat());
}
