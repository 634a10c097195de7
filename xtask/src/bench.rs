//! hearth beside its peers: runs the scripts of `benches/peers` and rewrites the table in `docs/performance.md`.

use crate::table::{self, Measured};
use crate::{ci, tools};
use anyhow::{Context, bail};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// One comparison each, in the order of the table.
const SCRIPTS: [&str; 5] = ["train", "decode", "prefill", "batch", "startup"];
/// Where the table lies.
pub const PAGE: &str = "docs/performance.md";

/// Builds the release binary, runs every script and rewrites the table. `options` go to each script as they are.
pub fn run(options: &[&str]) -> anyhow::Result<()> {
    std::env::set_current_dir(ci::root()).context("cannot enter the repository")?;
    if !tools::works("python3", &["--version"]) {
        bail!("Python 3 is needed; on Debian: apt install python3 python3-venv");
    }
    // Refused before an hour of measuring rather than after it.
    let page = fs::read_to_string(PAGE).with_context(|| format!("cannot read {PAGE}"))?;
    table::replace(&page, "")?;
    build()?;
    let conditions = conditions(options);
    let mut all = Measured::default();
    for script in SCRIPTS {
        println!("── {script}");
        match measure(script, options) {
            Ok(found) => all.append(found),
            Err(error) => all.notes.push(format!("{script}.py: {error:#}")),
        }
    }
    if all.rows.is_empty() {
        bail!("nothing could be measured: {}", all.notes.join("; "));
    }
    let text = table::render(&conditions, &all);
    println!("{text}");
    // Read again: somebody may have edited the page while this ran.
    let page = fs::read_to_string(PAGE).with_context(|| format!("cannot read {PAGE}"))?;
    fs::write(PAGE, table::replace(&page, &text)?).with_context(|| format!("cannot write {PAGE}"))
}

fn build() -> anyhow::Result<()> {
    let status = Command::new("cargo").args(["build", "--release", "--package", "hearth"]).status();
    if status.context("cargo cannot be started")?.success() {
        return Ok(());
    }
    bail!("the release binary cannot be built")
}

/// What one script found.
fn measure(script: &str, options: &[&str]) -> anyhow::Result<Measured> {
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_owned());
    let mut python = Command::new("python3");
    python.arg(format!("benches/peers/{script}.py")).arg(Path::new(&target).join("release/hearth"));
    python.args(options).arg("--json").stderr(Stdio::inherit());
    let done = python.output().context("python3 cannot be started")?;
    if !done.status.success() {
        bail!("failed: {}", done.status);
    }
    serde_json::from_slice(&done.stdout).context("printed something else than one JSON object")
}

/// Date, machine and options, as the sentence above the table.
fn conditions(options: &[&str]) -> String {
    let date = chrono::Local::now().format("%Y-%m-%d");
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().filter(|l| !l.is_empty()).unwrap_or("unknown");
    let quick = if options.contains(&"--quick") { "A quick run: rough figures. " } else { "" };
    format!("{quick}{date}, {}, {cores} cores, load average {load} at the start.", processor(&cpuinfo))
}

/// The processor's name and those of its instruction sets that kernels of either side use.
fn processor(cpuinfo: &str) -> String {
    const SETS: [&str; 9] =
        ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp"];
    let value = |names: &[&str]| {
        let line = cpuinfo.lines().find(|line| names.iter().any(|name| line.starts_with(name)));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
    };
    let name = Some(value(&["model name"])).filter(|name| !name.is_empty()).unwrap_or(std::env::consts::ARCH);
    let flags: Vec<&str> = value(&["flags", "Features"]).split_whitespace().collect();
    let sets: Vec<&str> = SETS.into_iter().filter(|set| flags.contains(set)).collect();
    if sets.is_empty() { name.to_owned() } else { format!("{name} ({})", sets.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_the_markers() {
        let page = fs::read_to_string(ci::root().join(PAGE)).unwrap();
        let replaced = table::replace(&page, "a table").unwrap();
        assert!(replaced.contains("\na table\n"), "{replaced}");
        assert_eq!(table::replace(&replaced, "a table").unwrap(), replaced, "a second time changes nothing");
    }

    #[test]
    fn every_script_is_there() {
        for script in SCRIPTS {
            assert!(ci::root().join(format!("benches/peers/{script}.py")).is_file(), "{script}");
        }
    }

    #[test]
    fn the_processor_is_named_with_the_sets_it_has() {
        let text = "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512_vnni sse\n";
        assert_eq!(processor(text), "Some CPU (avx2, fma, avx512_vnni)");
        assert_eq!(processor(""), std::env::consts::ARCH);
    }
}
