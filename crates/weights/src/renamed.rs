//! The same tensors under other names.

use crate::Error;
use crate::source::{TensorMeta, TensorSource, missing, position};
use std::borrow::Cow;
use std::path::Path;

/// A source whose tensors are renamed; those without a new name are hidden.
pub(crate) struct Renamed<S> {
    inner: S,
    metas: Vec<TensorMeta>,
    /// Beside `metas`: the inner names.
    inner_names: Vec<String>,
}

impl<S: TensorSource> Renamed<S> {
    /// `rename` must not map two names to one.
    pub(crate) fn new(inner: S, rename: impl Fn(&str) -> Option<String>) -> Renamed<S> {
        let mut table: Vec<(TensorMeta, String)> = inner
            .tensors()
            .iter()
            .filter_map(|meta| {
                Some((TensorMeta { name: rename(&meta.name)?, ..meta.clone() }, meta.name.clone()))
            })
            .collect();
        table.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let (metas, inner_names) = table.into_iter().unzip();
        Renamed { inner, metas, inner_names }
    }
}

impl<S: TensorSource> TensorSource for Renamed<S> {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        match position(&self.metas, name) {
            Some(at) => self.inner.bytes(&self.inner_names[at]),
            None => Err(missing(self.origin(), &self.metas, name)),
        }
    }

    fn release(&self, name: &str) {
        if let Some(at) = position(&self.metas, name) {
            self.inner.release(&self.inner_names[at]);
        }
    }

    fn origin(&self) -> &Path {
        self.inner.origin()
    }
}
