//! The fixtures, opened, and cards that the CPU stands in for.

use hearth_cuda::runtime::{Device, Libraries};
use hearth_cuda_stand_in::StandIn;
use hearth_memory::{Budget, Ledger};
use hearth_weights::{Error, FormatRef, ModelFiles, TensorMeta, TensorSource, quant};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// A fixture's model.
pub fn files(name: &str) -> ModelFiles {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    hearth_weights::open(&fixtures.join(name).join("model")).expect(name)
}

/// A card with this budget.
pub fn card(driver: &StandIn, budget: Budget) -> Arc<Device> {
    Device::open_with(0, &Ledger::new(budget), &Libraries::from(driver.path())).expect("a card")
}

/// The model with its matrices in `format`.
struct Held {
    metas: Vec<TensorMeta>,
    bytes: BTreeMap<String, Vec<u8>>,
}

impl TensorSource for Held {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        self.meta(name).map(|_| Cow::Borrowed(&self.bytes[name][..]))
    }
}

/// A model with its matrices in `format`.
pub fn converted(files: &ModelFiles, format: FormatRef) -> ModelFiles {
    let mut held = Held { metas: Vec::new(), bytes: BTreeMap::new() };
    for meta in files.tensors.tensors() {
        let values = files.tensors.read_f32(&meta.name).expect("readable");
        let format = if meta.shape.len() == 2 { format } else { quant::F32 };
        let mut bytes = vec![0; values.len() / format.block_len() * format.block_bytes()];
        assert!(format.quantize(&values, &mut bytes), "{format:?} can be written");
        held.metas.push(TensorMeta { format, ..meta.clone() });
        held.bytes.insert(meta.name.clone(), bytes);
    }
    ModelFiles {
        path: files.path.clone(),
        config: files.config.clone(),
        hf_config: files.hf_config.clone(),
        tensors: Box::new(held),
        tokenizer: hearth_weights::TokenizerFiles::None,
        chat_template: None,
    }
}
