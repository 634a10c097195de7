//! Golden prompts: a few tokens with the logits that must follow them, kept in every bundle.
//!
//! They are computed from the very bytes that will be served, one transformer block in memory at a time, so that
//! converting stays within its memory bound.

use crate::open::Model;
use burn::tensor::{Device, Tensor};
use hearth_kernels::PackedMatrix;
use hearth_model::rope::Rope;
use hearth_model::{DocumentContext, Error, Linear, Matrix, WeightSource};
use hearth_weights::ModelFiles;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Largest difference of a logit that passes: another processor may round differently, wrong weights are far off.
pub const TOLERANCE: f32 = 1e-3;

/// Texts that become golden prompts where there is a tokenizer.
const TEXTS: [&str; 2] = ["The capital of France is", "1, 2, 3, 5, 8, 13, 21,"];

/// A bundle's golden prompts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// The prompts.
    pub prompts: Vec<Prompt>,
}

/// One golden prompt.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Logits after the last of them, one per vocabulary entry.
    pub logits: Vec<f32>,
}

/// The prompts for a model: short texts, or spread token ids where there is no tokenizer.
///
/// # Errors
/// When the tokenizer cannot encode.
pub fn prompts(model: &Model) -> anyhow::Result<Vec<Vec<u32>>> {
    let vocab = model.files.config.vocab_size as u32;
    let mut prompts = Vec::new();
    for text in TEXTS {
        let tokens = match &model.tokenizer {
            Some(tokenizer) => tokenizer.encode(text, true)?,
            None => (0..8).map(|i| (i * 2_654_435_761u64 + text.len() as u64) as u32 % vocab).collect(),
        };
        // A tokenizer may know more ids than the model has rows for.
        prompts.push(tokens.into_iter().filter(|id| *id < vocab).collect::<Vec<u32>>());
    }
    prompts.retain(|tokens| !tokens.is_empty());
    Ok(prompts)
}

/// Computes the logits after each prompt.
///
/// # Errors
/// Weights that cannot be read.
pub fn compute(files: &ModelFiles, prompts: &[Vec<u32>]) -> anyhow::Result<Golden> {
    let logits = logits(files, prompts)?;
    let prompts =
        prompts.iter().zip(logits).map(|(tokens, logits)| Prompt { tokens: tokens.clone(), logits });
    Ok(Golden { prompts: prompts.collect() })
}

/// Largest difference between the golden logits and those the weights give now.
///
/// # Errors
/// Weights that cannot be read; golden prompts that do not fit the model.
pub fn difference(files: &ModelFiles, golden: &Golden) -> anyhow::Result<f32> {
    let vocab = files.config.vocab_size;
    for prompt in &golden.prompts {
        crate::running::check_tokens(&prompt.tokens, vocab)?;
        anyhow::ensure!(
            prompt.logits.len() == vocab,
            "a golden prompt has {} logits, not {vocab}",
            prompt.logits.len()
        );
    }
    let tokens: Vec<Vec<u32>> = golden.prompts.iter().map(|p| p.tokens.clone()).collect();
    let now = logits(files, &tokens)?;
    let pairs = golden.prompts.iter().zip(&now).flat_map(|(p, now)| p.logits.iter().zip(now));
    // NaN must not pass for agreement.
    Ok(pairs
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, d| if d.is_nan() { f32::INFINITY } else { d.max(max) }))
}

fn logits(files: &ModelFiles, prompts: &[Vec<u32>]) -> anyhow::Result<Vec<Vec<f32>>> {
    let architecture = hearth_model::architecture(&files.config)?;
    let mut source = OneAtATime { files };
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let mut context = DocumentContext::new(&Rope::new(&files.config), &lengths);
    let mut x = architecture.embedding(&mut source)?.forward(&prompts.concat());
    for i in 0..architecture.num_blocks() {
        x = architecture.block(i, &mut source)?.forward(x, &mut context);
    }
    let head = architecture.head(&mut source)?;
    let mut end = 0;
    let last_rows = lengths.iter().map(|len| {
        end += len;
        let row = head.logits(x.clone().narrow(0, end - 1, 1));
        row.into_data().try_to_vec::<f32>().map_err(|e| anyhow::anyhow!("logits are not f32: {e:?}"))
    });
    last_rows.collect()
}

/// Reads each weight when a layer asks for it and forgets it with the layer.
struct OneAtATime<'a> {
    files: &'a ModelFiles,
}

impl OneAtATime<'_> {
    fn matrix(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<Matrix, Error> {
        let name = format!("{name}.weight");
        let format = self.files.expect(&name, &[rows, columns])?.format.name();
        let packed = PackedMatrix::from_format(rows, columns, format, &self.files.tensors.bytes(&name)?);
        let packed = match packed {
            Some(packed) => packed,
            None => PackedMatrix::from_f32(rows, columns, &self.files.tensors.read_f32(&name)?),
        };
        Ok(Matrix::Packed(Arc::new(packed)))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.files.expect(name, &[len])?;
        Ok(Tensor::from_floats(self.files.tensors.read_f32(name)?.as_slice(), &Device::flex()))
    }
}

impl WeightSource for OneAtATime<'_> {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Error> {
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), shape[0])?) } else { None };
        Ok(Linear::new(self.matrix(name, shape)?, bias))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.vector(&format!("{name}.weight"), len)
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.vector(&format!("{name}.bias"), len)
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, Error> {
        self.matrix(name, shape)
    }
}
