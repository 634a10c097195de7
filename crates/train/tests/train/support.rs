//! Tiny models and data for the tests of this crate.

use crate::tiny;
pub use crate::tiny::{config, sequences};
use hearth_data::{Half, Sequence};
use hearth_train::{LoraConfig, ObjectiveConfig, Setup, TrainConfig, Trainer};
use hearth_weights::ModelFiles;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

pub fn model(case: &str) -> ModelFiles {
    hearth_weights::open(&fixtures().join("parity").join(case).join("model")).expect("the fixture opens")
}

/// Preference pairs: a prompt with two replies of their own lengths.
pub fn pairs(count: usize, vocab: usize) -> Vec<Sequence> {
    (0..2 * count).map(|i| half(i / 2, i % 2, vocab)).collect()
}

fn half(pair: usize, which: usize, vocab: usize) -> Sequence {
    let (prompt, reply) = (3 + pair % 3, 4 + (pair + 2 * which) % 4);
    let ids: Vec<u32> = (0..prompt + reply)
        .map(|j| ((pair * 31 + j * 7 + if j < prompt { 0 } else { (1 + which) * 13 }) % vocab) as u32)
        .collect();
    let labels = ids.iter().enumerate().map(|(j, id)| if j < prompt { -100 } else { *id as i32 });
    Sequence {
        labels: labels.collect(),
        documents: vec![ids.len()],
        ids,
        example: pair as u64,
        half: Some(if which == 0 { Half::Chosen } else { Half::Rejected }),
    }
}

pub fn lora() -> LoraConfig {
    LoraConfig {
        rank: 4,
        alpha: 8.0,
        dropout: 0.1,
        targets: vec!["all-linear".into()],
        ..LoraConfig::default()
    }
}

pub fn setup<'a>(model: &'a ModelFiles, config: &TrainConfig) -> Setup<'a> {
    let data = match config.objective {
        ObjectiveConfig::Sft => sequences(10, model.config.vocab_size),
        ObjectiveConfig::Dpo(_) => pairs(10, model.config.vocab_size),
    };
    tiny::setup(model, config, data)
}

pub fn trainer(model: &ModelFiles, config: &TrainConfig) -> Trainer {
    Trainer::new(setup(model, config), config.clone()).expect("a trainer")
}

/// Every bit of a trainer's state, as hashes by name.
pub fn state(trainer: &Trainer) -> Vec<(String, String)> {
    trainer.fingerprint().expect("readable state")
}

/// The masters by parameter name.
pub fn masters(trainer: &Trainer) -> BTreeMap<String, Vec<f32>> {
    let mut found = BTreeMap::new();
    let mut take = |name: String, bytes: &[u8]| {
        if let Some(name) = name.strip_prefix("weight.") {
            found.insert(
                name.into(),
                bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            );
        }
    };
    trainer.each_tensor(&mut take).expect("readable state");
    found
}

/// A tensor of a reference file, as f64.
pub fn reference(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    let bytes = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64).collect()
        }
        Dtype::F64 => bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::I64 => {
            bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// `{prefix}input_ids.{i}` and `{prefix}labels.{i}` for the two sequences of a reference.
pub fn reference_sequences(file: &SafeTensors<'_>, prefix: &str) -> Vec<Sequence> {
    let one = |i: usize| {
        let ids: Vec<u32> =
            reference(file, &format!("{prefix}input_ids.{i}")).iter().map(|id| *id as u32).collect();
        let labels = reference(file, &format!("{prefix}labels.{i}")).iter().map(|l| *l as i32).collect();
        Sequence { documents: vec![ids.len()], ids, labels, example: i as u64, half: None }
    };
    vec![one(0), one(1)]
}
