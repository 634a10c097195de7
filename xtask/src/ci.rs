//! Every check and test, one after another, each timed.

use crate::{clients, nvrtc, tools};
use anyhow::{Context, bail};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A step's name and how long it took.
type Timed = (&'static str, Duration);

/// Whether tests under an MPI launcher must run.
static REQUIRE_MPI: AtomicBool = AtomicBool::new(false);

/// Everything is built with one profile in one target directory, so that Burn is compiled once.
pub fn run(real: bool) -> anyhow::Result<()> {
    std::env::set_current_dir(root()).context("cannot enter the repository")?;
    tools::require()?;
    let mut done: Vec<Timed> = Vec::new();
    let result = steps(real, &mut done);
    print_times(&done);
    result
}

/// The CUDA kernels alone: compiled for every architecture, with what each takes.
pub fn kernels() -> anyhow::Result<()> {
    std::env::set_current_dir(root()).context("cannot enter the repository")?;
    match nvrtc::compile_kernels()? {
        Some(mut compile) => run_step(&mut Vec::new(), "cuda kernels", &mut compile),
        None => Ok(()),
    }
}

/// The real clients alone.
pub fn clients() -> anyhow::Result<()> {
    std::env::set_current_dir(root()).context("cannot enter the repository")?;
    let mut done: Vec<Timed> = Vec::new();
    let result = real_clients(&mut done);
    print_times(&done);
    result
}

/// What the tests of layouts, crashes and hostile clients do for seconds, for as long as the project promises.
pub fn matrix() -> anyhow::Result<()> {
    std::env::set_current_dir(root()).context("cannot enter the repository")?;
    let mut done: Vec<Timed> = Vec::new();
    let result = proofs(&mut done);
    print_times(&done);
    result
}

fn proofs(done: &mut Vec<Timed>) -> anyhow::Result<()> {
    let train = ["test", "--release", "--package", "hearth-train", "--test"];
    let cli = ["test", "--release", "--package", "hearth", "--test", "cli"];
    let layouts = [&train[..], &["train", "every_layout", "--", "--nocapture"]].concat();
    let launched = [&train[..], &["mpi"]].concat();
    let kills = [&cli[..], &["a_run_killed", "--", "--nocapture"]].concat();
    let storm = ["test", "--release", "--package", "hearth-engine", "--test", "storm"].to_vec();
    for (name, arguments) in
        [("layouts", layouts), ("layouts, Open MPI", launched), ("kills", kills), ("storm", storm)]
    {
        let start = Instant::now();
        let status = Command::new("cargo").args(&arguments).env("HEARTH_LONG_MATRIX", "1").status();
        let status = status.context("cargo cannot be started")?;
        done.push((name, start.elapsed()));
        if !status.success() {
            bail!("{name} failed: HEARTH_LONG_MATRIX=1 cargo {}", arguments.join(" "));
        }
    }
    Ok(())
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository")
}

fn steps(real: bool, done: &mut Vec<Timed>) -> anyhow::Result<()> {
    step(done, "format", &["fmt", "--all", "--check"])?;
    step(done, "lints", &["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    let mpi = tools::mpi();
    if mpi {
        // From here on a test that finds no launcher fails instead of being skipped.
        REQUIRE_MPI.store(true, Ordering::Relaxed);
    }
    if tools::nextest() {
        step(done, "tests", &["nextest", "run", "--release", "--workspace", "--no-fail-fast"])?;
        step(done, "doc tests", &["test", "--release", "--workspace", "--doc"])?;
    } else {
        step(done, "tests", &["test", "--release", "--workspace", "--no-fail-fast"])?;
    }
    if mpi {
        run_step(done, "two hosts", &mut Command::new(".ci/two-hosts"))?;
    }
    let scripts = ["-m", "unittest", "discover", "benches/peers"];
    run_step(done, "peers' scripts", Command::new("python3").args(scripts))?;
    examples(done)?;
    real_clients(done)?;
    if let Some(mut compile) = nvrtc::compile_kernels()? {
        run_step(done, "cuda kernels", &mut compile)?;
    }
    step(done, "cuda check", &["check", "--release", "--package", "hearth", "--features", "cuda"])?;
    if real {
        real_weights(done)?;
    }
    Ok(())
}

/// Clients as users have them, talking to the binary.
fn real_clients(done: &mut Vec<Timed>) -> anyhow::Result<()> {
    let start = Instant::now();
    let talk = clients::talk()?;
    done.push(("clients, installing", start.elapsed()));
    let Some(mut talk) = talk else { return Ok(()) };
    // With the workspace's features, as the tests have built it.
    step(done, "binary", &["build", "--release", "--workspace", "--bin", "hearth"])?;
    run_step(done, "clients", &mut talk)
}

/// The library's examples, on the tiny model among the fixtures, in a folder that goes away.
fn examples(done: &mut Vec<Timed>) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("no temporary folder")?;
    let at = |name: &str| folder.path().join(name).display().to_string();
    let tiny = root().join("tests/fixtures/tiny-chat");
    let (model, data) =
        (tiny.join("model").display().to_string(), tiny.join("train.jsonl").display().to_string());
    let example = |name| vec!["run", "--release", "--quiet", "--package", "hearth", "--example", name, "--"];
    let with = |name, arguments: &[&str]| [&example(name), arguments].concat().join("\n");
    let lines = [
        ("example finetune", with("finetune", &[&model, &data, &at("run")])),
        ("example convert", with("convert", &[&model, &at("bundle")])),
        ("example serve", with("serve", &[&at("bundle")])),
    ];
    for (name, line) in &lines {
        step(done, name, &line.split('\n').collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Tests on real weights, which they fetch themselves; without this variable they do nothing.
fn real_weights(done: &mut Vec<Timed>) -> anyhow::Result<()> {
    let start = Instant::now();
    let status = Command::new("cargo")
        .args(["test", "--release", "--package", "hearth", "--package", "hearth-tests", "real_weights"])
        .env("HEARTH_REAL_WEIGHTS", "1")
        .status()
        .context("cargo cannot be started")?;
    done.push(("real weights", start.elapsed()));
    if status.success() { Ok(()) } else { bail!("the tests on real weights failed") }
}

fn step(done: &mut Vec<Timed>, name: &'static str, arguments: &[&str]) -> anyhow::Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(arguments);
    run_step(done, name, &mut cargo)
}

fn run_step(done: &mut Vec<Timed>, name: &'static str, command: &mut Command) -> anyhow::Result<()> {
    println!("── {name}: {command:?}");
    if REQUIRE_MPI.load(Ordering::Relaxed) {
        command.env("HEARTH_REQUIRE_MPI", "1");
    }
    let start = Instant::now();
    let status = command.status().with_context(|| format!("{command:?} cannot be started"))?;
    done.push((name, start.elapsed()));
    if status.success() { Ok(()) } else { bail!("{name} failed: {command:?}") }
}

fn print_times(done: &[Timed]) {
    println!("\n{:<20} {:>8}", "step", "seconds");
    for (name, time) in done {
        println!("{name:<20} {:>8.1}", time.as_secs_f64());
    }
    let total: Duration = done.iter().map(|(_, time)| *time).sum();
    println!("{:<20} {:>8.1}", "total", total.as_secs_f64());
}
