//! safetensors files: memory-mapped, one tensor at a time; and a streaming writer.
//!
//! ```text
//! u64 header length | JSON header, space-padded to 8 | tensor bytes, little-endian, row-major
//! ```

use crate::mapped::{Mapped, read_json};
use crate::quant::{self, FormatRef};
use crate::source::{TensorMeta, TensorSource, missing, position};
use crate::{Error, staged};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Largest index file read: room for a few hundred thousand names.
const INDEX_LIMIT: u64 = 256 << 20;

/// One safetensors file, or the shards an index names.
pub struct SafetensorsSource {
    origin: PathBuf,
    files: Vec<Mapped>,
    metas: Vec<TensorMeta>,
    /// Beside `metas`: file number and byte range in that file.
    places: Vec<(usize, Range<usize>)>,
    /// Tensors in formats hearth does not compute with, by name.
    unread: BTreeMap<String, String>,
}

impl SafetensorsSource {
    /// Opens a single file.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the header is truncated, lies about a length, or leaves a hole.
    pub fn open(path: &Path) -> Result<SafetensorsSource, Error> {
        let mut source = SafetensorsSource::empty(path);
        source.add_file(path, |_| true)?;
        source.sort();
        Ok(source)
    }

    /// Opens `model.safetensors.index.json` and every shard it names.
    ///
    /// # Errors
    /// As [`SafetensorsSource::open`], and [`Error::MissingTensor`] for a tensor its shard lacks.
    pub fn open_index(index: &Path) -> Result<SafetensorsSource, Error> {
        let shards = read_index(index)?;
        let mut source = SafetensorsSource::empty(index.parent().unwrap_or(Path::new("")));
        for (shard, names) in &shards {
            source.add_file(shard, |name| names.contains(name))?;
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

    fn empty(origin: &Path) -> SafetensorsSource {
        let origin = origin.to_owned();
        SafetensorsSource { origin, files: vec![], metas: vec![], places: vec![], unread: BTreeMap::new() }
    }

    fn add_file(&mut self, path: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
        let mapped = Mapped::open(path)?;
        let (header_len, header) = SafeTensors::read_metadata(mapped.bytes())
            .map_err(|e| Error::damaged(path, format!("its safetensors header is wrong: {e}")))?;
        let data_start = header_len + 8;
        for (name, info) in header.tensors() {
            if !wanted(&name) {
                continue;
            }
            let Some(format) = format_of(info.dtype) else {
                self.unread.insert(name, format!("{:?}", info.dtype));
                continue;
            };
            let (start, end) = info.data_offsets;
            self.metas.push(TensorMeta { name, shape: info.shape.clone(), format });
            self.places.push((self.files.len(), data_start + start..data_start + end));
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
                format!("it is stored as {dtype}, hearth reads F32, F16 and BF16: convert it first"),
            ),
            None => missing(&self.origin, &self.metas, name),
        }
    }
}

impl TensorSource for SafetensorsSource {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let at = position(&self.metas, name).ok_or_else(|| self.refusal(name))?;
        let (file, range) = &self.places[at];
        Ok(Cow::Borrowed(&self.files[*file].bytes()[range.clone()]))
    }

    fn release(&self, name: &str) {
        if let Some((file, range)) = position(&self.metas, name).map(|at| &self.places[at]) {
            self.files[*file].release(range.clone());
        }
    }

    fn origin(&self) -> &Path {
        &self.origin
    }

    fn meta(&self, name: &str) -> Result<&TensorMeta, Error> {
        position(&self.metas, name).map(|i| &self.metas[i]).ok_or_else(|| self.refusal(name))
    }
}

/// Reads a shard index: which tensors are in which file beside it.
pub(crate) fn read_index(index: &Path) -> Result<BTreeMap<PathBuf, BTreeSet<String>>, Error> {
    let json = read_json(index, INDEX_LIMIT)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::damaged(index, "it has no weight_map object"))?;
    let directory = index.parent().unwrap_or(Path::new(""));
    let mut shards: BTreeMap<PathBuf, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|f| is_plain_name(f)).ok_or_else(|| {
            Error::damaged(index, format!("weight_map gives {file} for {tensor}, not a file name"))
        })?;
        shards.entry(directory.join(file)).or_default().insert(tensor.clone());
    }
    if shards.is_empty() {
        return Err(Error::damaged(index, "its weight_map is empty"));
    }
    if let Some(shard) = shards.keys().find(|s| !s.exists()) {
        return Err(Error::damaged(index, format!("it names {}, which is not there", shard.display())));
    }
    Ok(shards)
}

/// A name that stays in its directory.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

fn format_of(dtype: Dtype) -> Option<FormatRef> {
    match dtype {
        Dtype::F32 => Some(quant::F32),
        Dtype::F16 => Some(quant::F16),
        Dtype::BF16 => Some(quant::BF16),
        _ => None,
    }
}

/// Writes one safetensors file tensor by tensor, in any order. The file appears under its name only when
/// [`SafetensorsWriter::finish`] succeeds.
pub struct SafetensorsWriter {
    staged: staged::StagedFile,
    body: Body,
}

impl SafetensorsWriter {
    /// Starts a file that will hold exactly `plan`.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Io`], or [`Error::Tensor`] for a format other than f32, f16, bf16.
    pub fn create(
        path: &Path,
        plan: &[TensorMeta],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, Error> {
        let staged = staged::StagedFile::create(path)?;
        let body = Body::create(staged.path(), plan, metadata)?;
        Ok(SafetensorsWriter { staged, body })
    }

    /// Writes one tensor's bytes, in the format the plan gives.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is not planned, already written, or has another length.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.body.tensor(name, bytes)
    }

    /// Makes the file durable and visible.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] for a planned tensor never written.
    pub fn finish(self) -> Result<(), Error> {
        self.body.finish()?;
        self.staged.commit()
    }
}

/// The file being written, wherever it is staged.
pub(crate) struct Body {
    path: PathBuf,
    file: File,
    /// Planned position by name; taken when written.
    open: BTreeMap<String, Range<u64>>,
}

impl Body {
    pub(crate) fn create(
        path: &Path,
        plan: &[TensorMeta],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Body, Error> {
        let (header, open) = layout(path, plan, metadata)?;
        let mut file = File::create(path).map_err(Error::io(path))?;
        file.write_all(&header).map_err(Error::io(path))?;
        Ok(Body { path: path.to_owned(), file, open })
    }

    pub(crate) fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let range = self
            .open
            .remove(name)
            .ok_or_else(|| Error::tensor(&self.path, name, "it is not planned, or written twice"))?;
        if bytes.len() as u64 != range.end - range.start {
            let planned = range.end - range.start;
            let what = format!("{} bytes were given, {planned} are planned", bytes.len());
            return Err(Error::tensor(&self.path, name, what));
        }
        self.file.seek(SeekFrom::Start(range.start)).map_err(Error::io(&self.path))?;
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    pub(crate) fn finish(self) -> Result<(), Error> {
        if let Some(name) = self.open.keys().next() {
            return Err(Error::MissingTensor { path: self.path, tensor: name.clone(), hint: String::new() });
        }
        self.file.sync_all().map_err(Error::io(&self.path))
    }
}

/// Header bytes and where in the file each tensor goes. Wide numbers come first so that all stay aligned.
#[allow(clippy::type_complexity)]
fn layout(
    path: &Path,
    plan: &[TensorMeta],
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, BTreeMap<String, Range<u64>>), Error> {
    let mut order: Vec<&TensorMeta> = plan.iter().collect();
    order.sort_by(|a, b| (b.format.block_bytes(), &a.name).cmp(&(a.format.block_bytes(), &b.name)));
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut ranges = BTreeMap::new();
    let mut at = 0u64;
    for meta in order {
        let dtype = dtype_of(meta.format).ok_or_else(|| {
            let what = format!("safetensors files hold f32, f16 and bf16, not {}", meta.format.name());
            Error::tensor(path, &meta.name, what)
        })?;
        let end = at + meta.byte_len() as u64;
        header.insert(
            meta.name.clone(),
            json!({"dtype": dtype, "shape": meta.shape, "data_offsets": [at, end]}),
        );
        ranges.insert(meta.name.clone(), at..end);
        at = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let start = 8 + text.len() as u64;
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    for range in ranges.values_mut() {
        *range = range.start + start..range.end + start;
    }
    Ok((bytes, ranges))
}

fn dtype_of(format: FormatRef) -> Option<&'static str> {
    match format.name() {
        "f32" => Some("F32"),
        "f16" => Some("F16"),
        "bf16" => Some("BF16"),
        _ => None,
    }
}
