//! Hugging Face directories that `transformers` loads, written one tensor at a time.

use crate::Error;
use crate::adapter::torch_metadata;
use crate::safetensors::Body;
use crate::source::{ModelFiles, TensorMeta, TokenizerFiles};
use crate::staged::StagedDir;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Size above which weights are split into several files, as `save_pretrained` does.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Files beside the weights that belong to a tokenizer or to generation.
const SIDE_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
];

/// Name of a GGUF vocabulary inside a bundle.
pub(crate) const VOCABULARY_FILE: &str = "vocabulary.json";

/// Everything of a model but configuration and weights, as `(file name, bytes)`: tokenizer files, chat template,
/// and `vocabulary.json` for a vocabulary that came out of a GGUF file.
///
/// # Errors
/// [`Error::Io`].
pub fn side_files(model: &ModelFiles) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let mut files = Vec::new();
    if let TokenizerFiles::Json { path } = &model.tokenizer {
        let directory = path.parent().unwrap_or(Path::new("."));
        for name in SIDE_FILES {
            let file = directory.join(name);
            if file.is_file() {
                files.push(((*name).to_owned(), std::fs::read(&file).map_err(Error::io(&file))?));
            }
        }
    }
    if let TokenizerFiles::Gguf(vocabulary) = &model.tokenizer {
        files.push((VOCABULARY_FILE.to_owned(), json!(vocabulary).to_string().into_bytes()));
    }
    if let Some(template) = &model.chat_template {
        files.push(("chat_template.jinja".to_owned(), template.clone().into_bytes()));
    }
    Ok(files)
}

/// Writes `config.json`, safetensors (with an index when there are several) and whatever else is handed in. The
/// directory appears under its name only when [`HfWriter::finish`] succeeds.
pub struct HfWriter {
    staged: StagedDir,
    shards: Vec<Body>,
    shard_of: BTreeMap<String, usize>,
}

impl HfWriter {
    /// Starts a directory that will hold exactly `plan`, in shards of at most `max_shard_bytes` (see
    /// [`MAX_SHARD_BYTES`]) unless one tensor is larger.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Io`], or [`Error::Tensor`] for a format other than f32, f16, bf16.
    pub fn create(
        destination: &Path,
        hf_config: &Map<String, Value>,
        plan: &[TensorMeta],
        max_shard_bytes: u64,
    ) -> Result<HfWriter, Error> {
        let staged = StagedDir::create(destination)?;
        let config = Value::Object(with_dtype(hf_config, plan));
        staged.file("config.json", format!("{config:#}\n").as_bytes())?;
        let shard_plans = split(plan, max_shard_bytes);
        let count = shard_plans.len();
        let mut shards = Vec::with_capacity(count);
        let mut shard_of = BTreeMap::new();
        for (number, shard_plan) in shard_plans.iter().enumerate() {
            let path = staged.path().join(shard_name(number, count));
            shards.push(Body::create(&path, shard_plan, &torch_metadata())?);
            shard_of.extend(shard_plan.iter().map(|meta| (meta.name.clone(), number)));
        }
        if count > 1 {
            staged.file("model.safetensors.index.json", index(plan, &shard_of, count).as_bytes())?;
        }
        Ok(HfWriter { staged, shards, shard_of })
    }

    /// Adds a small file, such as `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.staged.file(name, bytes)
    }

    /// Writes one tensor's bytes, in the format the plan gives; any order.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is not planned, already written, or has another length.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        match self.shard_of.get(name) {
            Some(shard) => self.shards[*shard].tensor(name, bytes),
            None => Err(Error::tensor(self.staged.destination(), name, "it is not planned")),
        }
    }

    /// Makes the directory durable and visible.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] for a planned tensor never written.
    pub fn finish(self) -> Result<(), Error> {
        self.shards.into_iter().try_for_each(Body::finish)?;
        self.staged.commit()
    }
}

/// Cuts the plan where a shard would grow past the limit.
fn split(plan: &[TensorMeta], max_shard_bytes: u64) -> Vec<Vec<TensorMeta>> {
    let mut shards: Vec<Vec<TensorMeta>> = vec![vec![]];
    let mut size = 0;
    for meta in plan {
        let bytes = meta.byte_len() as u64;
        if size > 0 && size + bytes > max_shard_bytes {
            shards.push(vec![]);
            size = 0;
        }
        size += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(meta.clone());
        }
    }
    shards
}

fn shard_name(number: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    }
}

fn index(plan: &[TensorMeta], shard_of: &BTreeMap<String, usize>, count: usize) -> String {
    let total: u64 = plan.iter().map(|meta| meta.byte_len() as u64).sum();
    let weight_map: Map<String, Value> =
        shard_of.iter().map(|(name, shard)| (name.clone(), shard_name(*shard, count).into())).collect();
    format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
}

/// The configuration with the element type the weights will really have.
fn with_dtype(hf_config: &Map<String, Value>, plan: &[TensorMeta]) -> Map<String, Value> {
    let mut config = hf_config.clone();
    let matrices = plan.iter().filter(|meta| meta.shape.len() > 1);
    let largest = matrices.max_by_key(|meta| meta.elements());
    let dtype = match largest.map(|meta| meta.format.name()) {
        Some("bf16") => "bfloat16",
        Some("f16") => "float16",
        _ => "float32",
    };
    // transformers 5 calls it dtype, 4 torch_dtype.
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.to_owned(), dtype.into());
    config
}
