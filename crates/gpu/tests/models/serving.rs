//! The engine over a card: its answers are those of the engine on the CPU, whatever shares a step, with the driver that runs
//! kernels on the CPU.

use crate::fixtures::{card, converted, files};
use hearth_cuda_stand_in::StandIn;
use hearth_engine::api::{Event, Generation, Pooling, Request, Sampling, TokenLogprobs};
use hearth_engine::footprint::kv_block_bytes;
use hearth_engine::{
    Activations, Arithmetic, Backend, Engine, EngineConfig, EngineHandle, KvType, LoadedModel, Speculation,
};
use hearth_gpu::CardBackend;
use hearth_memory::{Budget, Ledger, Tier};
use hearth_weights::{ModelFiles, quant};

fn config(max_seqs: usize, max_batch_tokens: usize) -> EngineConfig {
    let context_limit = Some(96);
    EngineConfig { max_seqs, max_batch_tokens, context_limit, ..EngineConfig::default() }
}

fn on_cpu(files: &ModelFiles, arithmetic: Arithmetic, config: EngineConfig) -> EngineHandle {
    let model = LoadedModel::load(files, arithmetic, &Ledger::default(), &|_| ()).expect("no budget");
    Engine::start(model, config).expect("no budget")
}

fn on_card(
    driver: &StandIn,
    files: &ModelFiles,
    arithmetic: Arithmetic,
    config: EngineConfig,
) -> EngineHandle {
    let card = card(driver, Budget::UNLIMITED);
    Engine::start_on(CardBackend::new(&card, files, arithmetic).expect("known"), config).expect("no budget")
}

fn arithmetic(activations: Activations) -> Arithmetic {
    activations.into()
}

/// Token ids that begin alike, so that prefixes can be found again.
fn prompt(files: &ModelFiles, number: usize, len: usize) -> Vec<u32> {
    let own = |i: usize| if i < 20 { i * 11 + 3 } else { i * 7 + number * 13 + 1 };
    (0..len).map(|i| (own(i) % files.config.vocab_size) as u32).collect()
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        logprobs: Some(2),
        prompt_logprobs: None,
        adapter: None,
    }
}

fn events(mut generation: Generation) -> Vec<Event> {
    std::iter::from_fn(|| generation.next_blocking()).collect()
}

/// What was said of each generated token, and the prompt's tokens that were found.
fn answer(events: &[Event]) -> (Vec<TokenLogprobs>, usize) {
    let mut tokens = Vec::new();
    for event in events {
        match event {
            Event::Token { logprobs, .. } => tokens.push(logprobs.clone().expect("asked for")),
            Event::Finished { cached_tokens, .. } => return (tokens, *cached_tokens),
            other => panic!("{other:?}"),
        }
    }
    panic!("no end: {events:?}")
}

/// All at once.
fn together(engine: &EngineHandle, requests: Vec<Request>) -> Vec<(Vec<TokenLogprobs>, usize)> {
    let submitted = requests.into_iter().map(|r| engine.submit(r).expect("it is taken")).collect::<Vec<_>>();
    submitted.into_iter().map(|generation| answer(&events(generation))).collect()
}

fn ids(answer: &(Vec<TokenLogprobs>, usize)) -> Vec<u32> {
    answer.0.iter().map(|token| token.token).collect()
}

const FAMILIES: [&str; 6] =
    ["llama-gqa-tied", "llama-rope-dynamic", "mistral-window", "qwen2-tied-bin", "qwen3", "llama-biases"];

#[test]
fn greedy_tokens_are_the_cpus_for_every_family() {
    for name in FAMILIES {
        let files = files(&format!("parity/{name}"));
        let requests = || (0..3).map(|i| request(prompt(&files, i, 9 + 13 * i), 8)).collect::<Vec<_>>();
        let exact = arithmetic(Activations::F32);
        let want = together(&on_cpu(&files, exact, config(3, 16)), requests());
        let driver = StandIn::new();
        let got = together(&on_card(&driver, &files, exact, config(3, 16)), requests());
        for (want, got) in want.iter().zip(&got) {
            assert_eq!(ids(want), ids(got), "{name}");
            let off = want.0.iter().zip(&got.0).map(|(w, g)| (w.logprob - g.logprob).abs());
            assert!(off.fold(0.0, f32::max) < 1e-3, "{name}: {want:?} {got:?}");
        }
    }
}

/// Every request in an engine of its own.
fn alone(driver: &StandIn, files: &ModelFiles, requests: Vec<Request>) -> Vec<Vec<TokenLogprobs>> {
    let start = || on_card(driver, files, arithmetic(Activations::Int8), config(1, 64));
    requests.into_iter().map(|request| together(&start(), vec![request]).remove(0).0).collect()
}

#[test]
fn an_answer_has_the_same_bits_alone_in_a_batch_and_from_the_prefix_cache() {
    let files = converted(&files("tiny-chat"), quant::Q8_0);
    let rounded = arithmetic(Activations::Int8);
    let requests = || (0..3).map(|i| request(prompt(&files, i, 21 + 9 * i), 9)).collect::<Vec<_>>();
    let driver = StandIn::new();
    let alone = alone(&driver, &files, requests());
    assert!(driver.count("graphs") > 0, "steps of one token are recorded");
    let want = together(&on_cpu(&files, rounded, config(3, 64)), requests());
    let tokens = |answer: &Vec<TokenLogprobs>| answer.iter().map(|token| token.token).collect::<Vec<_>>();
    assert_eq!(want.iter().map(ids).collect::<Vec<_>>(), alone.iter().map(tokens).collect::<Vec<_>>());
    for max_batch_tokens in [7, 40] {
        let engine = on_card(&driver, &files, rounded, config(3, max_batch_tokens));
        for again in [false, true] {
            let answers = together(&engine, requests());
            let bits = answers.iter().zip(&alone).all(|(answer, alone)| answer.0 == *alone);
            assert!(bits, "{max_batch_tokens} tokens a step, again: {again}");
            assert!(!again || answers.iter().all(|answer| answer.1 >= 16), "found");
        }
    }
}

#[test]
fn an_answer_has_the_same_bits_after_its_blocks_were_given_up() {
    let files = converted(&files("tiny-chat"), quant::Q8_0);
    let requests = || (0..3).map(|i| request(vec![i, 3, 5 + i], 44)).collect::<Vec<_>>();
    let driver = StandIn::new();
    let alone = alone(&driver, &files, requests());
    // Three sequences come to three blocks each.
    let kv_bytes = Some(5 * kv_block_bytes(&files.config, KvType::F16));
    let config = EngineConfig { kv_bytes, context_limit: Some(64), ..config(3, 24) };
    let engine = on_card(&driver, &files, arithmetic(Activations::Int8), config);
    for (answer, alone) in together(&engine, requests()).iter().zip(&alone) {
        assert!(answer.0 == *alone);
    }
    assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
}

#[test]
fn sampling_guesses_prompt_scores_and_embeddings_are_those_of_any_engine() {
    let files = files("tiny-chat");
    let exact = arithmetic(Activations::F32);
    let seeded = || Request {
        sampling: Sampling { temperature: 0.9, top_p: 0.95, seed: Some(7), ..Sampling::default() },
        prompt_logprobs: Some(0),
        // A text that repeats itself is one that can be guessed.
        ..request((0..66).map(|i| 5 + i % 3).collect(), 24)
    };
    let driver = StandIn::new();
    let run = |engine: EngineHandle| {
        let mut all = events(engine.submit(seeded()).expect("it is taken"));
        let Event::Prompt(scores) = all.remove(0) else { panic!("the prompt first: {all:?}") };
        let embedded = engine.embed(prompt(&files, 1, 70), Pooling::Mean, None).expect("it is taken");
        let Event::Embedding(vector) = events(embedded).remove(0) else { panic!("a vector first") };
        (answer(&all).0, scores, vector, engine.stats().draft_tokens)
    };
    let (want, want_scores, want_vector, _) = run(on_cpu(&files, exact, config(2, 80)));
    let plain = run(on_card(&driver, &files, exact, config(2, 80)));
    let guessing = EngineConfig { speculation: Some(Speculation { draft_tokens: 4 }), ..config(2, 80) };
    let guessed = run(on_card(&driver, &files, exact, guessing));
    assert!(guessed.3 > 0 && plain.3 == 0);
    assert!(
        (&plain.0, &plain.1, &plain.2) == (&guessed.0, &guessed.1, &guessed.2),
        "guessing changes no bit"
    );
    let ids = |tokens: &[TokenLogprobs]| tokens.iter().map(|token| token.token).collect::<Vec<_>>();
    assert_eq!(ids(&want), ids(&plain.0));
    let scores = want_scores.iter().flatten().zip(plain.1.iter().flatten());
    assert!(
        scores.clone().count() == 65
            && scores.fold(0.0, |m, (w, g)| (w.logprob - g.logprob).abs().max(m)) < 1e-3
    );
    let off = want_vector.iter().zip(&plain.2).fold(0f32, |m, (w, g)| (w - g).abs().max(m));
    assert!(want_vector.len() == files.config.hidden_size && off < 1e-3, "{off}");
}

#[test]
fn blocks_that_went_to_the_host_come_back_as_they_were() {
    let files = files("tiny-chat");
    for kv_type in [KvType::F16, KvType::Int8] {
        let arithmetic = Arithmetic { activations: Activations::F32, kv_type: Some(kv_type) };
        let block = kv_block_bytes(&files.config, kv_type);
        // Whatever is sent late is done as late as it may be.
        let driver = StandIn::new();
        driver.set("policy", 3);
        // Each prompt of three blocks pushes the one before out of six.
        let kv_bytes = Some(6 * block);
        let config = EngineConfig { kv_bytes, kv_host_bytes: 9 * block, ..config(1, 48) };
        let engine = on_card(&driver, &files, arithmetic, config);
        let ask = |number: usize| {
            let own = (0..50).map(|i| ((i * 5 + number * 17) % files.config.vocab_size) as u32).collect();
            together(&engine, vec![request(own, 3)]).remove(0)
        };
        let first: Vec<_> = (0..4).map(ask).collect();
        let again: Vec<_> = (0..4).map(ask).collect();
        for (first, again) in first.iter().zip(&again) {
            assert!(first.0 == again.0 && again.1 == 48, "{kv_type:?}: {} found", again.1);
        }
        let stats = engine.stats();
        assert!(stats.kv_blocks_moved_out > 6 && stats.kv_blocks_brought_back > 6, "{stats:?}");
    }
}

#[test]
fn every_type_of_cache_serves() {
    let files = files("tiny-chat");
    let driver = StandIn::new();
    for (name, kv_type) in KvType::ALL {
        let arithmetic = Arithmetic { activations: Activations::F32, kv_type: Some(kv_type) };
        let requests = || vec![request(prompt(&files, 0, 20), 6)];
        let want = together(&on_cpu(&files, arithmetic, config(1, 32)), requests());
        let engine = on_card(&driver, &files, arithmetic, config(1, 32));
        assert_eq!(ids(&together(&engine, requests())[0]), ids(&want[0]), "{name}");
    }
}

#[test]
fn the_budget_is_hard_and_the_ledger_holds_what_the_plan_said() {
    let files = files("tiny-chat");
    let driver = StandIn::new();
    let small = card(&driver, Budget::device(100 << 10));
    let backend = CardBackend::new(&small, &files, arithmetic(Activations::F32)).expect("known");
    let error = Engine::start_on(backend, config(2, 64)).err().expect("it does not fit").to_string();
    assert!(
        error.starts_with("device tier: needs ") && error.contains("the smallest budget that works is"),
        "{error}"
    );
    assert_eq!(driver.count("used"), 0, "nothing was loaded");
    let smallest = error.rsplit(' ').next().expect("a size").parse().expect("a size");
    let enough = Budget { device: Some(smallest), ..Budget::UNLIMITED };
    let card = card(&driver, enough);
    let backend = CardBackend::new(&card, &files, arithmetic(Activations::F32)).expect("known");
    let weights = backend.weight_bytes();
    let engine = Engine::start_on(backend, config(2, 64)).expect("the smallest budget works");
    let answered = together(&engine, vec![request(prompt(&files, 0, 20), 4)]);
    assert_eq!(answered[0].0.len(), 4);
    let held = card.ledger().used(Tier::Device);
    assert_eq!(engine.stats().weight_bytes, weights);
    assert!(held <= smallest.bytes() && held > weights + engine.stats().kv_bytes);
    engine.shutdown();
    drop(engine);
    assert_eq!(card.ledger().used(Tier::Device), 0);
}

#[test]
fn what_a_card_does_not_have_is_refused_in_a_sentence_each() {
    let driver = StandIn::new();
    let card = card(&driver, Budget::UNLIMITED);
    let plain = files("tiny-chat");
    let packed = converted(&plain, quant::Q8_0);
    let other = files("parity/gemma");
    let refused = |files: &ModelFiles, arithmetic: Arithmetic| {
        CardBackend::new(&card, files, arithmetic).err().expect("refused").to_string()
    };
    assert_eq!(
        refused(&packed, arithmetic(Activations::F32)),
        "a card multiplies quantized weights by 8-bit activations alone; leave --activations f32 out"
    );
    assert_eq!(
        refused(&files("parity/llama-odd-widths-bf16"), arithmetic(Activations::F32)),
        "decode: head_dim is 10, a multiple of 8 up to 256 is needed"
    );
    let sentence = refused(&other, arithmetic(Activations::F32));
    assert!(sentence.starts_with("model type `gemma` is not decoded on a card"), "{sentence}");
    let backend = CardBackend::new(&card, &plain, arithmetic(Activations::F32)).expect("known");
    let adapted = Engine::start_on(backend, EngineConfig { adapter_rank: 8, ..config(1, 64) });
    assert_eq!(
        adapted.err().expect("refused").to_string(),
        "this device lays no adapters over a model; merge one instead"
    );
}

#[test]
fn a_card_lost_in_the_middle_ends_every_request_and_the_engine() {
    let files = files("tiny-chat");
    let driver = StandIn::new();
    let engine = on_card(&driver, &files, arithmetic(Activations::F32), config(2, 64));
    together(&engine, vec![request(prompt(&files, 0, 20), 4)]);
    assert_eq!(engine.failure(), None);
    driver.set("launches", 100);
    let running = (0..3).map(|i| engine.submit(request(prompt(&files, i, 20), 60)).expect("it is taken"));
    for generation in running.collect::<Vec<_>>() {
        let last = events(generation).pop().expect("an end");
        assert!(matches!(&last, Event::Failed(why) if why.contains("the card was lost at cu")), "{last:?}");
    }
    engine.drain();
    let failure = engine.failure().expect("it ended by itself");
    assert!(failure.starts_with("the engine failed: the card was lost at cu"), "{failure}");
    let refused = engine.submit(request(prompt(&files, 0, 20), 4)).err().expect("it is gone");
    assert_eq!(refused.to_string(), "the engine is shutting down");
}
