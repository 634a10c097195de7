//! KV blocks that the device has no room for, kept on the host: found again, and otherwise nothing is different, bit for bit.

use crate::fixtures::*;
use crate::invariance::bits;
use hearth_engine::api::{Adapter, EngineStats, Request};
use hearth_engine::{
    Activations, Arithmetic, Engine, EngineConfig, EngineHandle, LoadedModel, Speculation, footprint,
};
use hearth_kernels::paged::KvType;
use hearth_memory::{Budget, Ledger, Size, Tier};
use std::sync::Arc;

/// Turns of `conversations` that begin alike: each asks for all it said before and something new, longer every round.
fn turns(conversations: usize, rounds: usize, vocab: usize) -> Vec<Request> {
    let turn = |i: usize| {
        let (round, who) = (i / conversations, i % conversations);
        let prompt: Vec<u32> =
            (0..36 + 8 * round).map(|p| ((p * 7 + who * 31 + p * p * who) % vocab) as u32).collect();
        Request { logprobs: Some(2), ..greedy(&prompt, 6) }
    };
    (0..conversations * rounds).map(turn).collect()
}

fn config(block: u64, blocks: u64, host: u64) -> EngineConfig {
    EngineConfig {
        max_seqs: 3,
        max_batch_tokens: 24,
        context_limit: Some(96),
        kv_bytes: Some(blocks * block),
        kv_host_bytes: host * block,
        ..EngineConfig::default()
    }
}

fn alone(model: &LoadedModel, requests: &[Request]) -> Vec<String> {
    let config = EngineConfig { max_seqs: 1, adapter_rank: 64, ..EngineConfig::default() };
    let engine = || Engine::start(model.clone(), config).expect("fits without a budget");
    requests.iter().map(|r| bits(&events(engine().submit(r.clone()).expect("fits")))).collect()
}

/// Asks for everything, three at a time, and holds the answers against those given alone.
fn check(engine: &EngineHandle, requests: &[Request], alone: &[String], what: &str) -> EngineStats {
    for (requests, alone) in requests.chunks(3).zip(alone.chunks(3)) {
        let running: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
        for (generation, alone) in running.into_iter().zip(alone) {
            assert_eq!(&bits(&events(generation)), alone, "{what}");
        }
    }
    engine.drain();
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.kv_blocks_used), (requests.len() as u64, 0), "{what}");
    assert!(stats.kv_host_blocks_held <= stats.kv_host_blocks_total, "{what}");
    stats
}

#[test]
fn responses_are_bit_equal_with_a_host_tier_whatever_the_cache_stores() {
    let files = open("tiny-chat");
    let requests = turns(5, 3, files.config.vocab_size);
    for (name, kind) in KvType::ALL {
        let arithmetic = Arithmetic { activations: Activations::F32, kv_type: Some(kind) };
        let ledger = Ledger::default();
        let model = LoadedModel::load(&files, arithmetic, &ledger, &|_| ()).expect("no budget");
        let alone = alone(&model, &requests);
        let block = footprint::kv_block_bytes(&files.config, kind);
        let cached = [0, 2, 40].map(|host| {
            let engine = Engine::start(model.clone(), config(block, 9, host)).expect("no budget");
            assert_eq!(ledger.used(Tier::Host), host * block);
            assert_eq!(engine.stats().kv_host_bytes, host * block);
            let stats = check(&engine, &requests, &alone, &format!("{name}, {host} blocks on the host"));
            assert_eq!(stats.kv_host_blocks_total as u64, host);
            assert!(stats.kv_blocks_brought_back > 0 || host < 40, "{stats:?}");
            assert_eq!(stats.kv_blocks_moved_out > 0, host > 0);
            stats.cached_tokens
        });
        assert!(cached[2] > cached[0], "{name}: {cached:?} tokens found");
        assert_eq!(ledger.used(Tier::Host), 0);
    }
}

#[test]
fn what_lies_on_the_host_is_shared_under_the_same_adapter_alone() {
    let files = open("parity/llama-gqa-tied");
    let model = load(&files);
    let block = footprint::kv_block_bytes(&files.config, KvType::F32);
    let config = EngineConfig { adapter_rank: 64, ..config(block, 9, 100) };
    let engine = Engine::start(model.clone(), config).expect("no budget");
    let adapter: Arc<Adapter> = engine.load_adapter(&fixtures().join("lora/plain/adapter")).expect("it fits");
    let with = |adapter: Option<&Arc<Adapter>>| {
        let turns = turns(3, 2, files.config.vocab_size).into_iter();
        turns.map(|turn| Request { adapter: adapter.cloned(), ..turn }).collect::<Vec<_>>()
    };
    let (base, adapted) = (with(None), with(Some(&adapter)));
    let all: Vec<Request> =
        base.chunks(3).zip(adapted.chunks(3)).flat_map(|(b, a)| [b, a].concat()).collect();
    let alone = alone(&model, &all);
    assert_ne!(alone[0], alone[3], "the adapter tells");
    let stats = check(&engine, &all, &alone, "with and without an adapter");
    assert!(stats.kv_blocks_brought_back > 0, "{stats:?}");
}

#[test]
fn a_draft_model_s_blocks_go_where_the_model_s_go() {
    let files = open("tiny-chat");
    let model = load(&files);
    let requests = turns(5, 3, files.config.vocab_size);
    let alone = alone(&model, &requests);
    let block = 2 * footprint::kv_block_bytes(&files.config, KvType::F32);
    let rate = |host| {
        let speculation = Some(Speculation { draft_tokens: 3 });
        let config = EngineConfig { speculation, ..config(block, 12, host) };
        let engine = Engine::start_with_draft(model.clone(), load(&files), config).expect("no budget");
        let stats = check(&engine, &requests, &alone, &format!("{host} blocks on the host"));
        assert_eq!(stats.kv_blocks_brought_back > 0, host > 0, "{stats:?}");
        stats.accepted_tokens as f64 / stats.draft_tokens as f64
    };
    // The model is its own draft: it is wrong only where its cache is.
    assert!(rate(60) > 0.8 && rate(0) > 0.8, "{} and {} guesses right", rate(60), rate(0));
}

#[test]
fn preempted_sequences_find_their_blocks_on_the_host() {
    let files = open("tiny-chat");
    let model = load(&files);
    let requests: Vec<Request> = (0..6).map(|i: u32| greedy(&[i, 3, 5 + i], 90)).collect();
    let alone = alone(&model, &requests);
    let block = footprint::kv_block_bytes(&files.config, KvType::F32);
    for host in [0, 50] {
        let engine = Engine::start(model.clone(), config(block, 9, host)).expect("no budget");
        let running: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
        for (generation, alone) in running.into_iter().zip(&alone) {
            assert_eq!(&bits(&events(generation)), alone, "{host} blocks on the host");
        }
        engine.drain();
        let stats = engine.stats();
        assert!(stats.preemptions > 0, "{stats:?}");
        assert_eq!(stats.kv_blocks_brought_back > 0, host > 0, "{stats:?}");
    }
}

#[test]
fn a_host_tier_is_within_the_budget_or_refused() {
    let files = open("tiny-chat");
    let block = footprint::kv_block_bytes(&files.config, KvType::F32);
    let start = |host: u64, limit: u64| {
        let budget = Budget { host: Some(Size(limit)), ..Budget::UNLIMITED };
        let ledger = Ledger::new(budget);
        let model = LoadedModel::load(&files, Activations::F32, &ledger, &|_| ()).expect("no budget");
        let config = EngineConfig { kv_host_bytes: host, ..EngineConfig::default() };
        Engine::start(model, config)
            .map(|engine| (engine.stats().kv_host_blocks_total, ledger.peak(Tier::Host)))
    };
    assert_eq!(start(4 * block + 5, 4 * block).expect("it fits"), (4, 4 * block));
    let refused = |host, limit| start(host, limit).expect_err("refused").to_string();
    assert_eq!(
        refused(5 * block, 4 * block),
        format!("host tier: needs {} bytes, {} free of {}", 5 * block, 4 * block, 4 * block)
    );
    let none = refused(block - 1, 4 * block);
    assert!(none.contains(&format!("one takes {block} bytes")), "{none}");
}
