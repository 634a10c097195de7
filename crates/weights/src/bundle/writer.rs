//! Writes a bundle, one tensor in memory at a time.

use super::layout::Layout;
use super::manifest::{Manifest, Part, TensorRow, hex};
use super::reader::BundleSource;
use super::{ALIGNMENT, GOLDEN, MANIFEST, WEIGHTS};
use crate::config::ModelConfig;
use crate::safetensors::is_plain_name;
use crate::source::{ModelFiles, TensorMeta, TokenizerFiles};
use crate::staged::StagedDir;
use crate::{Error, hf_dir};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// A bundle in the making. It appears under its name only when [`BundleWriter::finish`] succeeds; dropped before,
/// it leaves nothing behind.
pub struct BundleWriter {
    staged: StagedDir,
    parts: BTreeMap<String, Part>,
    weights: File,
    weights_hash: Sha256,
    weights_bytes: u64,
    tensors: Vec<TensorRow>,
    layouts: &'static [Layout],
}

impl BundleWriter {
    /// Starts a bundle.
    ///
    /// # Errors
    /// [`Error::Exists`] or [`Error::Io`].
    pub fn create(destination: &Path) -> Result<BundleWriter, Error> {
        let staged = StagedDir::create(destination)?;
        let path = staged.path().join(WEIGHTS);
        let weights = File::create(&path).map_err(Error::io(&path))?;
        Ok(BundleWriter {
            staged,
            parts: BTreeMap::new(),
            weights,
            weights_hash: Sha256::new(),
            weights_bytes: 0,
            tensors: vec![],
            layouts: &[],
        })
    }

    /// Stores each matrix in the first of these that applies to it, and row by row where none does.
    pub fn with_layouts(mut self, layouts: &'static [Layout]) -> BundleWriter {
        self.layouts = layouts;
        self
    }

    /// Adds a whole part: `config.json`, tokenizer files, `golden.json`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] for a reserved or repeated name.
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        if !is_plain_name(name) || [WEIGHTS, MANIFEST].contains(&name) || self.parts.contains_key(name) {
            let what =
                format!("a bundle cannot take a part named {name:?}: reserved, repeated or not a file name");
            return Err(Error::unsupported(self.staged.destination(), what));
        }
        self.staged.file(name, bytes)?;
        let part = Part { bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) };
        self.parts.insert(name.to_owned(), part);
        Ok(())
    }

    /// Adds the golden prompts: opaque to the bundle.
    ///
    /// # Errors
    /// As [`BundleWriter::file`].
    pub fn golden(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file(GOLDEN, bytes)
    }

    /// Adds the next tensor in execution order: bytes in the format `meta` gives, row by row.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a repeated name or a wrong length; [`Error::Io`].
    pub fn tensor(&mut self, meta: &TensorMeta, bytes: &[u8]) -> Result<(), Error> {
        let refuse = |what: String| Error::tensor(self.staged.destination(), &meta.name, what);
        if bytes.len() != meta.byte_len() || bytes.is_empty() {
            let what = format!("{} bytes were given, its shape needs {}", bytes.len(), meta.byte_len());
            return Err(refuse(what));
        }
        if self.tensors.iter().any(|t| t.name == meta.name) {
            return Err(refuse("it is written twice".into()));
        }
        let offset = self.weights_bytes.next_multiple_of(ALIGNMENT);
        self.append(&vec![0; (offset - self.weights_bytes) as usize])?;
        let layout = self.layouts.iter().find(|layout| (layout.bytes)(meta).is_some());
        let stored = match layout {
            Some(layout) => Cow::Owned((layout.pack)(meta, bytes)),
            None => Cow::Borrowed(bytes),
        };
        self.append(&stored)?;
        self.tensors.push(TensorRow {
            name: meta.name.clone(),
            shape: meta.shape.clone(),
            format: meta.format.name().to_owned(),
            layout: layout.map(|layout| layout.name.to_owned()),
            offset,
            bytes: stored.len() as u64,
        });
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.weights.write_all(bytes).map_err(Error::io(self.staged.path().join(WEIGHTS)))?;
        self.weights_hash.update(bytes);
        self.weights_bytes += bytes.len() as u64;
        Ok(())
    }

    /// The model as written so far, for computing golden logits from the very bytes that will be served.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Damaged`] when `config.json` or the weights have not been added yet.
    pub fn preview(&self) -> Result<ModelFiles, Error> {
        let path = self.staged.path();
        let hf_config = crate::mapped::read_json(&path.join("config.json"), 64 << 20)?;
        Ok(ModelFiles {
            path: path.to_owned(),
            config: ModelConfig::from_hf(&hf_config)?,
            tensors: Box::new(BundleSource::new(path, &self.tensors, self.layouts)?),
            hf_config,
            tokenizer: TokenizerFiles::None,
            chat_template: None,
        })
    }

    /// Writes the manifest, makes everything durable and visible.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left behind.
    pub fn finish(mut self) -> Result<(), Error> {
        let path = self.staged.path().join(WEIGHTS);
        self.weights.sync_all().map_err(Error::io(&path))?;
        let sha256 = hex(&self.weights_hash.finalize());
        self.parts.insert(WEIGHTS.to_owned(), Part { bytes: self.weights_bytes, sha256 });
        let manifest = Manifest::new(self.parts, self.tensors);
        self.staged.file(MANIFEST, manifest.to_text().as_bytes())?;
        self.staged.commit()
    }

    /// Adds `config.json` and everything beside the weights of a model that is being converted.
    ///
    /// # Errors
    /// As [`BundleWriter::file`].
    pub fn model_files(&mut self, model: &ModelFiles) -> Result<(), Error> {
        let mut config = model.hf_config.clone();
        // End tokens may have come from generation_config.json; a bundle keeps them in one place.
        config.insert("eos_token_id".into(), crate::config::one_or_many(&model.config.eos_token_ids));
        self.file("config.json", format!("{:#}\n", Value::Object(config)).as_bytes())?;
        for (name, bytes) in hf_dir::side_files(model)? {
            self.file(&name, &bytes)?;
        }
        Ok(())
    }
}
