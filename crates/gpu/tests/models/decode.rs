//! Models decoded through the card's launches against the CPU engine's logits, with the driver that runs kernels on the CPU.

use crate::fixtures::{card, converted, files};
use hearth_cuda::decoder::{Capacity, Wanted, blocks_of};
use hearth_cuda::ops::paged::CacheElement;
use hearth_cuda::runtime::Device;
use hearth_cuda_stand_in::StandIn;
use hearth_engine::{Activations, LoadedModel, Scorer};
use hearth_gpu::CardModel;
use hearth_gpu::model::Span;
use hearth_memory::{Budget, Ledger, Tier};
use hearth_weights::{ModelFiles, quant};
use std::sync::Arc;

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
    let capacity = Capacity { rows: batch, sequences: batch, context: tokens.len(), blocks, host_blocks: 0 };
    let mut model = CardModel::<T>::load(card, files, capacity).expect("it fits");
    // Not in order, so that a table that is ignored shows.
    let table: Vec<u32> = (0..blocks as u32).rev().collect();
    let mut logits = Vec::new();
    for (number, tokens) in tokens.chunks(batch).enumerate() {
        let position = number * batch;
        let span = span(tokens, position, &table);
        model.step(&[span], &mut |_, _, row| logits.extend_from_slice(row)).expect("it works");
    }
    logits
}

/// Tokens whose logits are all wanted.
fn span<'a>(tokens: &'a [u32], position: usize, table: &'a [u32]) -> Span<'a> {
    Span { tokens, position, length: 0, table, wanted: 0..tokens.len(), what: Wanted::Logits }
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
        let capacity = Capacity { rows: 1, sequences: 1, context: 16, blocks: 1, host_blocks: 0 };
        let refused = CardModel::<f32>::load(&card(&driver, Budget::UNLIMITED), &files, capacity);
        let error = refused.err().expect("refused").to_string();
        assert!(error.contains(&files.config.model_type) && error.contains("llama, mistral"), "{error}");
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
        for batch in [3, 16, 25] {
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
    let capacity = Capacity { rows: 1, sequences: 1, context: 32, blocks: 2, host_blocks: 0 };
    let small = card(&driver, Budget::device(1000));
    let refused = CardModel::<f32>::load(&small, &files, capacity).err().expect("1000 bytes hold no model");
    assert!(refused.to_string().starts_with("device tier: needs "), "{refused}");
    let card = card(&driver, Budget::UNLIMITED);
    let mut model = CardModel::<f32>::load(&card, &files, capacity).expect("it fits");
    let mut sentence =
        |spans: &[Span<'_>]| model.step(spans, &mut |_, _, _| ()).expect_err("refused").to_string();
    let one = span(&[1], 0, &[0]);
    assert_eq!(sentence(&[span(&[1, 1], 0, &[0])]), "decode: rows is 2, at most 1 is needed");
    assert_eq!(sentence(&[one.clone(), span(&[], 0, &[0])]), "decode: sequences is 2, at most 1 is needed");
    assert_eq!(sentence(&[span(&[1], 32, &[0])]), "decode: a position is 32, below 32 is needed");
    assert_eq!(sentence(&[span(&[1], 16, &[0])]), "decode: a block table has 1 elements, 2 are needed");
    assert_eq!(sentence(&[span(&[1], 0, &[2])]), "decode: a KV block is 2, below 2 is needed");
    assert_eq!(sentence(&[Span { wanted: 0..2, ..one }]), "decode: a wanted row is 2, at most 1 is needed");
    assert_eq!(sentence(&[span(&[1 << 20], 0, &[0])]), "token 1048576 is outside the vocabulary of 320");
}

#[test]
fn a_card_lost_between_steps_ends_with_a_sentence() {
    let files = files("tiny-chat");
    let driver = StandIn::new();
    let card = card(&driver, Budget::UNLIMITED);
    let capacity = Capacity { rows: 1, sequences: 1, context: 32, blocks: 2, host_blocks: 0 };
    let mut model = CardModel::<f32>::load(&card, &files, capacity).expect("it fits");
    let mut step = |position| model.step(&[span(&[1], position, &[0, 1])], &mut |_, _, _| ());
    step(0).expect("it works");
    driver.set("launches", 0);
    let error = step(1).expect_err("the card is gone").to_string();
    assert!(error.starts_with("the card was lost at cu"), "{error}");
}
