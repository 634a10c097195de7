//! A GGUF file's tensors under canonical names, brought into canonical form when read.

use super::parse::Gguf;
use super::rows::Change;
use crate::Error;
use crate::config::{ModelConfig, ROPE_DIVISORS};
use crate::key_map::{Architecture, Form};
use crate::source::{TensorMeta, TensorSource, missing, position};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors of one GGUF file.
pub struct GgufSource {
    file: Gguf,
    metas: Vec<TensorMeta>,
    /// Beside `metas`: number in the file's table, and what changes on the way.
    places: Vec<(usize, Change)>,
    /// Canonical names of tensors in unread formats, with their ggml type.
    unread: BTreeMap<String, u32>,
}

impl GgufSource {
    /// Puts a parsed file under canonical names.
    ///
    /// # Errors
    /// [`Error::Tensor`] when a q or k tensor is not whole heads.
    pub fn new(file: Gguf, architecture: &Architecture, config: &ModelConfig) -> Result<GgufSource, Error> {
        let mut table = Vec::new();
        let mut unread = BTreeMap::new();
        // RoPE divisors are part of the configuration, not of any layer.
        let weights = file.tensors().iter().enumerate().filter(|(_, t)| t.name != ROPE_DIVISORS);
        for (number, tensor) in weights {
            let (name, form) =
                architecture.to_canonical(&tensor.name).unwrap_or_else(|| (tensor.name.clone(), Form::Same));
            let Some(format) = tensor.format else {
                unread.insert(name, tensor.ggml_type);
                continue;
            };
            let rows = tensor.shape.first().copied().unwrap_or(1);
            let change = Change::new(form, config, format, rows)
                .map_err(|what| Error::tensor(file.path(), &tensor.name, what))?;
            let meta = TensorMeta { name, shape: tensor.shape.clone(), format: change.format(format) };
            table.push((meta, (number, change)));
        }
        table.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let (metas, places): (Vec<TensorMeta>, Vec<_>) = table.into_iter().unzip();
        if let Some(pair) = metas.windows(2).find(|p| p[0].name == p[1].name) {
            return Err(Error::tensor(file.path(), &pair[0].name, "two tensors of the file have this name"));
        }
        Ok(GgufSource { file, metas, places, unread })
    }

    /// The file itself.
    pub fn file(&self) -> &Gguf {
        &self.file
    }

    fn refusal(&self, name: &str) -> Error {
        match self.unread.get(name) {
            Some(number) => Error::tensor(
                self.file.path(),
                name,
                format!("it is stored as ggml type {number}, hearth reads {}", crate::quant::names(|_| true)),
            ),
            None => missing(self.file.path(), &self.metas, name),
        }
    }
}

impl TensorSource for GgufSource {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let at = position(&self.metas, name).ok_or_else(|| self.refusal(name))?;
        let (number, change) = self.places[at];
        let tensor = &self.file.tensors()[number];
        Ok(change.canonical(self.file.raw(tensor), tensor.shape.first().copied().unwrap_or(1)))
    }

    fn release(&self, name: &str) {
        if let Some(at) = position(&self.metas, name) {
            self.file.release(&self.file.tensors()[self.places[at].0]);
        }
    }

    fn origin(&self) -> &Path {
        self.file.path()
    }

    fn meta(&self, name: &str) -> Result<&TensorMeta, Error> {
        position(&self.metas, name).map(|i| &self.metas[i]).ok_or_else(|| self.refusal(name))
    }
}
