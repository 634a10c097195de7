//! The binary under `mpirun`. Without one these tests say that they were skipped; `HEARTH_REQUIRE_MPI=1` makes that a
//! failure.

use crate::support::{folder_hashes, json, stderr, tiny_recipe};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SHORT: &str = "[train]\nsteps = 4\nglobal_batch = 4\n[optim]\nlr = 1e-2\n";

/// Open MPI's launcher, if it is here.
fn mpirun() -> Option<&'static str> {
    let answers =
        |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    let found = ["mpirun.openmpi", "mpirun"].into_iter().find(answers);
    if found.is_none() {
        let required = std::env::var("HEARTH_REQUIRE_MPI").is_ok_and(|value| value == "1");
        assert!(!required, "HEARTH_REQUIRE_MPI=1, but there is no mpirun here");
        eprintln!("SKIPPED: there is no mpirun here");
    }
    found
}

/// One rank for each of these command lines.
fn command(launcher: &str, ranks: &[&[&str]]) -> Command {
    let mut command = Command::new(launcher);
    command.args(["--allow-run-as-root", "--oversubscribe"]).stdin(Stdio::null());
    for (i, arguments) in ranks.iter().enumerate() {
        command.args(if i > 0 { &[":", "-n", "1"][..] } else { &["-n", "1"] });
        command.arg(env!("CARGO_BIN_EXE_hearth")).args(*arguments);
    }
    command
}

fn launch(launcher: &str, ranks: &[&[&str]]) -> Output {
    command(launcher, ranks).output().expect("the launcher starts")
}

/// What hearth itself said, without the launcher's own lines.
fn sentences(output: &Output) -> Vec<String> {
    stderr(output).lines().filter(|line| line.starts_with("hearth: ")).map(str::to_owned).collect()
}

#[test]
fn launched_ranks_write_the_checkpoint_of_threads_and_speak_with_one_voice() {
    let Some(launcher) = mpirun() else { return };
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), SHORT);
    let [threads, launched] = ["threads", "launched"].map(|name| folder.path().join(name));
    let dir = |path: &Path| format!("checkpoint.dir={}", path.display());
    json(&["train", &recipe, "--set", &dir(&threads), "--set", "parallel.data=2"]);

    let dir = dir(&launched);
    let arguments = ["train", &recipe, "--set", &dir, "--set", "parallel.zero=3", "--json"];
    let output = launch(launcher, &[&arguments, &arguments]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("exactly one JSON object");
    assert_eq!(report["steps"], 4, "{report}");
    assert_eq!(stderr(&output).matches("4/4").count(), 1, "{}", stderr(&output));
    assert_eq!(folder_hashes(&launched.join("step-4")), folder_hashes(&threads.join("step-4")));
}

#[test]
fn launched_ranks_verify_against_one_plain_rank() {
    let Some(launcher) = mpirun() else { return };
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), SHORT);
    let arguments = ["verify", &recipe, "--set", "parallel.zero=2", "--steps", "2", "--json"];
    let output = launch(launcher, &[&arguments, &arguments]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("exactly one JSON object");
    assert_eq!((&report["equal"], &report["layout"]["data"]), (&true.into(), &2.into()), "{report}");
}

#[test]
fn what_is_wrong_is_said_once_by_rank_0_and_ends_every_rank() {
    let Some(launcher) = mpirun() else { return };
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(folder.path(), SHORT);
    let train = ["train", &recipe];
    let with = |key| ["train", &recipe, "--set", key].map(str::to_owned);
    let cases: Vec<(Vec<String>, Vec<String>, i32, &str)> = vec![
        (
            with("parallel.data=3").into(),
            with("parallel.data=3").into(),
            2,
            "started 2 ranks, [parallel] data is 3",
        ),
        (with("optim.lrr=1").into(), with("optim.lrr=1").into(), 2, "did you mean `lr`?"),
        (
            train.map(str::to_owned).into(),
            with("optim.lr=1e-3").into(),
            2,
            "rank 1 has another recipe than rank 0",
        ),
        (
            train.map(str::to_owned).into(),
            with("model.path=/none").into(),
            2,
            "rank 1: there is no model at /none",
        ),
        (
            with("memory.device=64KiB").into(),
            with("memory.device=64KiB").into(),
            1,
            "device tier: each rank will need",
        ),
    ];
    for (first, second, code, words) in cases {
        let [first, second] =
            [&first, &second].map(|arguments| arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let output = launch(launcher, &[&first, &second]);
        let said = sentences(&output);
        assert_eq!(output.status.code(), Some(code), "{words}: {}", stderr(&output));
        assert!(said.len() == 1 && said[0].contains(words), "{words}: {}", stderr(&output));
        assert!(output.stdout.is_empty() && !folder.path().join("run").exists(), "{words}");
    }
}

/// The processes that a launcher started.
fn children(launcher: &Child) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", launcher.id())).expect("a live process").flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    children
        .flat_map(|text| text.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}

#[test]
fn a_rank_that_stops_is_named_within_the_time_limit_and_the_exit_code_is_75() {
    let Some(launcher) = mpirun() else { return };
    let folder = tempfile::tempdir().expect("folder");
    let recipe = tiny_recipe(
        folder.path(),
        "[parallel]\ntimeout_s = 2\n[train]\nsteps = 100000000\nglobal_batch = 4\n",
    );
    let metrics = folder.path().join("run/metrics.jsonl");
    let arguments = ["train", &recipe, "--set", "checkpoint.every=0"];
    let mut ranks = command(launcher, &[&arguments, &arguments]);
    let ranks = ranks.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the launcher starts");
    let begun = Instant::now();
    while fs::read_to_string(&metrics).unwrap_or_default().lines().count() < 3 {
        assert!(begun.elapsed() < Duration::from_secs(60), "training begins");
        std::thread::yield_now();
    }
    let last = *children(&ranks).iter().max().expect("two ranks");
    let stopped = Command::new("kill").args(["-STOP", &last.to_string()]).status().expect("kill runs");
    assert!(stopped.success());
    let output = ranks.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(75), "{}", stderr(&output));
    let said = sentences(&output);
    let named = |line: &String| {
        let names = |rank: usize, other: usize| {
            line.starts_with(&format!("hearth: rank {rank} of 2: "))
                && (line.ends_with(&format!("rank {other} did not come"))
                    || line.ends_with(&format!("the transfer with rank {other} stopped")))
        };
        line.contains("limit 2.0 s: ") && (names(0, 1) || names(1, 0))
    };
    assert!(said.iter().any(named), "{}", stderr(&output));
}
