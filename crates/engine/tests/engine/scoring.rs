//! Logits of given tokens: those of transformers, of the training forward, and the engine's own.

use crate::fixtures::*;
use burn::tensor::{Device, Tensor, TensorData};
use hearth_engine::api::Event;
use hearth_engine::{LoadedModel, Scorer};
use hearth_memory::Ledger;
use hearth_model::rope::Rope;
use hearth_model::{DocumentContext, Error, Linear, Matrix, WeightSource, architecture};
use hearth_weights::ModelFiles;

fn logits(scorer: &mut Scorer, tokens: &[u32]) -> Vec<f32> {
    let mut rows = Vec::new();
    scorer.score(tokens, 0..tokens.len(), |_, row| rows.extend_from_slice(row)).expect("valid tokens");
    rows
}

#[test]
fn logits_are_those_of_transformers() {
    for case in parity_cases() {
        let reference = Reference::of(&case);
        let mut scorer = Scorer::new(load(&open(&case)), 32).expect("no budget");
        for i in 0..2 {
            let ours = logits(&mut scorer, &reference.ids(&format!("input_ids.{i}")));
            let theirs = reference.floats(&format!("logits.{i}"));
            assert_eq!(ours.len(), theirs.len());
            let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-5, "{case}, sequence {i}: {worst}");
        }
    }
}

/// Weights as the trainer holds them: row-major tensors.
pub struct DenseWeights<'a>(pub &'a ModelFiles);

impl DenseWeights<'_> {
    fn tensor<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>, Error> {
        let values = self.0.tensors.read_f32(name)?;
        Ok(Tensor::from_data(TensorData::new(values, shape), &Device::flex()))
    }
}

impl WeightSource for DenseWeights<'_> {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Error> {
        let weight = self.tensor(&format!("{name}.weight"), shape)?;
        let bias = if bias { Some(self.tensor(&format!("{name}.bias"), [shape[0]])?) } else { None };
        Ok(Linear::new(Matrix::Dense(weight), bias))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.tensor(&format!("{name}.weight"), [len])
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.tensor(&format!("{name}.bias"), [len])
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, Error> {
        Ok(Matrix::Dense(self.tensor(&format!("{name}.weight"), shape)?))
    }
}

/// The block loop as training runs it: whole documents, no cache.
pub fn training_logits(files: &ModelFiles, weights: &mut dyn WeightSource, documents: &[&[u32]]) -> Vec<f32> {
    let arch = architecture(&files.config).expect("known");
    let lengths: Vec<usize> = documents.iter().map(|d| d.len()).collect();
    let mut context = DocumentContext::new(&Rope::new(&files.config), &lengths);
    let mut x = arch.embedding(weights).expect("there").forward(&documents.concat());
    for i in 0..arch.num_blocks() {
        x = arch.block(i, weights).expect("there").forward(x, &mut context);
    }
    arch.head(weights).expect("there").logits(x).into_data().try_into_vec().expect("f32")
}

#[test]
fn logits_are_bit_equal_to_the_training_forward() {
    for case in parity_cases() {
        let (files, reference) = (open(&case), Reference::of(&case));
        let (a, b) = (reference.ids("input_ids.0"), reference.ids("input_ids.1"));
        let trained = training_logits(&files, &mut DenseWeights(&files), &[&a, &b]);
        let arch = architecture(&files.config).expect("known");
        let dense = LoadedModel::from_source(arch.as_ref(), &mut DenseWeights(&files), &Ledger::default());
        for model in [load(&files), dense.expect("there")] {
            let mut scorer = Scorer::new(model, 32).expect("no budget");
            let served = [logits(&mut scorer, &a), logits(&mut scorer, &b)].concat();
            let same = served.iter().zip(&trained).all(|(s, t)| s.to_bits() == t.to_bits());
            assert!(same && served.len() == trained.len(), "{case}");
        }
    }
}

#[test]
fn a_scorer_hands_over_only_the_rows_asked_for_and_forgets_between_sequences() {
    let mut scorer = Scorer::new(load(&open("tiny-chat")), 600).expect("no budget");
    let tokens: Vec<u32> = (0..600).map(|i| (i * 37 % 320) as u32).collect();
    let all = logits(&mut scorer, &tokens);
    let mut seen = Vec::new();
    let wanted = 505..520;
    let check = |position: usize, row: &[f32]| {
        assert_eq!(row, &all[position * 320..][..320]);
        seen.push(position);
    };
    scorer.score(&tokens, wanted.clone(), check).expect("valid tokens");
    assert!(seen.iter().copied().eq(wanted));
    assert_eq!(
        logits(&mut scorer, &tokens[..3]),
        all[..3 * 320],
        "causal, and nothing is left of the last one"
    );
}

#[test]
fn negative_log_likelihoods_are_the_engines_prompt_log_probabilities() {
    let model = load(&open("tiny-chat"));
    let tokens: Vec<u32> = (0..100).map(|i| (i * i % 320) as u32).collect();
    let losses = Scorer::new(model.clone(), 100).and_then(|mut s| s.negative_log_likelihoods(&tokens));
    let mut request = greedy(&tokens, 0);
    request.prompt_logprobs = Some(0);
    let events = events(start(&model, 1, 30).submit(request).expect("fits"));
    let Event::Prompt(rows) = &events[0] else { panic!("{events:?}") };
    let served: Vec<f32> = rows.iter().flatten().map(|r| r.logprob).collect();
    let scored: Vec<f32> = losses.expect("valid tokens").iter().map(|l| -l as f32).collect();
    assert_eq!((scored.len(), &scored), (99, &served));
}

#[test]
fn tokens_that_cannot_be_scored_are_refused() {
    let mut scorer = Scorer::new(load(&open("tiny-chat")), 4).expect("no budget");
    for (tokens, expected) in [
        (&[][..], "empty"),
        (&[1, 320], "token id 320 at position 1 is not below the vocabulary size 320"),
        (&[1; 5], "limit of 4 tokens"),
    ] {
        let error = scorer.score(tokens, 0..1, |_, _| ()).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    scorer
        .score(&[1, 2], 0..9, |position, _| assert!(position < 2))
        .expect("what is not there is not handed over");
}
