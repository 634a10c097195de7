//! Writing a checkpoint of one rank at once.

use super::manifest::{Facts, FileEntry, Manifest, ModelIdentity, Progress};
use super::reveal::reveal;
use super::{Companion, Files, MANIFEST_FILE, partial_path, step_path};
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

/// Writes `dir/step-N`. When it returns an error, nothing under a checkpoint's name has changed.
///
/// # Errors
/// [`Error::NotSaved`] with what the system said.
pub fn save(files: &dyn Files, dir: &Path, snapshot: &Snapshot<'_>) -> Result<PathBuf, Error> {
    let step = snapshot.progress.step;
    let path = step_path(dir, step);
    let partial = partial_path(dir, step);
    write_all(files, dir, &partial, snapshot)
        .and_then(|manifest| reveal(files, dir, &partial, &manifest))
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
    let (progress, config, model) = (snapshot.progress, snapshot.config, snapshot.model.clone());
    let manifest = Manifest::new(Facts { progress, config, model, world: 1, stage: 0 }, entries);
    write_file(files, partial, MANIFEST_FILE, |out| out.write_all(&manifest.encode()))?;
    files.sync(partial)?;
    Ok(manifest)
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
    Ok(FileEntry::whole(name, out.bytes, hex(&out.hash.finalize())))
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
