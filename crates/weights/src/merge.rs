//! LoRA adapters folded into base tensors: `W + scale · B·A`, one tensor at a time.

use crate::Error;
use crate::adapter::Adapter;
use crate::quant;
use crate::source::{TensorMeta, TensorSource, position};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// A base model seen through an adapter. Adapted tensors are f32, the others as the base stores them.
pub struct Merged {
    base: Box<dyn TensorSource>,
    adapter: Adapter,
    metas: Vec<TensorMeta>,
    /// Adapted tensor → module.
    adapted: BTreeMap<String, String>,
}

/// One module's factors.
struct Delta {
    /// `[rank, in]`.
    a: Vec<f32>,
    /// `[out, rank]`.
    b: Vec<f32>,
    rank: usize,
    scale: f32,
}

impl Delta {
    /// Adds row `out` of `scale · B·A` to `row`. Ranks are summed in order, in f32, whatever the thread.
    fn add_to(&self, out: usize, row: &mut [f32]) {
        let mut sum = vec![0f32; row.len()];
        for r in 0..self.rank {
            let b = self.b[out * self.rank + r];
            for (s, a) in sum.iter_mut().zip(&self.a[r * row.len()..]) {
                *s += b * a;
            }
        }
        for (w, s) in row.iter_mut().zip(&sum) {
            *w += self.scale * s;
        }
    }
}

impl Merged {
    /// Lays `adapter` over `base`.
    ///
    /// # Errors
    /// [`Error::Adapter`] when a module is not in the base or has another shape there.
    pub fn new(base: Box<dyn TensorSource>, adapter: Adapter) -> Result<Merged, Error> {
        let mut metas = base.tensors().to_vec();
        let mut adapted = BTreeMap::new();
        for module in &adapter.modules {
            let name = format!("{module}.weight");
            let a = &adapter.tensors.meta(&format!("{module}.lora_A.weight"))?.shape;
            let b = &adapter.tensors.meta(&format!("{module}.lora_B.weight"))?.shape;
            let Some(at) = position(&metas, &name) else {
                let what = format!("it adapts {module}, which {} does not have", base.origin().display());
                return Err(Error::adapter(&adapter.path, what));
            };
            if metas[at].shape != [b[0], a[1]] {
                let what = format!(
                    "it adapts {module} as [{}, {}], the base has {:?}: it belongs to another model",
                    b[0], a[1], metas[at].shape
                );
                return Err(Error::adapter(&adapter.path, what));
            }
            metas[at].format = quant::F32;
            adapted.insert(name, module.clone());
        }
        Ok(Merged { base, adapter, metas, adapted })
    }

    fn delta(&self, module: &str) -> Result<Delta, Error> {
        let a_name = format!("{module}.lora_A.weight");
        let rank = self.adapter.tensors.meta(&a_name)?.shape[0];
        Ok(Delta {
            a: self.adapter.tensors.read_f32(&a_name)?,
            b: self.adapter.tensors.read_f32(&format!("{module}.lora_B.weight"))?,
            rank,
            scale: self.adapter.scale(rank) as f32,
        })
    }
}

impl TensorSource for Merged {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let Some(module) = self.adapted.get(name) else { return self.base.bytes(name) };
        let delta = self.delta(module)?;
        let meta = self.base.meta(name)?;
        let (stored, format, width) = (self.base.bytes(name)?, meta.format, meta.shape[1]);
        let mut out = vec![0u8; meta.elements() * 4];
        let stored_row = stored.len() / meta.shape[0];
        out.par_chunks_mut(width * 4).zip(stored.par_chunks(stored_row)).enumerate().for_each(
            |(index, (out, stored))| {
                let mut row = vec![0f32; width];
                format.dequantize(stored, &mut row);
                delta.add_to(index, &mut row);
                quant::F32.quantize(&row, out);
            },
        );
        Ok(Cow::Owned(out))
    }

    fn release(&self, name: &str) {
        self.base.release(name);
    }

    fn origin(&self) -> &Path {
        self.base.origin()
    }

    fn meta(&self, name: &str) -> Result<&TensorMeta, Error> {
        match position(&self.metas, name) {
            Some(at) => Ok(&self.metas[at]),
            None => self.base.meta(name),
        }
    }
}
