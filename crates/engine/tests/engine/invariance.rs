//! A response does not depend on who shares the batch, on chunking, or on the blocks it got: bit for bit.

use crate::fixtures::*;
use hearth_engine::api::{Event, Request, Sampling};
use hearth_engine::{Activations, Arithmetic, Engine, EngineConfig, LoadedModel};
use hearth_kernels::paged::KvType;
use hearth_memory::Ledger;

/// Requests of every kind, lengths around the block size.
pub fn requests(vocab: usize, limit: usize) -> Vec<Request> {
    let prompt = |len: usize, salt: usize| -> Vec<u32> {
        (0..len).map(|i| ((i * 7 + salt * 13 + i * i * salt) % vocab) as u32).collect()
    };
    let shapes = [(1, 9), (5, 0), (17, 12), (40, 3), (16, 16), (33, 1), (2, 20)];
    let mut requests: Vec<Request> = shapes
        .iter()
        .enumerate()
        .map(|(i, &(len, max_tokens))| {
            let len = len.min(limit - max_tokens.min(limit - 1));
            greedy(&prompt(len, i), max_tokens.min(limit - len))
        })
        .collect();
    for (i, request) in requests.iter_mut().enumerate() {
        request.logprobs = Some(i);
        request.prompt_logprobs = (i % 2 == 1).then_some(2);
        if i % 3 == 0 {
            request.sampling = Sampling { seed: Some(i as u64), top_p: 0.95, ..Sampling::default() };
        }
    }
    requests
}

/// Every float as bits: `==` would let −0 pass for 0.
pub fn bits(events: &[Event]) -> String {
    let report = |r: &hearth_engine::api::TokenLogprobs| {
        let top: Vec<_> = r.top.iter().map(|(t, p)| (*t, p.to_bits())).collect();
        format!("{} {:x} {top:x?}; ", r.token, r.logprob.to_bits())
    };
    let event = |e: &Event| match e {
        Event::Prompt(rows) => rows.iter().map(|r| r.as_ref().map_or("none; ".into(), report)).collect(),
        Event::Token { id, logprobs } => {
            format!("token {id} {}", logprobs.as_ref().map_or("".into(), report))
        }
        // How much was found computed depends on who came before; nothing else does.
        Event::Finished { reason, .. } => format!("{reason:?}"),
        other => format!("{other:?}"),
    };
    events.iter().map(event).collect::<Vec<_>>().join("\n")
}

fn alone(model: &LoadedModel, requests: &[Request]) -> Vec<String> {
    let run = |r: &Request| {
        let engine = start(model, 1, 1024);
        bits(&events(engine.submit(r.clone()).expect("fits")))
    };
    requests.iter().map(run).collect()
}

#[test]
fn responses_are_bit_equal_alone_in_a_mix_and_at_any_chunk_size() {
    for case in [
        "tiny-chat",
        "parity/mistral-window",
        "parity/qwen3",
        "parity/qwen2-layer-types",
        "parity/llama-rope-dynamic",
        "parity/gemma",
        "parity/starcoder2-window",
    ] {
        let files = open(case);
        let model = load(&files);
        let limit = files.config.max_position_embeddings;
        let requests = requests(files.config.vocab_size, limit);
        let alone = alone(&model, &requests);
        for (max_seqs, max_batch_tokens) in [(1, 1), (2, 2), (7, 7), (3, 16), (7, 21), (7, 1024)] {
            let engine = start(&model, max_seqs, max_batch_tokens);
            let running: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
            for (i, (generation, alone)) in running.into_iter().zip(&alone).enumerate() {
                let mixed = bits(&events(generation));
                assert_eq!(
                    &mixed, alone,
                    "{case}: request {i}, {max_seqs} sequences, {max_batch_tokens} tokens"
                );
            }
        }
    }
}

#[test]
fn responses_are_bit_equal_when_the_cache_is_nearly_full_and_blocks_are_reused() {
    let files = open("tiny-chat");
    let model = load(&files);
    let requests = requests(files.config.vocab_size, 64);
    let alone = alone(&model, &requests);
    let block = hearth_engine::footprint::kv_block_bytes(&files.config, KvType::F32);
    let config = EngineConfig {
        max_seqs: 7,
        max_batch_tokens: 24,
        context_limit: Some(64),
        kv_bytes: Some(5 * block),
        ..EngineConfig::default()
    };
    let engine = Engine::start(model, config).expect("64 tokens fit 5 blocks");
    let running: Vec<_> =
        (0..21).map(|i| engine.submit(requests[i % 7].clone()).expect("fits, sooner or later")).collect();
    assert_eq!(engine.stats().kv_blocks_total, 5);
    for (i, generation) in running.into_iter().enumerate() {
        assert_eq!(bits(&events(generation)), alone[i % 7], "request {i}");
    }
    engine.drain();
    assert_eq!((engine.stats().finished, engine.stats().kv_blocks_used), (21, 0));
}

fn cached(events: &[Event]) -> usize {
    match events.last() {
        Some(Event::Finished { cached_tokens, .. }) => *cached_tokens,
        other => panic!("{other:?}"),
    }
}

#[test]
fn responses_are_bit_equal_whatever_the_prefix_cache_holds() {
    for case in ["tiny-chat", "parity/mistral-window", "parity/llama-rope-dynamic"] {
        let files = open(case);
        let model = load(&files);
        let limit = files.config.max_position_embeddings.min(96);
        let longest = limit - 8;
        let prompt: Vec<u32> = (0..longest).map(|i| (i * 7 % files.config.vocab_size) as u32).collect();
        let mut requests: Vec<Request> = [17, 40, 48, longest]
            .into_iter()
            .filter(|len| *len <= longest)
            .map(|len| Request { logprobs: Some(2), ..greedy(&prompt[..len], 8) })
            .collect();
        requests.extend(requests.clone().into_iter().map(|mut request| {
            let last = request.prompt.len() - 1;
            request.prompt[last] ^= 1;
            request
        }));
        let alone = alone(&model, &requests);
        for (max_seqs, max_batch_tokens) in [(1, 20), (8, 16)] {
            let engine = start(&model, max_seqs, max_batch_tokens);
            let mut found = 0;
            for _ in 0..2 {
                let running: Vec<_> =
                    requests.iter().rev().map(|r| engine.submit(r.clone()).expect("fits")).collect();
                for (generation, alone) in running.into_iter().zip(alone.iter().rev()) {
                    let events = events(generation);
                    found += cached(&events);
                    assert_eq!(
                        &bits(&events),
                        alone,
                        "{case}: {max_seqs} sequences, {max_batch_tokens} tokens"
                    );
                }
            }
            engine.drain();
            let stats = engine.stats();
            // There every length is a root of its own.
            assert!(found > 0 || case == "parity/llama-rope-dynamic");
            assert_eq!(stats.cached_tokens, found as u64);
        }
    }
}

#[test]
fn samples_of_one_prompt_share_its_full_blocks() {
    let files = open("tiny-chat");
    let model = load(&files);
    let mut request = greedy(&(0..40).map(|i| i * 3).collect::<Vec<u32>>(), 10);
    let sample = |seed| {
        request.sampling = Sampling { seed: Some(seed), ..Sampling::default() };
        request.clone()
    };
    let requests: Vec<Request> = (0..4).map(sample).collect();
    let alone = alone(&model, &requests);
    let engine = start(&model, 4, 16);
    let running: Vec<_> = requests.into_iter().map(|r| engine.submit(r).expect("fits")).collect();
    let ended: Vec<_> = running.into_iter().map(events).collect();
    assert_eq!(ended.iter().map(|e| bits(e)).collect::<Vec<_>>(), alone);
    let mut found: Vec<usize> = ended.iter().map(|e| cached(e)).collect();
    found.sort_unstable();
    assert_eq!(found, [0, 32, 32, 32]);
    engine.drain();
    assert_eq!(engine.stats().prompt_tokens, 40 + 3 * 8);
}

#[test]
fn responses_are_bit_equal_when_sequences_are_preempted() {
    let files = open("tiny-chat");
    let model = load(&files);
    let request = |i: u32| Request { logprobs: Some(1), ..greedy(&[i, 3, 5 + i], 60) };
    let requests: Vec<Request> = (0..4).map(request).collect();
    let alone = alone(&model, &requests);
    let block = hearth_engine::footprint::kv_block_bytes(&files.config, KvType::F32);
    let config = EngineConfig {
        max_seqs: 4,
        max_batch_tokens: 24,
        context_limit: Some(64),
        kv_bytes: Some(9 * block),
        ..EngineConfig::default()
    };
    let engine = Engine::start(model, config).expect("64 tokens fit 9 blocks");
    let running: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
    for (generation, alone) in running.into_iter().zip(&alone) {
        assert_eq!(&bits(&events(generation)), alone);
    }
    engine.drain();
    assert!(engine.stats().preemptions > 0 && engine.stats().kv_blocks_used == 0);
}

#[test]
fn cancelled_requests_leave_the_others_alone_and_their_blocks_behind() {
    let files = open("tiny-chat");
    let model = load(&files);
    let requests = requests(files.config.vocab_size, 64);
    let alone = alone(&model, &requests);
    let engine = start(&model, 4, 8);
    let mut kept = Vec::new();
    for request in &requests {
        let mut doomed = engine.submit(greedy(&[1, 2, 3], 400)).expect("fits");
        kept.push(engine.submit(request.clone()).expect("fits"));
        assert!(matches!(doomed.next_blocking(), Some(Event::Token { .. })));
    }
    for (generation, alone) in kept.into_iter().zip(&alone) {
        assert_eq!(&bits(&events(generation)), alone);
    }
    engine.drain();
    let stats = engine.stats();
    assert_eq!((stats.finished + stats.cancelled, stats.kv_blocks_used), (14, 0));
}

#[test]
fn responses_do_not_depend_on_the_batch_whatever_the_kv_cache_stores() {
    let files = open("tiny-chat");
    let block = |kind| hearth_engine::footprint::kv_block_bytes(&files.config, kind);
    for (name, kind) in KvType::ALL {
        let ledger = Ledger::default();
        let arithmetic = Arithmetic { activations: Activations::F32, kv_type: Some(kind) };
        let model = LoadedModel::load(&files, arithmetic, &ledger, &|_| ()).expect("no budget");
        let all = requests(files.config.vocab_size, files.config.max_position_embeddings);
        let alone = alone(&model, &all);
        for (max_seqs, max_batch_tokens, blocks) in [(7, 7, 100), (7, 64, 12), (3, 1024, 9)] {
            let config = EngineConfig {
                max_seqs,
                max_batch_tokens,
                context_limit: Some(64),
                kv_bytes: Some(blocks * block(kind)),
                ..EngineConfig::default()
            };
            let engine = Engine::start(model.clone(), config).expect("no budget");
            let cache = engine.stats().kv_bytes;
            assert_eq!(cache % block(kind), 0);
            assert!(ledger.used(hearth_memory::Tier::Device) > model.weight_bytes() + cache);
            // Twice, so that the second time prompts are found computed.
            for _ in 0..2 {
                let running: Vec<_> = all.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
                for (i, (generation, alone)) in running.into_iter().zip(&alone).enumerate() {
                    assert_eq!(&bits(&events(generation)), alone, "{name}: request {i}, {blocks} blocks");
                }
            }
        }
    }
    let [f32, f16, bf16, int8] = KvType::ALL.map(|(_, kind)| block(kind));
    assert_eq!((f32, f16), (2 * f16, bf16));
    assert!(int8 < f16, "{int8} bytes a block");
}

#[test]
fn memory_is_back_where_it_was_when_an_engine_ends() {
    let files = open("tiny-chat");
    let ledger = Ledger::default();
    let model = LoadedModel::load(&files, Activations::F32, &ledger, &|_| ()).expect("no budget");
    let before = ledger.used(hearth_memory::Tier::Device);
    assert_eq!(before, model.weight_bytes());
    let engine = start(&model, 2, 8);
    assert_eq!(engine.stats().weight_bytes, before);
    assert!(ledger.used(hearth_memory::Tier::Device) > before + engine.stats().kv_bytes);
    let generation = engine.submit(greedy(&[1], 400)).expect("fits");
    engine.shutdown();
    drop(generation);
    assert_eq!(ledger.used(hearth_memory::Tier::Device), before);
    drop(model);
    drop(engine);
    assert_eq!(ledger.used(hearth_memory::Tier::Device), 0);
}
