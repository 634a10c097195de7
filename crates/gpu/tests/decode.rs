//! Models decoded through the card's launches against the CPU engine's logits, with the driver that runs kernels on the CPU.

use hearth_cuda::decoder::{Capacity, blocks_of};
use hearth_cuda::ops::paged::CacheElement;
use hearth_cuda::runtime::{Device, Libraries};
use hearth_cuda_stand_in::StandIn;
use hearth_engine::{Activations, LoadedModel, Scorer};
use hearth_gpu::CardModel;
use hearth_gpu::model::Token;
use hearth_memory::{Budget, Ledger, Tier};
use hearth_weights::{Error, FormatRef, ModelFiles, TensorMeta, TensorSource, quant};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

fn files(name: &str) -> ModelFiles {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    hearth_weights::open(&fixtures.join(name).join("model")).expect(name)
}

fn card(driver: &StandIn, budget: Budget) -> Arc<Device> {
    Device::open_with(0, &Ledger::new(budget), &Libraries::from(driver.path())).expect("a card")
}

fn tokens_of(files: &ModelFiles, count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 11 + 3) % files.config.vocab_size) as u32).collect()
}

/// Logits after every token, from the CPU's engine.
fn on_cpu(files: &ModelFiles, activations: Activations, tokens: &[u32]) -> Vec<f32> {
    let model = LoadedModel::load(files, activations, &Ledger::default(), &|_| ()).expect("no budget");
    let (mut scorer, mut rows) = (Scorer::new(model, tokens.len()).expect("no budget"), Vec::new());
    scorer.score(tokens, 0..tokens.len(), |_, row| rows.extend_from_slice(row)).expect("valid tokens");
    rows
}

/// The same through a card: `batch` tokens per step.
fn on_card<T: CacheElement>(
    card: &Arc<Device>,
    files: &ModelFiles,
    tokens: &[u32],
    batch: usize,
) -> Vec<f32> {
    let blocks = blocks_of(tokens.len());
    let capacity = Capacity { rows: batch, context: tokens.len(), blocks };
    let mut model = CardModel::<T>::load(card, files, capacity).expect("it fits");
    // Not in order, so that a table that is ignored shows.
    let table: Vec<u32> = (0..blocks as u32).rev().collect();
    let place = |(position, &id)| Token { id, position, length: tokens.len(), table: &table };
    let places: Vec<Token<'_>> = tokens.iter().enumerate().map(place).collect();
    places.chunks(batch).flat_map(|step| model.step(step).expect("it works")).collect()
}

/// Greatest difference, relative to the largest logit.
fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    got.iter().zip(want).fold(0f32, |most, (g, w)| most.max((g - w).abs())) / largest
}

#[test]
fn f32_logits_are_the_cpus_to_1e_4_whatever_the_family_has() {
    for name in
        ["llama-gqa-tied", "llama-biases", "llama-head-dim", "mistral-window", "qwen2-tied-bin", "qwen3"]
    {
        let files = files(&format!("parity/{name}"));
        let driver = StandIn::new();
        let tokens = tokens_of(&files, 24);
        let want = on_cpu(&files, Activations::F32, &tokens);
        let got = on_card::<f32>(&card(&driver, Budget::UNLIMITED), &files, &tokens, 5);
        let distance = distance(&got, &want);
        assert!(distance < 1e-4, "{name}: {distance:e}");
    }
}

#[test]
fn families_of_other_blocks_are_refused_with_those_that_are_not() {
    for name in ["gemma", "starcoder2-full"] {
        let files = files(&format!("parity/{name}"));
        let driver = StandIn::new();
        let capacity = Capacity { rows: 1, context: 16, blocks: 1 };
        let refused = CardModel::<f32>::load(&card(&driver, Budget::UNLIMITED), &files, capacity);
        let error = refused.err().expect("refused").to_string();
        assert!(error.contains(&files.config.model_type) && error.contains("llama, mistral"), "{error}");
    }
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

fn converted(files: &ModelFiles, format: FormatRef) -> ModelFiles {
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

#[test]
fn packed_weights_give_the_engines_logits_alone_in_a_batch_and_recorded() {
    let plain = files("tiny-chat");
    for format in [quant::Q8_0, quant::Q4_0] {
        let files = converted(&plain, format);
        let driver = StandIn::new();
        let card = card(&driver, Budget::UNLIMITED);
        let tokens = tokens_of(&files, 40);
        let want = on_cpu(&files, Activations::Int8, &tokens);
        // The engine keeps 16-bit keys and values beside quantized weights.
        let alone = on_card::<half::f16>(&card, &files, &tokens, 1);
        let distance = distance(&alone, &want);
        assert!(distance < 1e-4, "{format:?}: {distance:e}");
        assert_eq!(driver.count("graphs"), 39, "every step but the first is one launch");
        for batch in [3, 8] {
            let together = on_card::<half::f16>(&card, &files, &tokens, batch);
            assert!(together == alone, "{format:?}: {batch} rows at a time");
        }
    }
}

#[test]
fn no_order_that_the_card_may_choose_changes_a_bit() {
    let files = converted(&files("tiny-chat"), quant::Q8_0);
    let tokens = tokens_of(&files, 20);
    let run = |policy, schedule| {
        let driver = StandIn::new();
        let card = card(&driver, Budget::UNLIMITED);
        driver.set("policy", policy);
        driver.set("schedule", schedule);
        on_card::<i8>(&card, &files, &tokens, 3)
    };
    let first = run(0, 0);
    for (policy, schedule) in [(1, 1), (2, 2), (3, 3)] {
        assert!(run(policy, schedule) == first, "policy {policy}, schedule {schedule}");
    }
}

#[test]
fn smaller_caches_stay_near_and_take_less() {
    let files = files("tiny-chat");
    let tokens = tokens_of(&files, 40);
    let want = on_cpu(&files, Activations::F32, &tokens);
    let driver = StandIn::new();
    let card = card(&driver, Budget::UNLIMITED);
    let mut peak = u64::MAX;
    let mut run = |got: Vec<f32>, limit: f32| {
        assert!(distance(&got, &want) < limit, "{:e}", distance(&got, &want));
        let held = card.ledger().peak(Tier::Device);
        assert!(held < peak, "{held} bytes after {peak}");
        peak = held;
        card.ledger().reset_peaks();
    };
    run(on_card::<f32>(&card, &files, &tokens, 4), 1e-4);
    run(on_card::<half::f16>(&card, &files, &tokens, 4), 2e-3);
    run(on_card::<i8>(&card, &files, &tokens, 4), 2e-2);
}

#[test]
fn a_budget_too_small_and_rows_that_do_not_fit_are_sentences() {
    let files = files("tiny-chat");
    let driver = StandIn::new();
    let capacity = Capacity { rows: 1, context: 32, blocks: 2 };
    let small = card(&driver, Budget::device(1000));
    let refused = CardModel::<f32>::load(&small, &files, capacity).err().expect("1000 bytes hold no model");
    assert!(refused.to_string().starts_with("device tier: needs "), "{refused}");
    let card = card(&driver, Budget::UNLIMITED);
    let mut model = CardModel::<f32>::load(&card, &files, capacity).expect("it fits");
    let token = Token { id: 1, position: 0, length: 1, table: &[0] };
    let mut sentence = |tokens: &[Token<'_>]| model.step(tokens).expect_err("refused").to_string();
    assert_eq!(sentence(&[token, token]), "decode: rows is 2, at most 1 is needed");
    assert_eq!(sentence(&[Token { position: 32, ..token }]), "decode: a position is 32, below 32 is needed");
    assert_eq!(
        sentence(&[Token { position: 16, ..token }]),
        "decode: a block table has 1 elements, 2 are needed"
    );
    assert_eq!(sentence(&[Token { table: &[2], ..token }]), "decode: a KV block is 2, below 2 is needed");
    assert_eq!(sentence(&[Token { id: 1 << 20, ..token }]), "token 1048576 is outside the vocabulary of 320");
}

#[test]
fn a_card_lost_between_steps_ends_with_a_sentence() {
    let files = files("tiny-chat");
    let driver = StandIn::new();
    let card = card(&driver, Budget::UNLIMITED);
    let capacity = Capacity { rows: 1, context: 32, blocks: 2 };
    let mut model = CardModel::<f32>::load(&card, &files, capacity).expect("it fits");
    let token = |position| Token { id: 1, position, length: 1, table: &[0, 1] };
    model.step(&[token(0)]).expect("it works");
    driver.set("launches", 0);
    let error = model.step(&[token(1)]).expect_err("the card is gone").to_string();
    assert!(error.starts_with("the card was lost at cu"), "{error}");
}
