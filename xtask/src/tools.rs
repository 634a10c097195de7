//! Programs the checks need, and one sentence each on how to get them.

use anyhow::{Context, bail};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Whether `program arguments` runs and succeeds; says nothing.
pub fn works(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|s| s.success())
}

/// Refuses to start on a machine that lacks something.
pub fn require() -> anyhow::Result<()> {
    let needed: [(&str, &[&str], &str); 5] = [
        ("cc", &["--version"], "a C compiler is needed; on Debian: apt install build-essential"),
        ("c++", &["--version"], "a C++ compiler is needed; on Debian: apt install build-essential"),
        ("cargo", &["fmt", "--version"], "rustfmt is needed; get it with: rustup component add rustfmt"),
        ("cargo", &["clippy", "--version"], "clippy is needed; get it with: rustup component add clippy"),
        ("python3", &["--version"], "Python 3 is needed; on Debian: apt install python3 python3-pip"),
    ];
    for (program, arguments, sentence) in needed {
        if !works(program, arguments) {
            bail!("{sentence}");
        }
    }
    Ok(())
}

/// Makes sure cargo-nextest is there; `false` when it is not and cannot be had, so that `cargo test` must do.
pub fn nextest() -> bool {
    if works("cargo", &["nextest", "--version"]) {
        return true;
    }
    println!("installing cargo-nextest …");
    // Outside the workspace's target directory and profile: it is not ours.
    let status = Command::new("cargo").args(["install", "cargo-nextest", "--locked"]).status();
    let installed = status.is_ok_and(|s| s.success()) && works("cargo", &["nextest", "--version"]);
    if !installed {
        println!("cargo-nextest could not be installed; using cargo test instead");
    }
    installed
}

/// Makes sure that Open MPI is there, and the tools that make two hosts of one machine; `false` when they are not and
/// cannot be had, so that the tests which need them are skipped, loudly.
pub fn mpi() -> bool {
    let there = || works("mpirun", &["--version"]) && works("ip", &["-V"]);
    if there() {
        return true;
    }
    println!("installing Open MPI …");
    let packages = ["openmpi-bin", "libopenmpi-dev", "iproute2"];
    let install = [&["install", "-y", "--no-install-recommends"], packages.as_slice()].concat();
    let apt = |arguments: &[&str]| {
        let status =
            Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(arguments).status();
        status.is_ok_and(|s| s.success())
    };
    let installed = (apt(&install) || apt(&["update"]) && apt(&install)) && there();
    if !installed {
        println!(
            "SKIPPED tests under MPI: there is no mpirun; on Debian: apt install {}",
            packages.join(" ")
        );
    }
    installed
}

/// The user's folder for what can be had again.
pub fn cache() -> Option<PathBuf> {
    let named = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))
}

/// Runs a command of Python to its end, silently; its last line of complaint is the error.
pub fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().context("python3 cannot be started")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    bail!(
        "{}",
        said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("python3 failed without a word").trim()
    )
}
