//! What is planned is what then happens.

use crate::support::{hearth, json, stderr, tiny_model, tiny_recipe};
use serde_json::Value;
use std::path::Path;
use std::process::Output;

const RUN: &str = "keep = 0\n[train]\nsteps = 2\nglobal_batch = 4\n";

/// What is measured is kept in `folder`, not in the user's cache.
fn plan(folder: &Path, recipe: &str, more: &[&str]) -> Output {
    let arguments = [&["plan", recipe, "--json"][..], more].concat();
    hearth(&arguments).env("XDG_CACHE_HOME", folder.join("cache")).output().expect("the binary starts")
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stderr(output)))
}

#[test]
fn a_run_holds_what_was_planned_and_a_second_plan_measures_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), RUN);
    let nvme = format!("offload.nvme_path={}", folder.path().join("nvme").display());
    let keys = ["--memory", "device=1GiB,host=1GiB", "--set", "offload.optim=nvme", "--set", &nvme];
    let two = ["--set", "parallel.data=2", "--set", "parallel.zero=2"];
    let more = [&keys[..], &two].concat();
    let first = plan(folder.path(), &recipe, &more);
    assert!(stderr(&first).contains("measuring"), "{}", stderr(&first));
    let second = plan(folder.path(), &recipe, &more);
    assert!(!stderr(&second).contains("measuring"), "{}", stderr(&second));
    let planned = report(&second);
    let trained = json(&[&["train", &recipe][..], &more].concat());
    assert_eq!(trained["tiers"], trained["planned_tiers"]);
    // Activations are measured on the heap, where a few bytes come and go.
    for tier in ["device", "host", "nvme"] {
        let bytes = |report: &Value| report["tiers"][tier]["peak_bytes"].as_f64().expect("bytes");
        let (expected, held) = (bytes(&planned), bytes(&trained));
        assert!((expected - held).abs() <= 0.02 * held, "{tier}: planned {expected}, held {held}");
        let kinds = planned["tiers"][tier]["by_kind"].as_object().expect("kinds");
        assert_eq!(kinds.values().filter_map(Value::as_f64).sum::<f64>(), expected, "{tier}");
    }
    assert_eq!((planned["ranks"].as_u64(), &planned["fits"]), (Some(2), &Value::Bool(true)));
    for key in ["step_s", "compute_s", "disk_s", "exchange_s", "update_s", "tok_s", "process_peak_bytes"] {
        assert!(planned[key].is_number(), "{key}: {planned}");
    }
    assert!(planned["bound_by"].is_string(), "{planned}");
}

#[test]
fn a_budget_too_small_fails_with_the_smallest_that_works() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), RUN);
    let small = plan(folder.path(), &recipe, &["--memory", "device=100KiB"]);
    assert_eq!(small.status.code(), Some(1), "{}", stderr(&small));
    let small = report(&small);
    assert_eq!(small["fits"], false);
    let why = small["why"].as_str().expect("a sentence");
    assert!(why.contains("activation.checkpoint"), "{why}");
    let enough = why.split("memory.device = \"").nth(1).and_then(|rest| rest.split('"').next());
    let memory = format!("device={}", enough.expect("a size"));
    let held = plan(folder.path(), &recipe, &["--memory", &memory]);
    assert_eq!(report(&held)["fits"], true, "{memory}");
}

#[test]
fn the_search_prints_what_fits_ready_to_paste_and_counts_what_does_not() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), RUN);
    let limits = ["--memory", "device=768KiB"];
    let found = report(&plan(folder.path(), &recipe, &[&limits[..], &["--search"]].concat()));
    let search = &found["search"];
    let rejected: u64 =
        search["rejected"].as_array().expect("reasons").iter().filter_map(|r| r["count"].as_u64()).sum();
    let fastest = search["fastest"].as_array().expect("a list");
    assert!(!fastest.is_empty() && rejected > 0, "{search}");
    assert!(rejected + fastest.len() as u64 <= search["considered"].as_u64().expect("a number"), "{search}");
    let set: Vec<&str> = fastest[0]["set"].as_str().expect("options").split(' ').collect();
    let again = report(&plan(folder.path(), &recipe, &[&limits[..], &set].concat()));
    assert_eq!(again["fits"], true, "{again}");
}

#[test]
fn the_picture_is_well_formed_and_shows_every_tier_that_holds_something() {
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), RUN);
    let file = folder.path().join("plan.svg");
    let path = file.display().to_string();
    let keys = ["--svg", &path, "--set", "offload.optim=cpu", "--memory", "device=1GiB"];
    assert!(plan(folder.path(), &recipe, &keys).status.success());
    let svg = std::fs::read_to_string(&file).expect("a picture");
    for words in ["device", "host", "nothing lies in nvme", "backward", "update", "budget", "optimizer"] {
        assert!(svg.contains(words), "{words}");
    }
    assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    let tags = svg.matches('<').count();
    assert_eq!(tags, svg.matches('>').count());
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
}

#[test]
fn serving_is_planned_with_its_tiers_and_the_resource_that_binds() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny_model();
    let run = |memory: &str| {
        let arguments = ["plan", "--serve", &model, "--memory", memory, "--json"];
        hearth(&arguments)
            .env("XDG_CACHE_HOME", folder.path().join("cache"))
            .output()
            .expect("the binary starts")
    };
    let plan = report(&run("device=16MiB,host=1MiB"));
    assert_eq!((&plan["streams"], &plan["blocks"]["device"]), (&Value::from(false), &Value::from(2)));
    assert_eq!(plan["batches"].as_array().expect("a list").len(), 3);
    assert!(plan["tok_s"].as_f64().expect("a rate") > 0.0 && plan["bound_by"].is_string());
    let device = &plan["tiers"]["device"];
    let kinds = device["by_kind"].as_object().expect("kinds").values();
    assert_eq!(kinds.map(|n| n.as_u64().expect("bytes")).sum::<u64>(), device["peak_bytes"]);
    assert!(device["peak_bytes"].as_u64().expect("bytes") <= 16 << 20);
    let refused = run("device=1KiB");
    assert!(
        !refused.status.success() && stderr(&refused).contains("smallest budget that works"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn a_plan_names_the_crowd_that_the_cache_holds_and_what_it_waits_for() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny_model();
    let run = |more: &[&str]| {
        let arguments = ["plan", "--serve", &model, "--memory", "device=16MiB,host=1MiB", "--json"];
        let mut command = hearth(&[&arguments[..], more].concat());
        command.env("XDG_CACHE_HOME", folder.path().join("cache")).output().expect("it starts")
    };
    for (more, batch) in [
        (&[][..], 16),
        (&["--placement", "throughput"], 16),
        (&["--placement", "latency", "--max-seqs", "4"], 4),
    ] {
        let crowd = &report(&run(more))["crowd"];
        assert_eq!(crowd["batch"], batch, "{more:?}");
        assert!(
            ["memory", "arithmetic"].contains(&crowd["bound_by"].as_str().expect("a resource")),
            "{crowd}"
        );
    }
    for (wrong, words) in
        [(&["--placement", "beauty"][..], "throughput"), (&["--max-seqs", "0"], "at least 1")]
    {
        let refused = run(wrong);
        assert!(refused.status.code() == Some(2) && stderr(&refused).contains(words), "{}", stderr(&refused));
    }
}
