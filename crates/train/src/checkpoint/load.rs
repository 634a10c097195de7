//! Finding, verifying and reading checkpoints.

use super::manifest::{FileEntry, Manifest};
use super::{MANIFEST_FILE, step_of};
use crate::Error;
use crate::config::hex;
use hearth_weights::TensorSource;
use hearth_weights::safetensors::SafetensorsSource;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Largest manifest read.
const MANIFEST_LIMIT: u64 = 64 << 20;

/// A checkpoint whose every file matched its hash when it was opened.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its directory.
    pub path: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// A directory that is named like a checkpoint and is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The directory.
    pub path: PathBuf,
    /// What does not fit.
    pub why: String,
}

/// What a directory of checkpoints holds.
#[derive(Debug)]
pub struct Search {
    /// The newest complete checkpoint.
    pub newest: Option<Checkpoint>,
    /// Newer ones that are damaged or incomplete.
    pub skipped: Vec<Skipped>,
}

/// Looks for the newest complete checkpoint in `dir`, verifying from the newest backwards.
///
/// # Errors
/// [`Error::Io`] when the directory is there and cannot be read.
pub fn search(dir: &Path) -> Result<Search, Error> {
    let mut skipped = Vec::new();
    for (_, path) in steps(dir)? {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Search { newest: Some(checkpoint), skipped }),
            Err(Error::Damaged { why, .. }) => skipped.push(Skipped { path, why }),
            Err(other) => skipped.push(Skipped { path, why: other.to_string() }),
        }
    }
    Ok(Search { newest: None, skipped })
}

/// Directories named `step-N`, newest first. A directory that does not exist holds none.
pub(super) fn steps(dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(dir))?.path();
        if let Some(step) = step_of(&path).filter(|_| path.is_dir()) {
            found.push((step, path));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

impl Checkpoint {
    /// Opens a checkpoint and checks every file in it.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the file and what does not fit.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let manifest = read_manifest(path)?;
        if step_of(path) != Some(manifest.progress.step) {
            let why = format!("its checkpoint.json says step {}", manifest.progress.step);
            return Err(Error::damaged(path, why));
        }
        let mut names = HashSet::new();
        for entry in &manifest.files {
            let plain = Path::new(&entry.name).file_name().is_some_and(|n| n == entry.name.as_str());
            if !plain || !names.insert(&entry.name) {
                return Err(Error::damaged(
                    path,
                    format!("its checkpoint.json lists a file {:?}", entry.name),
                ));
            }
            verify(path, entry)?;
        }
        Ok(Self { path: path.to_owned(), manifest })
    }

    /// The tensors of one file.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the checkpoint has no such file; [`Error::Weights`].
    pub fn tensors(&self, file: &str) -> Result<impl TensorSource + use<>, Error> {
        if !self.manifest.files.iter().any(|entry| entry.name == file) {
            return Err(Error::damaged(&self.path, format!("it has no {file}")));
        }
        Ok(SafetensorsSource::open(&self.path.join(file))?)
    }
}

fn read_manifest(path: &Path) -> Result<Manifest, Error> {
    let file = path.join(MANIFEST_FILE);
    let meta = fs::metadata(&file)
        .map_err(|_| Error::damaged(path, "it has no checkpoint.json: it was never completed"))?;
    if meta.len() > MANIFEST_LIMIT {
        let why = format!("checkpoint.json has {} bytes, the limit is {MANIFEST_LIMIT}", meta.len());
        return Err(Error::damaged(path, why));
    }
    let bytes = fs::read(&file).map_err(Error::io(&file))?;
    Manifest::decode(&bytes).map_err(|why| Error::damaged(path, why))
}

fn verify(path: &Path, entry: &FileEntry) -> Result<(), Error> {
    let damaged = |why: String| Error::damaged(path, format!("{} {why}", entry.name));
    let mut file = File::open(path.join(&entry.name)).map_err(|_| damaged("is missing".into()))?;
    let bytes = file.metadata().map_err(Error::io(path))?.len();
    if bytes != entry.bytes {
        return Err(damaged(format!("has {bytes} bytes, checkpoint.json says {}", entry.bytes)));
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    if hex(&hash.finalize()) != entry.sha256 {
        return Err(damaged("does not match its sha256".into()));
    }
    Ok(())
}
