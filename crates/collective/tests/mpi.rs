//! The conformance suite and the failures of ranks that are processes, under every MPI launcher found here.
//!
//! Started by a person or by cargo, this program looks for launchers and starts itself under them; started by a
//! launcher, it is one rank and runs the program that its first argument names. `HEARTH_REQUIRE_MPI=1` makes a missing
//! launcher a failure.
#![forbid(unsafe_code)]

mod held;
mod suite;

use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, process, thread};

use hearth_collective::{Diagnosis, EXIT_CODE, Error, Ordered, Watchdog, measure, mpi};

/// How long ranks wait in the programs that fail on purpose.
const TIMEOUT: Duration = Duration::from_secs(1);

/// By when a launcher must have ended a job that failed.
const END: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let program = env::args().nth(1).unwrap_or_default();
    // What test runners ask a program with tests for.
    if env::args().any(|argument| argument == "--list") {
        if !env::args().any(|argument| argument == "--ignored") {
            println!("ranks_that_are_processes: test");
        }
        return ExitCode::SUCCESS;
    }
    match mpi::launched() {
        Some(_) => run_rank(&program),
        None => run_tests(),
    }
}

// As one rank.

fn run_rank(program: &str) -> ExitCode {
    let mut world = match mpi::connect() {
        Ok(world) => world.expect("a launcher started this process"),
        Err(error) => {
            eprintln!("{error}");
            process::exit(error.exit_code());
        }
    };
    match program {
        "suite" => suite::run_all(&mut *world),
        "held" => held::check(Ordered::start(world, Watchdog::new(END))),
        "skip" => report(|| skip(Ordered::start(world, Watchdog::ending(TIMEOUT)))),
        "kill" => report(|| kill(Ordered::start(world, Watchdog::ending(END)))),
        "steps" => report(|| steps(Ordered::start(world, recording(3 * TIMEOUT)))),
        "measure" => report(|| rates(Ordered::start(world, Watchdog::default()))),
        other => panic!("no program is called {other:?}"),
    }
    ExitCode::SUCCESS
}

/// Ends the process as `hearth` does.
fn report(program: impl FnOnce() -> Result<(), Error>) {
    if let Err(error) = program() {
        // In one piece: launchers mix what ranks write.
        std::io::stderr().write_all(format!("{error}\n").as_bytes()).ok();
        process::exit(error.exit_code());
    }
}

/// Also writes the diagnosis to a file in the folder that the second argument names, if there is one: what a rank
/// prints does not arrive over a link that is down.
fn recording(timeout: Duration) -> Watchdog {
    let ending = Watchdog::ending(timeout).on_timeout;
    let on_timeout = move |diagnosis: &Diagnosis| {
        if let Some(folder) = env::args().nth(2) {
            let file = Path::new(&folder).join(format!("rank-{}", diagnosis.rank));
            std::fs::write(file, format!("{diagnosis}\n")).expect("the folder is there");
        }
        ending(diagnosis);
    };
    Watchdog { timeout, on_timeout: Arc::new(on_timeout) }
}

/// The last rank does not come to the second operation.
fn skip(group: Ordered) -> Result<(), Error> {
    group.barrier().wait()?;
    while group.rank() + 1 == group.world_size() {
        thread::park();
    }
    group.all_reduce(vec![1.0; 1000]).wait().map(drop)
}

/// The last rank is killed while the others wait for it.
fn kill(group: Ordered) -> Result<(), Error> {
    group.barrier().wait()?;
    if group.rank() + 1 == group.world_size() {
        Command::new("kill").args(["-9", &process::id().to_string()]).status().expect("kill runs");
    }
    group.barrier().wait()
}

/// Exchanges until something fails; rank 0 says when it has begun.
fn steps(group: Ordered) -> Result<(), Error> {
    for step in 0u64.. {
        let sum = group.all_reduce(vec![1.0; 1 << 20]).wait()?;
        assert!(sum.iter().all(|x| *x == group.world_size() as f32), "step {step}");
        if step == 10 && group.rank() == 0 {
            println!("running");
        }
    }
    Ok(())
}

fn rates(group: Ordered) -> Result<(), Error> {
    let megabytes = env::args().nth(2).and_then(|x| x.parse().ok()).unwrap_or(64);
    let rates = measure(&group, megabytes << 20)?;
    if group.rank() == 0 {
        for rate in rates {
            println!(
                "{} ranks: {} of {megabytes} MiB: {:.1} ms, {:.2} GB/s",
                group.world_size(),
                rate.operation,
                1e3 * rate.seconds,
                rate.gb_s
            );
        }
    }
    Ok(())
}

// As the test of all ranks.

struct Launcher {
    name: &'static str,
    command: &'static str,
    arguments: &'static [&'static str],
}

const LAUNCHERS: &[Launcher] = &[
    Launcher {
        name: "Open MPI",
        command: "mpirun.openmpi",
        arguments: &["--allow-run-as-root", "--oversubscribe"],
    },
    Launcher { name: "MPICH", command: "mpiexec.hydra", arguments: &[] },
];

impl Launcher {
    fn is_here(&self) -> bool {
        Command::new(self.command).arg("--version").output().is_ok_and(|output| output.status.success())
    }

    /// Runs `program` on `ranks` ranks.
    fn run(&self, ranks: usize, program: &str, library: Option<&str>) -> Output {
        let mut command = Command::new(self.command);
        command.args(self.arguments).args(["-n", &ranks.to_string()]);
        command.arg(env::current_exe().expect("this program")).arg(program);
        if let Some(library) = library {
            command.env("HEARTH_MPI_LIBRARY", library);
        }
        command.output().expect("the launcher starts")
    }
}

type Test = (&'static str, fn(&Launcher));

const TESTS: &[Test] = &[
    ("worlds of one to four ranks keep every promise", promises),
    ("a rank holds what the plan is told, and nothing afterwards", holds),
    ("a rank that skips an operation is named by every other rank, with exit code 75", skipped),
    ("a rank that is killed ends the job", killed),
    ("a launcher without its library is told so in one sentence, with exit code 2", no_library),
];

fn run_tests() -> ExitCode {
    let required = env::var("HEARTH_REQUIRE_MPI").is_ok_and(|value| value == "1");
    let mut missing = false;
    for launcher in LAUNCHERS {
        if !launcher.is_here() {
            eprintln!("SKIPPED: {}: there is no {} here", launcher.name, launcher.command);
            missing = true;
            continue;
        }
        for (name, test) in TESTS {
            let started = Instant::now();
            test(launcher);
            println!("test {}: {name} ... ok ({:.1} s)", launcher.name, started.elapsed().as_secs_f64());
        }
    }
    if required && missing {
        eprintln!("HEARTH_REQUIRE_MPI=1: every launcher must be here");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn promises(launcher: &Launcher) {
    for ranks in 1..=4 {
        let output = launcher.run(ranks, "suite", None);
        assert!(output.status.success(), "{ranks} ranks: {}", text(&output));
        let promise = format!("{ranks} ranks: a watchdog tells");
        assert!(text(&output).contains(&promise), "the suite ran to its end: {}", text(&output));
    }
}

fn holds(launcher: &Launcher) {
    for ranks in [2, 3] {
        let output = launcher.run(ranks, "held", None);
        assert!(output.status.success(), "{ranks} ranks: {}", text(&output));
    }
}

fn skipped(launcher: &Launcher) {
    let started = Instant::now();
    let output = launcher.run(3, "skip", None);
    assert!(started.elapsed() < END, "the job ended in time");
    for rank in 0..2 {
        let diagnosis =
            format!("rank {rank} of 3: all_reduce (operation 1 of its group, 1000 elements) has lasted");
        let line = text(&output).lines().find(|line| line.contains(&diagnosis)).map(str::to_owned);
        let line = line.unwrap_or_else(|| panic!("{diagnosis}: {}", text(&output)));
        assert!(line.ends_with("rank 2 did not come"), "{line}");
    }
    assert_eq!(output.status.code(), Some(EXIT_CODE), "{}", text(&output));
}

fn killed(launcher: &Launcher) {
    let started = Instant::now();
    let output = launcher.run(3, "kill", None);
    assert!(!output.status.success(), "{}", text(&output));
    assert!(started.elapsed() < END / 2, "the launcher ended the job, not the watchdog");
}

fn no_library(launcher: &Launcher) {
    let output = launcher.run(1, "suite", Some("libnone.so.1"));
    let sentence = "no MPI library was found (libnone.so.1)";
    assert!(text(&output).contains(sentence), "{}", text(&output));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
}
