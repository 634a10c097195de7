//! A hard budget: kept, or refused with the smallest that works.

use crate::fixtures::*;
use hearth_engine::{Activations, Engine, EngineConfig, Error, LoadedModel, Scorer};
use hearth_memory::{Budget, Ledger, Tier};
use hearth_weights::ModelFiles;
use std::sync::Mutex;

fn load_within(files: &ModelFiles, bytes: u64) -> Result<LoadedModel, Error> {
    LoadedModel::load(files, Activations::F32, &Ledger::new(Budget::device(bytes)), &|_| ())
}

#[test]
fn the_smallest_budget_named_in_a_refusal_is_enough_and_is_kept() {
    let files = open("tiny-chat");
    let Err(Error::TooSmall(shortfall)) = load_within(&files, 10_000) else { panic!("far too small") };
    let message = shortfall.to_string();
    assert!(message.starts_with("device tier: needs ") && message.contains(" 10000 free"), "{message}");
    assert!(
        message.ends_with(&format!("smallest budget that works is {}", shortfall.smallest())),
        "{message}"
    );

    let model = load_within(&files, shortfall.smallest().bytes()).expect("the message says so");
    let ledger = model.ledger().clone();
    let engine = Engine::start(model, EngineConfig::default()).expect("the message says so");
    assert!(engine.context_limit() >= 128);
    let generation = engine.submit(greedy(&[1, 2, 3], 100)).expect("fits");
    assert_eq!(tokens(&events(generation)).len(), 100);
    assert!(ledger.peak(Tier::Device) <= shortfall.smallest().bytes());
}

#[test]
fn a_smaller_budget_means_a_smaller_step_and_cache_before_a_refusal() {
    let files = open("tiny-chat");
    let mut last = 0;
    for kib in [1100, 1400, 2000, 4000, 8000] {
        let model = load_within(&files, kib << 10).expect("fits");
        let engine = Engine::start(model, EngineConfig::default()).expect("fits");
        let blocks = engine.stats().kv_blocks_total;
        assert!(blocks >= last && engine.context_limit() <= 512, "{kib} KiB: {blocks} after {last}");
        last = blocks;
    }
    assert_eq!(last, 16 * 512 / 16, "no more than full sequences need");
}

#[test]
fn an_explicit_context_limit_is_honoured_or_refused() {
    let files = open("tiny-chat");
    let config = EngineConfig { context_limit: Some(100_000), ..EngineConfig::default() };
    let model = load_within(&files, 4 << 20).expect("fits");
    let error = Engine::start(model, config).err().expect("too long").to_string();
    assert!(error.contains("KV cache for 100000 tokens"), "{error}");
    let config = EngineConfig { context_limit: Some(200), kv_bytes: Some(1), ..EngineConfig::default() };
    let error = Engine::start(load(&files), config).err().expect("too small").to_string();
    assert!(error.contains("holds fewer than 200 tokens"), "{error}");
    let error = Scorer::new(load_within(&files, 4 << 20).expect("fits"), 100_000).err().expect("too long");
    assert!(matches!(error, Error::TooSmall(_)));
}

#[test]
fn bounds_that_contradict_are_refused_with_what_to_change() {
    let model = load(&open("tiny-chat"));
    let base = EngineConfig::default();
    for (config, expected) in [
        (EngineConfig { max_seqs: 0, ..base }, "max_seqs is 0"),
        (EngineConfig { max_seqs: 9, max_batch_tokens: 8, ..base }, "at least max_seqs, which is 9"),
        (EngineConfig { context_limit: Some(0), ..base }, "context limit is 0"),
    ] {
        let error = Engine::start(model.clone(), config).err().expect(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn progress_ends_at_the_bytes_charged() {
    let files = open("parity/qwen3-tied-biases-sharded");
    let seen = Mutex::new(Vec::new());
    let progress = |p| seen.lock().expect("no panic").push(p);
    let model =
        LoadedModel::load(&files, Activations::F32, &Ledger::default(), &progress).expect("no budget");
    let seen = seen.into_inner().expect("no panic");
    assert!(seen.iter().all(|p| p.done <= p.total && p.total == model.weight_bytes()));
    assert_eq!(seen.iter().map(|p| p.done).max(), Some(model.weight_bytes()));
}
