//! A checkpoint of a full fine-tune as a Hugging Face directory, in any float dtype and in shards.
//!
//! An export is the same state in another layout: what is written is read in that layout, [`CHUNK_BYTES`] at a time.

use super::saver::CHUNK_BYTES;
use super::{Checkpoint, Files, MODEL_FILE, StateDtype, StateFile, StateReader};
use crate::Error;
use serde_json::{Map, Value, json};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Writes the weights of `checkpoint` in `dtype`, in files of at most `max_shard_bytes` unless one tensor is larger,
/// and everything beside them that makes them a model. The directory appears under its name when it is complete.
/// `progress` hears of bytes written, and of how many there will be.
///
/// # Errors
/// A destination that exists, [`Error::Damaged`], [`Error::Io`].
pub fn export(
    files: &dyn Files,
    checkpoint: &Checkpoint,
    destination: &Path,
    dtype: StateDtype,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    if fs::symlink_metadata(destination).is_ok() {
        return Err(hearth_weights::Error::Exists { path: destination.to_owned() }.into());
    }
    let (parent, staged) = stage(destination)?;
    let mut wanted = checkpoint.state_file(MODEL_FILE)?;
    for tensor in &mut wanted.tensors {
        tensor.dtype = dtype;
    }
    let export = Export { files, staged: &staged, reader: checkpoint.reader(&wanted)?, written: 0, progress };
    let written = files
        .create_dir(&staged)
        .map_err(Error::io(&staged))
        .and_then(|()| export.write(checkpoint, dtype, &shards(&wanted, max_shard_bytes)))
        .and_then(|()| reveal(files, &staged, destination, &parent).map_err(Error::io(destination)));
    if written.is_err() {
        // Best effort: nobody reads it under this name.
        let _ = files.remove_dir(&staged);
    }
    written
}

/// The directory `destination` is to stand in, and the one to fill before it gets its name.
fn stage(destination: &Path) -> Result<(PathBuf, PathBuf), Error> {
    let Some(name) = destination.file_name() else {
        let why = "it is not a name for a directory to create";
        return Err(Error::io(destination)(io::Error::new(io::ErrorKind::InvalidInput, why)));
    };
    let parent = destination.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let staged = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
    Ok((parent.to_owned(), staged))
}

fn reveal(files: &dyn Files, staged: &Path, destination: &Path, parent: &Path) -> io::Result<()> {
    files.sync(staged)?;
    files.rename(staged, destination)?;
    files.sync(parent)
}

/// Cuts the tensors, in order, where a file would grow past the limit.
fn shards(all: &StateFile, max_shard_bytes: u64) -> Vec<StateFile> {
    let mut shards: Vec<StateFile> = Vec::new();
    for tensor in &all.tensors {
        match shards.last_mut() {
            Some(last) if last.data_bytes() + tensor.bytes() <= max_shard_bytes => {
                last.tensors.push(tensor.clone());
            }
            _ => shards.push(StateFile { name: String::new(), tensors: vec![tensor.clone()] }),
        }
    }
    let count = shards.len();
    for (number, shard) in shards.iter_mut().enumerate() {
        shard.name = match count {
            1 => MODEL_FILE.into(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
    }
    shards
}

/// An export under way.
struct Export<'a> {
    files: &'a dyn Files,
    staged: &'a Path,
    reader: StateReader,
    written: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Export<'_> {
    fn write(
        mut self,
        checkpoint: &Checkpoint,
        dtype: StateDtype,
        shards: &[StateFile],
    ) -> Result<(), Error> {
        for shard in shards {
            self.shard(shard)?;
        }
        if shards.len() > 1 {
            self.file("model.safetensors.index.json", &index(shards))?;
        }
        for entry in &checkpoint.manifest.files {
            if entry.name.ends_with(".safetensors") {
                continue;
            }
            let path = checkpoint.path.join(&entry.name);
            let bytes = fs::read(&path).map_err(Error::io(&path))?;
            let bytes = if entry.name == "config.json" { with_dtype(&path, &bytes, dtype)? } else { bytes };
            self.file(&entry.name, &bytes)?;
        }
        Ok(())
    }

    /// Writes the next tensors.
    fn shard(&mut self, shard: &StateFile) -> Result<(), Error> {
        let path = self.staged.join(&shard.name);
        let mut out = self.files.create(&path).map_err(Error::io(&path))?;
        out.write_all(&shard.header()).map_err(Error::io(&path))?;
        let (mut left, total) = (shard.data_bytes(), self.reader.len());
        let mut buffer = vec![0; left.min(CHUNK_BYTES) as usize];
        while left > 0 {
            let chunk = &mut buffer[..left.min(CHUNK_BYTES) as usize];
            self.reader.read(self.written, chunk)?;
            out.write_all(chunk).map_err(Error::io(&path))?;
            self.written += chunk.len() as u64;
            left -= chunk.len() as u64;
            (self.progress)(self.written, total);
        }
        self.close(out, &path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.staged.join(name);
        let mut out = self.files.create(&path).map_err(Error::io(&path))?;
        out.write_all(bytes).map_err(Error::io(&path))?;
        self.close(out, &path)
    }

    fn close(&self, mut out: Box<dyn Write>, path: &Path) -> Result<(), Error> {
        out.flush().and_then(|()| self.files.sync(path)).map_err(Error::io(path))
    }
}

/// `model.safetensors.index.json`.
fn index(shards: &[StateFile]) -> Vec<u8> {
    let place = |shard: &StateFile| {
        let name = Value::from(shard.name.as_str());
        shard.tensors.iter().map(move |tensor| (tensor.name.clone(), name.clone())).collect::<Vec<_>>()
    };
    let weight_map: Map<String, Value> = shards.iter().flat_map(place).collect();
    let total: u64 = shards.iter().map(StateFile::data_bytes).sum();
    format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": weight_map})).into_bytes()
}

/// `config.json` with the dtype the weights are exported in. transformers 5 calls it dtype, 4 torch_dtype.
fn with_dtype(path: &Path, config: &[u8], dtype: StateDtype) -> Result<Vec<u8>, Error> {
    let mut config: Map<String, Value> =
        serde_json::from_slice(config).map_err(|e| Error::io(path)(io::Error::from(e)))?;
    let name = match dtype {
        StateDtype::F32 => "float32",
        StateDtype::Bf16 => "bfloat16",
        StateDtype::F16 => "float16",
    };
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.into(), name.into());
    Ok(format!("{:#}\n", Value::Object(config)).into_bytes())
}
