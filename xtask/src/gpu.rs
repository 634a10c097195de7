//! One folder that checks and measures a GPU machine without Rust, CUDA toolkit or network.

use crate::{ci, nvrtc};
use anyhow::{Context, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is run there.
const SCRIPT: &str = r#"#!/bin/sh
# Checks every kernel on the card, measures, and measures PyTorch and transformers beside it where they are installed;
# results/gpu.md is for docs/gpu.md.
# Arguments go to `hearth gpu bench`: --device cuda:1, --budget 24GiB, --tiny.
set -eu
cd "$(dirname "$0")"
if [ -z "${HEARTH_NVRTC:-}" ] && [ -f nvrtc/libnvrtc.so.12 ]; then
    HEARTH_NVRTC="$PWD/nvrtc/libnvrtc.so.12"
    LD_LIBRARY_PATH="$PWD/nvrtc${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    export HEARTH_NVRTC LD_LIBRARY_PATH
fi
XDG_CACHE_HOME="${XDG_CACHE_HOME:-$PWD/cache}"
export XDG_CACHE_HOME
mkdir -p results
./hearth doctor > results/doctor.txt 2>&1 || true
./hearth gpu bench --out results "$@"
tiny=
for argument in "$@"; do
    if [ "$argument" = --tiny ]; then tiny=--tiny; fi
done
# The peers add their table; where there is no torch they say so.
python3 gpu.py $tiny --out results || echo "without the peers' table"
cat results/gpu.md
"#;

/// Builds the folder; `plain` leaves Burn's own CUDA backend out, which checks and benchmarks do not need.
pub fn run(plain: bool) -> anyhow::Result<()> {
    std::env::set_current_dir(ci::root()).context("cannot enter the repository")?;
    let target = PathBuf::from(std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_owned()));
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "--package", "hearth", "--bin", "hearth"]);
    if !plain {
        build.args(["--features", "cuda"]);
    }
    if !build.status().context("cargo cannot be started")?.success() {
        bail!("the release binary cannot be built");
    }
    let folder = target.join("gpu");
    assemble(&folder, &target.join("release/hearth"), compiler().as_deref())?;
    println!("{} is complete: copy it to the GPU machine and run ./run.sh there", folder.display());
    Ok(())
}

/// NVRTC and its parts, where it can be had: the machine there may have a driver and nothing else.
fn compiler() -> Option<PathBuf> {
    match nvrtc::library() {
        Ok(library) => Some(library),
        Err(error) => {
            println!("without NVRTC, which the GPU machine then needs: {error:#}");
            None
        }
    }
}

fn assemble(folder: &Path, binary: &Path, compiler: Option<&Path>) -> anyhow::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot clear {}", folder.display()))?;
    }
    fs::create_dir_all(folder.join("nvrtc")).with_context(|| format!("cannot make {}", folder.display()))?;
    copy(binary, &folder.join("hearth"))?;
    copy(&ci::root().join("benches/peers/gpu.py"), &folder.join("gpu.py"))?;
    let script = folder.join("run.sh");
    fs::write(&script, SCRIPT).with_context(|| format!("cannot write {}", script.display()))?;
    executable(&script)?;
    let Some(beside) = compiler.and_then(Path::parent) else { return Ok(()) };
    for entry in fs::read_dir(beside)?.flatten() {
        let name = entry.file_name();
        // The compiler and what it loads by itself; the alternatives in the package are not used.
        let text = name.to_string_lossy().into_owned();
        if text.starts_with("libnvrtc") && !text.contains(".alt.") {
            copy(&entry.path(), &folder.join("nvrtc").join(name))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

#[cfg(unix)]
fn executable(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

#[cfg(not(unix))]
fn executable(_path: &Path) -> anyhow::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_holds_what_the_script_runs() {
        let place = tempfile::tempdir().unwrap();
        let (lib, folder) = (place.path().join("lib"), place.path().join("gpu"));
        fs::create_dir(&lib).unwrap();
        for name in ["libnvrtc.so.12", "libnvrtc-builtins.so.12.9", "libnvrtc.alt.so.12", "other.so"] {
            fs::write(lib.join(name), name).unwrap();
        }
        let binary = place.path().join("binary");
        fs::write(
            &binary,
            "#!/bin/sh\n[ \"$1\" = gpu ] && echo \"$HEARTH_NVRTC $*\" > results/gpu.md; true\n",
        )
        .unwrap();
        executable(&binary).unwrap();
        for _ in 0..2 {
            assemble(&folder, &binary, Some(&lib.join("libnvrtc.so.12"))).unwrap();
        }
        assert!(folder.join("nvrtc/libnvrtc-builtins.so.12.9").is_file());
        assert!(!folder.join("nvrtc/libnvrtc.alt.so.12").exists() && !folder.join("nvrtc/other.so").exists());
        // In place of Python's: this machine may have torch.
        fs::write(folder.join("python3"), "#!/bin/sh\necho \"peers: $*\" >> results/gpu.md\n").unwrap();
        executable(&folder.join("python3")).unwrap();
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
        let mut run = Command::new(folder.join("run.sh"));
        let ran = run.arg("--tiny").env_remove("HEARTH_NVRTC").env("PATH", path).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
        let nvrtc = folder.canonicalize().unwrap().join("nvrtc/libnvrtc.so.12");
        let ours = format!("{} gpu bench --out results --tiny\n", nvrtc.display());
        assert_eq!(said, ours + "peers: gpu.py --tiny --out results\n");
    }
}
