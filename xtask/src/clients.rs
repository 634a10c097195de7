//! Real clients against the server: openai-python, LangChain, lm-eval and the requests of load generators, in a virtual
//! environment in the user's cache.

use crate::{ci, tools};
use anyhow::Context;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the clients need, pinned.
const REQUIREMENTS: &str = "tests/clients/requirements.txt";
/// Set where clients that cannot be installed fail the checks instead of being skipped.
const REQUIRED: &str = "HEARTH_REQUIRE_CLIENTS";

/// The command that lets every client talk to the built binary; `None`, loudly, where they cannot be installed.
///
/// # Errors
/// If they cannot be installed and `HEARTH_REQUIRE_CLIENTS` is set.
pub fn talk() -> anyhow::Result<Option<Command>> {
    let python = match python() {
        Ok(python) => python,
        Err(error) if std::env::var_os(REQUIRED).is_none() => {
            println!("SKIPPED real clients against the server: {error:#}; {REQUIRED}=1 makes this an error");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_owned());
    let mut command = Command::new(python);
    // Nothing is written beside the scripts.
    command.args(["-B", "tests/clients/run.py"]).arg(Path::new(&target).join("release/hearth"));
    Ok(Some(command))
}

/// The interpreter of an environment that holds the clients, made on first use.
fn python() -> anyhow::Result<PathBuf> {
    let wanted = fs::read_to_string(ci::root().join(REQUIREMENTS))
        .with_context(|| format!("cannot read {REQUIREMENTS}"))?;
    let cache = tools::cache().context("no cache folder: neither XDG_CACHE_HOME nor HOME is set")?;
    // Other requirements are another environment: none is ever changed.
    let mut hasher = DefaultHasher::new();
    wanted.hash(&mut hasher);
    let folder = cache.join("hearth").join(format!("clients-{:016x}", hasher.finish()));
    let (python, complete) = (folder.join("bin/python"), folder.join("complete"));
    if !complete.is_file() {
        install(&folder, &python).context("the clients cannot be installed from PyPI")?;
        fs::write(&complete, "").with_context(|| format!("cannot write {}", complete.display()))?;
    }
    Ok(python)
}

/// Environments cannot be moved, so this one is made in its place and said to be complete afterwards.
fn install(folder: &Path, python: &Path) -> anyhow::Result<()> {
    println!("installing clients from PyPI (200 MB) …");
    let venv = ["-m", "venv", "--clear"];
    tools::succeed(Command::new("python3").args(venv).arg(folder))?;
    // A few of what lm-eval needs come as sources only, of pure Python.
    let options = ["--quiet", "--prefer-binary", "--retries", "2", "--timeout", "20"];
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check"]).args(options);
    tools::succeed(pip.args(["--requirement", REQUIREMENTS]).stdin(Stdio::null()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_client_is_pinned() {
        let wanted = fs::read_to_string(ci::root().join(REQUIREMENTS)).unwrap();
        let lines = || wanted.lines().filter(|line| !line.starts_with('#'));
        assert!(lines().all(|line| line.split("==").count() == 2), "{wanted}");
        for client in ["openai", "langchain-openai", "lm_eval", "aiohttp"] {
            assert!(lines().any(|line| line.starts_with(&format!("{client}=="))), "{client}");
        }
    }
}
