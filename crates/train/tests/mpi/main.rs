//! Layouts under Open MPI come to the same bits as one rank without a launcher.
//!
//! Started by a person or by cargo, this program starts itself under the launcher; started by that, it is one rank of
//! every layout, one after another, and leaves what came of each in a file. `HEARTH_REQUIRE_MPI=1` makes a missing
//! launcher a failure, `HEARTH_LONG_MATRIX=1` runs every layout for many steps.
#![forbid(unsafe_code)]

#[path = "../train/synthetic.rs"]
mod synthetic;
#[path = "../train/tiny.rs"]
mod tiny;

use hearth_collective::{Ordered, Watchdog, mpi, single};
use hearth_train::{Setup, TrainConfig, Trainer};
use hearth_weights::ModelFiles;
use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, ExitCode, Output};
use std::time::{Duration, Instant};
use std::{env, fs};
use tiny::{Case, cut, matrix, outcome, sequences, setup};

/// By when every rank has come to an operation.
const TIMEOUT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    // What test runners ask a program with tests for.
    if env::args().any(|argument| argument == "--list") {
        if !env::args().any(|argument| argument == "--ignored") {
            println!("layouts_of_launched_ranks_give_the_same_bits: test");
        }
        return ExitCode::SUCCESS;
    }
    match mpi::launched() {
        Some(_) => run_rank(Path::new(&env::args().nth(1).expect("a folder"))),
        None => return run_tests(),
    }
    ExitCode::SUCCESS
}

/// What comes of a run on this rank, as text.
fn follow(files: &ModelFiles, config: &TrainConfig, comm: Ordered, steps: usize) -> String {
    let data = sequences(10, files.config.vocab_size);
    let setup = Setup { comm, ..setup(files, config, data) };
    let mut trainer = Trainer::new(setup, config.clone()).expect("a trainer");
    format!("{:?}", outcome(&mut trainer, steps))
}

/// The layouts for this many ranks.
fn cases(folder: &Path, world: usize) -> (Vec<Case>, usize) {
    let (mut cases, steps) = matrix(folder);
    cases.retain(|case| case.world == world);
    (cases, steps)
}

fn file(case: &Case, rank: usize) -> String {
    format!("{}, rank {rank}", case.name)
}

fn run_rank(folder: &Path) {
    let world = mpi::connect().expect("MPI").expect("a launcher started this process");
    let world = Ordered::start(world, Watchdog::ending(TIMEOUT));
    let files = hearth_weights::open(folder).expect("the model that the test left");
    let (cases, steps) = cases(folder, world.world_size());
    for case in &cases {
        let comm = world.split(0, world.rank()).wait().expect("a group of its own");
        let found = follow(&files, &case.config, comm, steps);
        fs::write(folder.join(file(case, world.rank())), found).expect("written");
    }
}

/// Open MPI's launcher, if it is here.
fn mpirun() -> Option<&'static str> {
    let answers =
        |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    ["mpirun.openmpi", "mpirun"].into_iter().find(answers)
}

fn run_tests() -> ExitCode {
    let Some(launcher) = mpirun() else {
        let required = env::var("HEARTH_REQUIRE_MPI").is_ok_and(|value| value == "1");
        eprintln!(
            "{}there is no mpirun here",
            if required { "HEARTH_REQUIRE_MPI=1, but " } else { "SKIPPED: " }
        );
        return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    };
    for world in [2, 4] {
        layouts_give_the_same_bits(launcher, world);
    }
    ExitCode::SUCCESS
}

fn layouts_give_the_same_bits(launcher: &str, world: usize) {
    let (folder, started) = (tempfile::tempdir().expect("a folder"), Instant::now());
    let files = cut(folder.path());
    let output = launch(launcher, world, folder.path());
    assert!(output.status.success(), "{world} ranks: {}", String::from_utf8_lossy(&output.stderr));
    let (cases, steps) = cases(folder.path(), world);
    let mut plain = HashMap::new();
    for case in &cases {
        let key = (case.config.compute.name(), case.config.global_batch);
        let plain = plain.entry(key).or_insert_with(|| follow(&files, &case.plain(), single(), steps));
        for rank in 0..world {
            let file = file(case, rank);
            let found = fs::read_to_string(folder.path().join(&file)).expect("every rank left its outcome");
            assert_eq!(found, *plain, "{file}");
        }
    }
    let (count, seconds) = (cases.len(), started.elapsed().as_secs_f64());
    println!("test {world} ranks: {count} layouts, {steps} steps of each ... ok ({seconds:.1} s)");
}

/// Runs this program on so many ranks.
fn launch(launcher: &str, world: usize, folder: &Path) -> Output {
    let mut command = Command::new(launcher);
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &world.to_string()]);
    // Ranks that wait leave the processors to those that compute.
    command.args(["--mca", "mpi_yield_when_idle", "1"]);
    command.arg(env::current_exe().expect("this program")).arg(folder);
    command.output().expect("the launcher starts")
}
