//! PyTorch `.bin` files: a zip of `data.pkl` and one `data/<key>` per storage, written by `torch.save`.
//!
//! The pickle is read by a restricted machine (`pickle`) that knows tensors and containers and nothing else:
//! it builds a table, it never calls anything.

mod pickle;

use crate::Error;
use crate::mapped::Mapped;
use crate::quant::{self, FormatRef};
use crate::safetensors::read_index;
use crate::source::{TensorMeta, TensorSource, missing, position};
use pickle::{Dtype, Tensor};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One `.bin` file, or the shards an index names.
pub struct TorchBinSource {
    origin: PathBuf,
    files: Vec<Mapped>,
    metas: Vec<TensorMeta>,
    /// Beside `metas`.
    places: Vec<Place>,
    /// Tensors in formats hearth does not compute with, by name.
    unread: BTreeMap<String, &'static str>,
}

/// A view into a storage.
struct Place {
    file: usize,
    /// The storage's bytes in the file.
    storage: Range<usize>,
    /// First element, in elements of the storage.
    offset: usize,
    /// Elements between neighbours along each dimension.
    strides: Vec<usize>,
}

impl TorchBinSource {
    /// Opens a single file.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the archive or its pickle is truncated or lies; [`Error::Unsupported`] when the
    /// pickle asks for anything but tensors, or the file is older than PyTorch 1.6.
    pub fn open(path: &Path) -> Result<TorchBinSource, Error> {
        let mut source = TorchBinSource::empty(path);
        source.add_file(path, None)?;
        source.sort();
        Ok(source)
    }

    /// Opens `pytorch_model.bin.index.json` and every shard it names.
    ///
    /// # Errors
    /// As [`TorchBinSource::open`], and [`Error::MissingTensor`] for a tensor its shard lacks.
    pub fn open_index(index: &Path) -> Result<TorchBinSource, Error> {
        let shards = read_index(index)?;
        let mut source = TorchBinSource::empty(index.parent().unwrap_or(Path::new("")));
        for (shard, names) in &shards {
            source.add_file(shard, Some(names))?;
        }
        source.sort();
        for (shard, names) in &shards {
            for name in names {
                if position(&source.metas, name).is_none() && !source.unread.contains_key(name) {
                    return Err(missing(shard, &source.metas, name));
                }
            }
        }
        Ok(source)
    }

    fn empty(origin: &Path) -> TorchBinSource {
        let origin = origin.to_owned();
        TorchBinSource { origin, files: vec![], metas: vec![], places: vec![], unread: BTreeMap::new() }
    }

    fn add_file(&mut self, path: &Path, wanted: Option<&BTreeSet<String>>) -> Result<(), Error> {
        let mapped = Mapped::open(path)?;
        let entries = archive_entries(path, mapped.bytes())?;
        let tensors = pickle::state_dict(path, &mapped.bytes()[entries.pickle.clone()])?;
        for (name, tensor) in tensors {
            if wanted.is_some_and(|names| !names.contains(&name)) {
                continue;
            }
            let Dtype::Read(format) = tensor.dtype else {
                self.unread.insert(name, tensor.dtype.name());
                continue;
            };
            let storage = entries.storages.get(&tensor.key).cloned().ok_or_else(|| {
                Error::tensor(path, &name, format!("its storage data/{} is not in the archive", tensor.key))
            })?;
            check_view(path, &name, &tensor, format, storage.len())?;
            let Tensor { offset, shape, strides, .. } = tensor;
            self.metas.push(TensorMeta { name, shape, format });
            self.places.push(Place { file: self.files.len(), storage, offset, strides });
        }
        self.files.push(mapped);
        Ok(())
    }

    fn sort(&mut self) {
        let mut table: Vec<_> = self.metas.drain(..).zip(self.places.drain(..)).collect();
        table.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        (self.metas, self.places) = table.into_iter().unzip();
    }

    fn refusal(&self, name: &str) -> Error {
        match self.unread.get(name) {
            Some(dtype) => Error::tensor(
                &self.origin,
                name,
                format!(
                    "it is stored as {dtype}, hearth reads float32, float16 and bfloat16: convert it first"
                ),
            ),
            None => missing(&self.origin, &self.metas, name),
        }
    }
}

impl TensorSource for TorchBinSource {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let at = position(&self.metas, name).ok_or_else(|| self.refusal(name))?;
        let (meta, place) = (&self.metas[at], &self.places[at]);
        let storage = &self.files[place.file].bytes()[place.storage.clone()];
        let width = meta.format.block_bytes();
        if place.strides == contiguous(&meta.shape) {
            let start = place.offset * width;
            return Ok(Cow::Borrowed(&storage[start..start + meta.byte_len()]));
        }
        let mut out = Vec::with_capacity(meta.byte_len());
        gather(storage, width, place.offset, &meta.shape, &place.strides, &mut out);
        Ok(Cow::Owned(out))
    }

    fn release(&self, name: &str) {
        if let Some(place) = position(&self.metas, name).map(|at| &self.places[at]) {
            self.files[place.file].release(place.storage.clone());
        }
    }

    fn origin(&self) -> &Path {
        &self.origin
    }

    fn meta(&self, name: &str) -> Result<&TensorMeta, Error> {
        position(&self.metas, name).map(|i| &self.metas[i]).ok_or_else(|| self.refusal(name))
    }
}

/// Copies a strided view in row-major order. Depth is the number of dimensions, at most [`pickle::MAX_DIMS`].
fn gather(bytes: &[u8], width: usize, at: usize, shape: &[usize], strides: &[usize], out: &mut Vec<u8>) {
    match (shape, strides) {
        ([len, shape @ ..], [stride, strides @ ..]) => {
            for i in 0..*len {
                gather(bytes, width, at + i * stride, shape, strides, out);
            }
        }
        _ => out.extend_from_slice(&bytes[at * width..][..width]),
    }
}

/// Strides of a row-major tensor. Dimensions of one element count as any other.
fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

/// The view must lie inside its storage and not be larger than it.
fn check_view(
    path: &Path,
    name: &str,
    tensor: &Tensor,
    format: FormatRef,
    storage_bytes: usize,
) -> Result<(), Error> {
    let lies = |what: String| Err(Error::tensor(path, name, what));
    let Some(bytes) = quant::byte_len(format, &tensor.shape) else {
        return lies(format!("its shape {:?} overflows", tensor.shape));
    };
    if bytes > storage_bytes {
        return lies(format!(
            "shape {:?} takes {bytes} bytes, its storage has {storage_bytes}",
            tensor.shape
        ));
    }
    if bytes == 0 {
        return lies(format!("its shape {:?} has a 0", tensor.shape));
    }
    let reach = tensor.shape.iter().zip(&tensor.strides).try_fold(tensor.offset, |at, (len, stride)| {
        (len - 1).checked_mul(*stride).and_then(|step| at.checked_add(step))
    });
    let end = reach.and_then(|last| last.checked_add(1)?.checked_mul(format.block_bytes()));
    match end {
        Some(end) if end <= storage_bytes => Ok(()),
        _ => lies(format!(
            "offset {}, shape {:?} and strides {:?} reach past its storage of {storage_bytes} bytes",
            tensor.offset, tensor.shape, tensor.strides
        )),
    }
}

/// Where things are in the file.
struct Entries {
    pickle: Range<usize>,
    storages: HashMap<String, Range<usize>>,
}

fn archive_entries(path: &Path, bytes: &[u8]) -> Result<Entries, Error> {
    if !bytes.starts_with(b"PK") {
        return Err(not_an_archive(path, bytes));
    }
    let wrong = |e: zip::result::ZipError| Error::damaged(path, format!("its zip archive is wrong: {e}"));
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(wrong)?;
    let mut all = HashMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(wrong)?;
        let name = entry.name().map_err(wrong)?.into_owned();
        if entry.is_dir() {
            continue;
        }
        if entry.compression() != zip::CompressionMethod::Stored || entry.encrypted() {
            let what = format!("{name} in it is compressed or encrypted; torch.save writes neither");
            return Err(Error::unsupported(path, what));
        }
        let start = entry.data_start().and_then(|s| usize::try_from(s).ok());
        let range = start.and_then(|s| Some(s..s.checked_add(usize::try_from(entry.size()).ok()?)?));
        let range = range.filter(|r| r.end <= bytes.len()).ok_or_else(|| {
            Error::damaged(path, format!("{name} reaches past the end of the file ({} bytes)", bytes.len()))
        })?;
        all.insert(name, range);
    }
    let root =
        all.keys().find_map(|name| name.strip_suffix("/data.pkl")).map(str::to_owned).ok_or_else(|| {
            Error::unsupported(path, "it is a zip archive without data.pkl, not a PyTorch file")
        })?;
    if all.get(&format!("{root}/byteorder")).is_some_and(|r| &bytes[r.clone()] == b"big") {
        return Err(Error::unsupported(path, "it was written on a big-endian machine"));
    }
    let prefix = format!("{root}/data/");
    let pickle = all[&format!("{root}/data.pkl")].clone();
    let storages =
        all.into_iter().filter_map(|(n, r)| Some((n.strip_prefix(&prefix)?.to_owned(), r))).collect();
    Ok(Entries { pickle, storages })
}

fn not_an_archive(path: &Path, bytes: &[u8]) -> Error {
    if bytes.starts_with(b"version https://git-lfs") {
        return Error::unsupported(path, "it is a Git LFS pointer, not the file: run git lfs pull");
    }
    if bytes.first() == Some(&0x80) {
        let what = "it was saved before PyTorch 1.6; load and save it again with torch, or convert it to safetensors";
        return Error::unsupported(path, what);
    }
    Error::damaged(path, "it does not start as a PyTorch file does")
}
