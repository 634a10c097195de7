//! GGUF files that llama.cpp reads: version 3, one tensor in memory at a time.

use super::rows::Change;
use crate::config::ModelConfig;
use crate::key_map;
use crate::source::{GgufVocabulary, TensorMeta};
use crate::staged::StagedFile;
use crate::{Error, quant};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Tensor bytes start at multiples of this.
const ALIGNMENT: u64 = 32;

/// A metadata value to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum WriteValue {
    /// Unsigned number.
    U32(u32),
    /// Number.
    F32(f32),
    /// Truth value.
    Bool(bool),
    /// UTF-8.
    String(String),
    /// Array of strings.
    Strings(Vec<String>),
    /// Array of numbers.
    Floats(Vec<f32>),
    /// Array of whole numbers.
    Ints(Vec<i32>),
}

/// What a GGUF file says beside its tensors.
pub struct GgufHeader<'a> {
    /// `general.name`.
    pub name: &'a str,
    /// Shape and constants.
    pub config: &'a ModelConfig,
    /// Vocabulary; without one llama.cpp can load the file only with `--vocab` of another.
    pub vocabulary: Option<&'a GgufVocabulary>,
    /// Jinja chat template.
    pub chat_template: Option<&'a str>,
}

/// Where one tensor goes.
struct Slot {
    name: String,
    offset: u64,
    bytes: u64,
    rows: usize,
    change: Change,
}

/// Writes one GGUF file tensor by tensor, in any order. The file appears under its name only when
/// [`GgufWriter::finish`] succeeds.
pub struct GgufWriter {
    staged: StagedFile,
    file: File,
    /// Tensors still to come, by canonical name.
    open: BTreeMap<String, Slot>,
}

impl GgufWriter {
    /// Starts a file that will hold exactly `plan` (canonical names; file order). Tensors are put in GGUF's form
    /// on the way; RoPE divisors are added where the configuration needs them.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Io`], [`Error::Config`] for what GGUF cannot express, [`Error::Tensor`] for a
    /// name the architecture does not have.
    pub fn create(path: &Path, header: &GgufHeader<'_>, plan: &[TensorMeta]) -> Result<GgufWriter, Error> {
        let config = header.config;
        let architecture = key_map::by_model_type(&config.model_type)
            .ok_or_else(|| Error::config(format!("GGUF has no architecture for {:?}", config.model_type)))?;
        config.refuse_for_gguf(architecture)?;
        let divisors = config.rope.divisors(config.head_dim);
        let mut table = Vec::new();
        let mut open = BTreeMap::new();
        let mut at = 0u64;
        if let Some(divisors) = &divisors {
            let shape = vec![divisors.len()];
            table.push((crate::config::ROPE_DIVISORS.to_owned(), shape, quant::F32, at));
            at = (divisors.len() as u64 * 4).next_multiple_of(ALIGNMENT);
        }
        for meta in plan {
            let (name, form) = architecture.to_gguf(&meta.name).ok_or_else(|| {
                Error::tensor(path, &meta.name, format!("GGUF has no name for it in {}", architecture.gguf))
            })?;
            let rows = meta.shape.first().copied().unwrap_or(1);
            let change = Change::new(form, config, meta.format, rows)
                .map_err(|what| Error::tensor(path, &meta.name, what))?;
            let written = TensorMeta { format: change.format(meta.format), ..meta.clone() };
            let bytes = meta.byte_len() as u64;
            table.push((name.clone(), meta.shape.clone(), written.format, at));
            open.insert(meta.name.clone(), Slot { name, offset: at, bytes, rows, change });
            at = (at + written.byte_len() as u64).next_multiple_of(ALIGNMENT);
        }
        let keys = metadata(header, architecture, plan);
        let head = encode_header(&keys, &table);
        let staged = StagedFile::create(path)?;
        let mut file = File::create(staged.path()).map_err(Error::io(path))?;
        for slot in open.values_mut() {
            slot.offset += head.len() as u64;
        }
        file.write_all(&head).map_err(Error::io(path))?;
        for divisor in divisors.iter().flatten() {
            file.write_all(&divisor.to_le_bytes()).map_err(Error::io(path))?;
        }
        // The file ends on an aligned offset, as readers that map it expect.
        file.set_len(head.len() as u64 + at).map_err(Error::io(path))?;
        Ok(GgufWriter { staged, file, open })
    }

    /// Writes one tensor's bytes: canonical name and row order, the format the plan gives.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is not planned, already written, or has another length.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.staged.path();
        let slot = self
            .open
            .remove(name)
            .ok_or_else(|| Error::tensor(path, name, "it is not planned, or written twice"))?;
        if bytes.len() as u64 != slot.bytes {
            let what =
                format!("{} bytes were given for {}, {} are planned", bytes.len(), slot.name, slot.bytes);
            return Err(Error::tensor(path, name, what));
        }
        self.file.seek(SeekFrom::Start(slot.offset)).map_err(Error::io(path))?;
        self.file.write_all(&slot.change.gguf(bytes, slot.rows)).map_err(Error::io(path))
    }

    /// Makes the file durable and visible.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] for a planned tensor never written.
    pub fn finish(self) -> Result<(), Error> {
        let path = self.staged.path();
        if let Some(name) = self.open.keys().next() {
            return Err(Error::MissingTensor {
                path: path.to_owned(),
                tensor: name.clone(),
                hint: String::new(),
            });
        }
        self.file.sync_all().map_err(Error::io(path))?;
        self.staged.commit()
    }
}

fn metadata(
    header: &GgufHeader<'_>,
    architecture: &key_map::Architecture,
    plan: &[TensorMeta],
) -> Vec<(String, WriteValue)> {
    let mut keys = vec![
        ("general.architecture".to_owned(), WriteValue::String(architecture.gguf.into())),
        ("general.type".to_owned(), WriteValue::String("model".into())),
        ("general.name".to_owned(), WriteValue::String(header.name.into())),
        ("general.file_type".to_owned(), WriteValue::U32(file_type(plan))),
        ("general.quantization_version".to_owned(), WriteValue::U32(2)),
    ];
    keys.extend(header.config.to_gguf(architecture));
    if let Some(vocabulary) = header.vocabulary {
        keys.extend(vocabulary_keys(vocabulary, header.config));
    }
    if let Some(template) = header.chat_template {
        keys.push(("tokenizer.chat_template".into(), WriteValue::String(template.into())));
    }
    keys
}

fn vocabulary_keys(v: &GgufVocabulary, config: &ModelConfig) -> Vec<(String, WriteValue)> {
    let mut keys = vec![
        ("model", WriteValue::String(v.model.clone())),
        ("tokens", WriteValue::Strings(v.tokens.clone())),
    ];
    let string = |s: &String| WriteValue::String(s.clone());
    keys.extend(v.pre.as_ref().map(|p| ("pre", string(p))));
    if !v.scores.is_empty() {
        keys.push(("scores", WriteValue::Floats(v.scores.clone())));
    }
    if !v.token_types.is_empty() {
        keys.push(("token_type", WriteValue::Ints(v.token_types.clone())));
    }
    if !v.merges.is_empty() {
        keys.push(("merges", WriteValue::Strings(v.merges.clone())));
    }
    let eos = v.eos.or(config.eos_token_ids.first().copied());
    let ids = [
        ("bos_token_id", v.bos.or(config.bos_token_id)),
        ("eos_token_id", eos),
        ("unknown_token_id", v.unk),
        ("padding_token_id", v.pad.or(config.pad_token_id)),
        // A second end token, such as the end of a turn.
        ("eot_token_id", config.eos_token_ids.iter().copied().find(|id| Some(*id) != eos)),
    ];
    keys.extend(ids.into_iter().filter_map(|(k, id)| Some((k, WriteValue::U32(id?)))));
    let flags = [
        ("add_bos_token", v.add_bos),
        ("add_eos_token", v.add_eos),
        ("add_space_prefix", v.add_space_prefix),
    ];
    keys.extend(flags.into_iter().filter_map(|(k, flag)| Some((k, WriteValue::Bool(flag?)))));
    keys.into_iter().map(|(k, value)| (format!("tokenizer.ggml.{k}"), value)).collect()
}

/// llama.cpp's `llama_ftype` of the format most elements have.
fn file_type(plan: &[TensorMeta]) -> u32 {
    let mut elements: BTreeMap<&str, usize> = BTreeMap::new();
    for meta in plan {
        *elements.entry(meta.format.name()).or_default() += meta.elements();
    }
    match elements.into_iter().max_by_key(|(_, n)| *n).map(|(name, _)| name) {
        Some("f16") => 1,
        Some("q4_0") => 2,
        Some("q4_1") => 3,
        Some("q8_0") => 7,
        Some("q5_0") => 8,
        Some("q5_1") => 9,
        Some("q4_k") => 15,
        Some("q5_k") => 17,
        Some("q6_k") => 18,
        Some("bf16") => 32,
        _ => 0,
    }
}

type TableRow = (String, Vec<usize>, quant::FormatRef, u64);

/// Everything before the tensor bytes, padded to the alignment.
fn encode_header(keys: &[(String, WriteValue)], table: &[TableRow]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((table.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        put_string(&mut out, key);
        put_value(&mut out, value);
    }
    for (name, shape, format, offset) in table {
        put_string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        for dim in shape.iter().rev() {
            out.extend((*dim as u64).to_le_bytes());
        }
        out.extend(format.ggml_type().to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &WriteValue) {
    let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        WriteValue::U32(n) => {
            out.extend(4u32.to_le_bytes());
            out.extend(n.to_le_bytes());
        }
        WriteValue::F32(f) => {
            out.extend(6u32.to_le_bytes());
            out.extend(f.to_le_bytes());
        }
        WriteValue::Bool(b) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*b));
        }
        WriteValue::String(s) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, s);
        }
        WriteValue::Strings(list) => {
            array(out, 8, list.len());
            list.iter().for_each(|s| put_string(out, s));
        }
        WriteValue::Floats(list) => {
            array(out, 6, list.len());
            list.iter().for_each(|f| out.extend(f.to_le_bytes()));
        }
        WriteValue::Ints(list) => {
            array(out, 5, list.len());
            list.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
    }
}
