//! Finding, verifying and reading checkpoints.

use super::manifest::{FileEntry, Manifest, PieceEntry};
use super::{MANIFEST_FILE, StateFile, StateReader, pieces, reader, step_of};
use crate::Error;
use crate::config::hex;
use hearth_weights::TensorSource;
use hearth_weights::safetensors::SafetensorsSource;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Largest manifest read.
const MANIFEST_LIMIT: u64 = 64 << 20;

/// Bytes hashed at a time.
const BUFFER_BYTES: u64 = 1 << 20;

/// A checkpoint on disk.
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

/// Directories named `step-N`, newest first, and those that were to be replaced by one that never got its name. A
/// directory that does not exist holds none.
///
/// # Errors
/// [`Error::Io`] when the directory is there and cannot be read.
pub fn steps(dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(dir))?.path();
        let Some(step) = step_of(&path).filter(|_| path.is_dir()) else { continue };
        let named = super::step_path(dir, step);
        if path == named || !named.exists() {
            found.push((step, path));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

impl Checkpoint {
    /// Opens a checkpoint and checks every file in it, on all cores.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the file and what does not fit.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let checkpoint = Self::open_verified(path)?;
        let files = &checkpoint.manifest.files;
        let pieces: Vec<_> =
            files.iter().flat_map(|file| file.pieces.iter().map(move |p| (file, p))).collect();
        match pieces.par_iter().find_map_first(|(file, piece)| verify(path, file, piece).err()) {
            Some(error) => Err(error),
            None => Ok(checkpoint),
        }
    }

    /// Opens a checkpoint that another rank has just verified: only its manifest and the lengths of its files are
    /// checked here.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_verified(path: &Path) -> Result<Self, Error> {
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
            pieces::check_tiling(entry).map_err(|why| Error::damaged(path, why))?;
            check_length(path, entry)?;
        }
        Ok(Self { path: path.to_owned(), manifest })
    }

    /// Reads ranges of one file's data as if it were laid out like `wanted`, whatever layout or dtype it was written
    /// in.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the checkpoint has no such file or its header is wrong, [`Error::Foreign`] when its
    /// tensors have other names or shapes.
    pub fn reader(&self, wanted: &StateFile) -> Result<StateReader, Error> {
        self.need(&wanted.name)?;
        StateReader::open(&self.path, wanted)
    }

    /// What one file holds, in the order of its data.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the checkpoint has no such file or its header is wrong.
    pub fn state_file(&self, name: &str) -> Result<StateFile, Error> {
        self.need(name)?;
        reader::stored(&self.path, name)
    }

    fn need(&self, file: &str) -> Result<(), Error> {
        match self.manifest.files.iter().any(|entry| entry.name == file) {
            true => Ok(()),
            false => Err(Error::damaged(&self.path, format!("it has no {file}"))),
        }
    }

    /// The tensors of one file.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the checkpoint has no such file; [`Error::Weights`].
    pub fn tensors(&self, file: &str) -> Result<impl TensorSource + use<>, Error> {
        self.need(file)?;
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

fn damaged(path: &Path, entry: &FileEntry, why: impl std::fmt::Display) -> Error {
    Error::damaged(path, format!("{} {why}", entry.name))
}

fn check_length(path: &Path, entry: &FileEntry) -> Result<(), Error> {
    let meta = fs::metadata(path.join(&entry.name)).map_err(|_| damaged(path, entry, "is missing"))?;
    if meta.len() != entry.bytes {
        let why = format!("has {} bytes, checkpoint.json says {}", meta.len(), entry.bytes);
        return Err(damaged(path, entry, why));
    }
    Ok(())
}

fn verify(path: &Path, entry: &FileEntry, piece: &PieceEntry) -> Result<(), Error> {
    let hash = hash(&path.join(&entry.name), piece).map_err(|e| damaged(path, entry, e))?;
    if hash == piece.sha256 {
        return Ok(());
    }
    let (start, end) = (piece.offset, piece.offset + piece.bytes);
    Err(damaged(path, entry, format!("does not match its sha256 in bytes {start}..{end}")))
}

fn hash(path: &Path, piece: &PieceEntry) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(piece.offset))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; piece.bytes.min(BUFFER_BYTES) as usize];
    let mut left = piece.bytes;
    while left > 0 {
        let chunk = &mut buffer[..left.min(BUFFER_BYTES) as usize];
        file.read_exact(chunk)?;
        hash.update(&*chunk);
        left -= chunk.len() as u64;
    }
    Ok(hex(&hash.finalize()))
}
