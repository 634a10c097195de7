//! Writing checkpoints and removing old ones.

use super::manifest::{FileEntry, Manifest, ModelIdentity, Progress};
use super::{Checkpoint, Files, MANIFEST_FILE, load, step_path};
use crate::Error;
use crate::config::{TrainConfig, hex};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Everything a checkpoint holds, borrowed from the run.
pub struct Snapshot<'a> {
    /// Where the run stands.
    pub progress: Progress,
    /// What it was told.
    pub config: &'a TrainConfig,
    /// What it trains.
    pub model: ModelIdentity,
    /// Its tensors.
    pub shards: Vec<Shard<'a>>,
    /// Files put beside the tensors so that others can open the directory.
    pub companions: &'a [Companion],
}

/// One safetensors file of f32 tensors.
pub struct Shard<'a> {
    /// File name.
    pub file: &'static str,
    /// Name, shape and values.
    pub tensors: Vec<(String, &'a [usize], &'a [f32])>,
}

/// A small file copied into every checkpoint: `config.json`, `tokenizer.json`, a chat template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Companion {
    /// Plain file name.
    pub name: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// Writes `dir/step-N`. When it returns an error, nothing under a checkpoint's name has changed.
///
/// # Errors
/// [`Error::NotSaved`] with what the system said.
pub fn save(files: &dyn Files, dir: &Path, snapshot: &Snapshot<'_>) -> Result<PathBuf, Error> {
    let step = snapshot.progress.step;
    let path = step_path(dir, step);
    let partial = dir.join(format!(".step-{step}.partial"));
    write_all(files, dir, &partial, snapshot)
        .and_then(|manifest| reveal(files, dir, &partial, &path, &manifest))
        .map_err(|source| {
            // Best effort: the partial directory is never read, and the next save of this step replaces it.
            let _ = files.remove_dir(&partial);
            Error::NotSaved { path: path.clone(), source }
        })?;
    Ok(path)
}

fn write_all(files: &dyn Files, dir: &Path, partial: &Path, snapshot: &Snapshot<'_>) -> io::Result<Manifest> {
    files.create_dir(dir)?;
    if partial.exists() {
        files.remove_dir(partial)?;
    }
    files.create_dir(partial)?;
    let mut entries = Vec::new();
    for shard in &snapshot.shards {
        entries.push(write_file(files, partial, shard.file, |out| write_shard(out, shard))?);
    }
    for companion in snapshot.companions {
        entries.push(write_file(files, partial, &companion.name, |out| out.write_all(&companion.bytes))?);
    }
    let manifest = Manifest::new(snapshot.progress, snapshot.config, snapshot.model.clone(), entries);
    write_file(files, partial, MANIFEST_FILE, |out| out.write_all(&manifest.encode()))?;
    files.sync(partial)?;
    Ok(manifest)
}

/// Gives a complete directory its name.
fn reveal(files: &dyn Files, dir: &Path, partial: &Path, path: &Path, manifest: &Manifest) -> io::Result<()> {
    if Checkpoint::open(path).is_ok_and(|there| there.manifest == *manifest) {
        // Saved before; replacing it would be the only moment at which it could be lost.
        return files.remove_dir(partial);
    }
    // Only a damaged checkpoint can be in the way: a run goes on from the newest complete one.
    let replaced = path.exists().then(|| partial.with_extension("replaced"));
    if let Some(replaced) = &replaced {
        if replaced.exists() {
            files.remove_dir(replaced)?;
        }
        files.rename(path, replaced)?;
    }
    files.rename(partial, path)?;
    files.sync(dir)?;
    if let Some(replaced) = &replaced {
        files.remove_dir(replaced)?;
    }
    Ok(())
}

fn write_file(
    files: &dyn Files,
    dir: &Path,
    name: &str,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<FileEntry> {
    let path = dir.join(name);
    let mut out = Hashed { inner: files.create(&path)?, hash: Sha256::new(), bytes: 0 };
    write(&mut out)?;
    out.flush()?;
    files.sync(&path)?;
    Ok(FileEntry { name: name.into(), bytes: out.bytes, sha256: hex(&out.hash.finalize()) })
}

/// Hashes and counts what passes through.
struct Hashed {
    inner: Box<dyn Write>,
    hash: Sha256,
    bytes: u64,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A safetensors file: header length, JSON header padded to 8 bytes, values.
fn write_shard(out: &mut dyn Write, shard: &Shard<'_>) -> io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0;
    for (name, shape, values) in &shard.tensors {
        let end = offset + size_of_val(*values);
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [offset, end] });
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&Value::Object(header)).expect("a JSON map serialises");
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (_, _, values) in &shard.tensors {
        write_values(out, values)?;
    }
    Ok(())
}

/// f32, little-endian, a few at a time.
fn write_values(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    if cfg!(target_endian = "little") {
        return out.write_all(bytemuck::cast_slice(values));
    }
    for chunk in values.chunks(1 << 14) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// Removes what saves that were killed left behind in `dir`.
///
/// # Errors
/// [`Error::Io`].
pub fn sweep(files: &dyn Files, dir: &Path) -> Result<(), Error> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".step-") && (name.ends_with(".partial") || name.ends_with(".replaced")) {
            files.remove_dir(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// Removes old checkpoints so that the newest `keep` (0 = all) remain, and in any case the newest that verifies: when
/// newer ones are damaged it stays too, and when none verifies nothing is removed.
///
/// # Errors
/// [`Error::Io`].
pub fn prune(files: &dyn Files, dir: &Path, keep: usize) -> Result<(), Error> {
    let paths = load::steps(dir)?;
    if keep == 0 || paths.len() <= keep {
        return Ok(());
    }
    let Some(verified) = paths.iter().position(|(_, path)| Checkpoint::open(path).is_ok()) else {
        return Ok(());
    };
    for (_, path) in paths.into_iter().skip(keep.max(verified + 1)) {
        files.remove_dir(&path).map_err(Error::io(&path))?;
    }
    Ok(())
}
