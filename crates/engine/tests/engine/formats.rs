//! Weights in every storage format, and files that do not hold what the configuration asks for.

use crate::fixtures::*;
use hearth_engine::{Activations, LoadedModel, Scorer};
use hearth_kernels::PackedMatrix;
use hearth_memory::Ledger;
use hearth_weights::{Error, FormatRef, ModelFiles, TensorMeta, TensorSource, quant};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Tensors in memory.
pub struct Held {
    pub metas: Vec<TensorMeta>,
    pub bytes: BTreeMap<String, Vec<u8>>,
}

impl TensorSource for Held {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        self.meta(name).map(|_| Cow::Borrowed(&self.bytes[name][..]))
    }
}

/// The model with its matrices in `format`, or in what that format's bytes decode to.
pub fn converted(files: &ModelFiles, format: FormatRef, decoded: bool) -> ModelFiles {
    let mut held = Held { metas: Vec::new(), bytes: BTreeMap::new() };
    for meta in files.tensors.tensors() {
        let values = files.tensors.read_f32(&meta.name).expect("readable");
        let format = if meta.shape.len() == 2 { format } else { quant::F32 };
        let mut bytes = vec![0; values.len() / format.block_len() * format.block_bytes()];
        assert!(format.quantize(&values, &mut bytes), "{format:?} can be written");
        let mut stored = format;
        if decoded {
            bytes =
                hearth_weights::source::decode(format, &bytes).iter().flat_map(|x| x.to_le_bytes()).collect();
            stored = quant::F32;
        }
        held.metas.push(TensorMeta { format: stored, ..meta.clone() });
        held.bytes.insert(meta.name.clone(), bytes);
    }
    with_tensors(files, held)
}

fn with_tensors(files: &ModelFiles, held: Held) -> ModelFiles {
    ModelFiles {
        path: files.path.clone(),
        config: files.config.clone(),
        hf_config: files.hf_config.clone(),
        tensors: Box::new(held),
        tokenizer: hearth_weights::TokenizerFiles::None,
        chat_template: None,
    }
}

#[test]
fn every_format_gives_the_logits_of_its_decoded_values() {
    let files = open("tiny-chat");
    let tokens: Vec<u32> = (0..40).map(|i| (i * 11 % 320) as u32).collect();
    let logits = |files: &ModelFiles| {
        let mut rows = Vec::new();
        let mut scorer = Scorer::new(load(files), 40).expect("no budget");
        scorer.score(&tokens, 0..40, |_, row| rows.extend(row.iter().map(|x| x.to_bits()))).expect("valid");
        rows
    };
    let writable = quant::FORMATS.iter().filter(|f| quant::is_writable(**f));
    for format in writable {
        let (packed, decoded) =
            (logits(&converted(&files, *format, false)), logits(&converted(&files, *format, true)));
        assert!(packed == decoded, "{format:?}");
    }
}

#[test]
fn panels_of_every_format_decode_to_the_reference_bit_for_bit() {
    let (rows, columns) = (19, 512);
    for format in quant::FORMATS.iter().filter(|f| f.block_len() > 1) {
        let count = rows * columns / format.block_len() * format.block_bytes();
        let mut bytes: Vec<u8> = (0..count).map(|i| (i * i * 31 + i * 7) as u8).collect();
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            // The upper bytes of the f16 fields: finite numbers.
            for at in if format.name() == "q6_k" { vec![209] } else { vec![1, 3] } {
                block[at] &= 0x3b;
            }
        }
        let mut want = vec![0.0; rows * columns];
        format.dequantize(&bytes, &mut want);
        let matrix = PackedMatrix::from_format(rows, columns, format.name(), &bytes).expect("has panels");
        let mut got = vec![0.0; columns];
        for (row, want) in want.chunks_exact(columns).enumerate() {
            matrix.read_row(row, &mut got);
            assert_eq!(got, want, "{format:?}, row {row}");
        }
    }
}

#[test]
fn quantized_weights_stay_small() {
    let files = open("tiny-chat");
    let bytes = |format| load(&converted(&files, format, false)).weight_bytes();
    let (f32, f16, q8, q4) = (bytes(quant::F32), bytes(quant::F16), bytes(quant::Q8_0), bytes(quant::Q4_0));
    assert!(f16 < f32 * 6 / 10 && q8 < f32 * 3 / 10 && q4 < f32 * 2 / 10, "{f32} {f16} {q8} {q4}");
}

#[test]
fn missing_and_misshapen_tensors_are_named_before_anything_is_loaded() {
    let files = open("tiny-chat");
    let name = "model.layers.1.mlp.up_proj.weight";
    let refusal = |change: &dyn Fn(&mut Held)| {
        let mut held = Held { metas: files.tensors.tensors().to_vec(), bytes: BTreeMap::new() };
        change(&mut held);
        let ledger = Ledger::default();
        let error = LoadedModel::load(&with_tensors(&files, held), Activations::F32, &ledger, &|_| ())
            .err()
            .expect("refused");
        assert_eq!(ledger.peak(hearth_memory::Tier::Device), 0);
        error.to_string()
    };
    let error = refusal(&|held| held.metas.retain(|m| m.name != name));
    assert!(error.contains(&format!("{name} is missing")), "{error}");
    let error = refusal(&|held| {
        held.metas.iter_mut().filter(|m| m.name == name).for_each(|m| m.shape = vec![31, 32])
    });
    assert!(
        error.contains(&format!("{name} has shape [31, 32], the configuration needs [32, 32]")),
        "{error}"
    );
}
