//! Guessed tokens: sooner, and otherwise nothing is different, bit for bit.

use crate::fixtures::*;
use crate::invariance::{bits, requests};
use hearth_engine::api::{Constraint, ConstraintSource, Event, Grammar, Request, Sampling};
use hearth_engine::{Activations, Engine, EngineConfig, EngineHandle, LoadedModel, Speculation, footprint};
use hearth_kernels::paged::KvType;
use hearth_memory::{Ledger, Tier};
use hearth_weights::quant;

fn guessing(model: &LoadedModel, config: EngineConfig, draft_tokens: usize) -> EngineHandle {
    let speculation = Some(Speculation { draft_tokens });
    Engine::start(model.clone(), EngineConfig { speculation, ..config }).expect("fits without a budget")
}

/// Allows the tokens of one residue class after the other, and ends after some.
#[derive(Clone)]
struct Residues {
    taken: usize,
}

impl Constraint for Residues {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = |token: usize| token % 3 == self.taken % 3;
        logits.iter_mut().enumerate().filter(|(t, _)| !allowed(*t)).for_each(|(_, l)| *l = f32::NEG_INFINITY);
        Ok(())
    }

    fn advance(&mut self, token: u32) -> Result<bool, String> {
        assert_eq!(token as usize % 3, self.taken % 3, "only what was allowed is taken");
        self.taken += 1;
        Ok(self.taken == 33)
    }
}

impl ConstraintSource for Residues {
    fn begin(&self) -> Result<Box<dyn Constraint>, String> {
        Ok(Box::new(self.clone()))
    }
}

/// Requests whose output repeats itself or its prompt, with every way to choose tokens there is.
fn repetitive(vocab: usize) -> Vec<Request> {
    let prompt: Vec<u32> = (0..48).map(|i| (i % 12 * 5 % vocab) as u32).collect();
    let greedy_one = Sampling { temperature: 0.0, ..Sampling::default() };
    let cold = Sampling { temperature: 0.3, seed: Some(7), ..Sampling::default() };
    let samplings = [
        greedy_one.clone(),
        cold.clone(),
        Sampling { seed: Some(1), ..Sampling::default() },
        Sampling { seed: Some(2), top_p: 0.5, top_k: 3, min_p: 0.01, ..Sampling::default() },
        Sampling { repetition_penalty: 1.3, ..greedy_one.clone() },
        Sampling { presence_penalty: 1.5, frequency_penalty: 0.7, ..cold.clone() },
        Sampling { logit_bias: vec![(3, 4.0), (5, f32::NEG_INFINITY)], ..greedy_one.clone() },
        Sampling { min_tokens: 30, ..greedy_one.clone() },
        Sampling { grammar: Some(Grammar::new(Residues { taken: 0 })), ..greedy_one.clone() },
        Sampling { grammar: Some(Grammar::new(Residues { taken: 0 })), ..cold },
    ];
    let of = |(i, sampling): (usize, Sampling)| {
        let mut request = Request { sampling, ..greedy(&prompt[i % 3..], 60) };
        request.logprobs = Some(i % 4);
        request.prompt_logprobs = (i % 5 == 4).then_some(1);
        // Whatever comes often in loops ends some of them.
        request.stop_tokens = if i % 2 == 1 || i == 7 { vec![prompt[5], 2, 9] } else { Vec::new() };
        request
    };
    samplings.into_iter().enumerate().map(of).collect()
}

fn alone(model: &LoadedModel, requests: &[Request]) -> Vec<String> {
    let run = |r: &Request| bits(&events(start(model, 1, 1024).submit(r.clone()).expect("fits")));
    requests.iter().map(run).collect()
}

#[test]
fn responses_are_bit_equal_with_and_without_guesses() {
    for case in ["tiny-chat", "parity/mistral-window", "parity/qwen3", "parity/llama-rope-dynamic"] {
        let files = open(case);
        let model = load(&files);
        let limit = files.config.max_position_embeddings;
        let mut all = requests(files.config.vocab_size, limit);
        if limit > 120 {
            all.extend(repetitive(files.config.vocab_size));
        }
        let alone = alone(&model, &all);
        let mut accepted = 0;
        for (max_seqs, max_batch_tokens, draft_tokens) in
            [(1, 1, 4), (1, 64, 32), (4, 7, 3), (17, 17, 8), (17, 60, 5), (17, 1024, 1)]
        {
            let config = EngineConfig { max_seqs, max_batch_tokens, ..EngineConfig::default() };
            let engine = guessing(&model, config, draft_tokens);
            for round in 0..2 {
                let running: Vec<_> = all.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
                for (i, (generation, alone)) in running.into_iter().zip(&alone).enumerate() {
                    let what =
                        format!("{case}: request {i}, {max_seqs} sequences, {draft_tokens}, round {round}");
                    assert_eq!(&bits(&events(generation)), alone, "{what}");
                }
            }
            engine.drain();
            let stats = engine.stats();
            assert!(stats.accepted_tokens <= stats.draft_tokens && stats.kv_blocks_used == 0);
            assert_eq!(
                stats.draft_tokens > 0,
                max_batch_tokens > 1,
                "with one token a step there is no room"
            );
            accepted += stats.accepted_tokens;
        }
        assert!(accepted > 100 || limit <= 120, "{case}: {accepted} guesses were right");
    }
}

#[test]
fn responses_are_bit_equal_with_guesses_when_sequences_are_preempted() {
    let files = open("tiny-chat");
    let model = load(&files);
    let all = repetitive(files.config.vocab_size);
    let alone = alone(&model, &all);
    let block = footprint::kv_block_bytes(&files.config, KvType::F32);
    for blocks in [8, 11, 17] {
        let config = EngineConfig {
            max_seqs: 5,
            max_batch_tokens: 40,
            context_limit: Some(112),
            kv_bytes: Some(blocks * block),
            ..EngineConfig::default()
        };
        let engine = guessing(&model, config, 6);
        let running: Vec<_> = all.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
        for (i, (generation, alone)) in running.into_iter().zip(&alone).enumerate() {
            assert_eq!(&bits(&events(generation)), alone, "request {i}, {blocks} blocks");
        }
        engine.drain();
        let stats = engine.stats();
        assert_eq!((stats.finished, stats.kv_blocks_used), (10, 0));
        assert!(stats.preemptions > 0 && stats.accepted_tokens > 0, "{stats:?}");
    }
}

fn drafting(model: &LoadedModel, draft: &LoadedModel, config: EngineConfig, n: usize) -> EngineHandle {
    let speculation = Some(Speculation { draft_tokens: n });
    let config = EngineConfig { speculation, ..config };
    Engine::start_with_draft(model.clone(), draft.clone(), config).expect("fits without a budget")
}

/// The tiny model with its weights stored in four bits: another model of the same vocabulary that mostly agrees.
fn coarse() -> LoadedModel {
    let files = crate::formats::converted(&open("tiny-chat"), quant::Q4_0, true);
    LoadedModel::load(&files, Activations::Int8, &Ledger::default(), &|_| ()).expect("no budget")
}

#[test]
fn responses_are_bit_equal_with_a_draft_model() {
    let files = open("tiny-chat");
    let model = load(&files);
    let mut all = requests(files.config.vocab_size, files.config.max_position_embeddings);
    all.extend(repetitive(files.config.vocab_size));
    let alone = alone(&model, &all);
    let block = 2 * footprint::kv_block_bytes(&files.config, KvType::F32);
    for (name, draft) in [("itself", load(&files)), ("a coarse copy", coarse())] {
        for (max_seqs, max_batch_tokens, blocks, draft_tokens) in
            [(1, 64, 100, 4), (4, 9, 100, 3), (17, 1024, 200, 6), (5, 40, 11, 2)]
        {
            let config = EngineConfig {
                max_seqs,
                max_batch_tokens,
                context_limit: Some(112),
                kv_bytes: Some(blocks * block),
                ..EngineConfig::default()
            };
            let engine = drafting(&model, &draft, config, draft_tokens);
            for round in 0..2 {
                let running: Vec<_> = all.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
                for (i, (generation, alone)) in running.into_iter().zip(&alone).enumerate() {
                    // Some are given up on the way.
                    if round == 1 && i % 3 == 1 {
                        continue;
                    }
                    let what = format!("{name}: request {i}, {max_seqs} sequences, {blocks} blocks, {round}");
                    assert_eq!(&bits(&events(generation)), alone, "{what}");
                }
            }
            engine.drain();
            let stats = engine.stats();
            assert_eq!((stats.finished + stats.cancelled, stats.kv_blocks_used), (34, 0));
            assert_eq!(stats.preemptions > 0, blocks == 11, "{stats:?}");
            assert!(stats.accepted_tokens * 4 > stats.draft_tokens, "{name}: {stats:?}");
        }
    }
}

#[test]
fn a_draft_model_is_within_the_budget() {
    let files = open("tiny-chat");
    let ledger = Ledger::default();
    let load = || LoadedModel::load(&files, Activations::F32, &ledger, &|_| ()).expect("no budget");
    let (model, draft) = (load(), load());
    let weights = ledger.used(Tier::Device);
    let engine = drafting(&model, &draft, EngineConfig { max_seqs: 2, ..EngineConfig::default() }, 4);
    let stats = engine.stats();
    assert_eq!(stats.weight_bytes, weights);
    let block = footprint::kv_block_bytes(&files.config, KvType::F32);
    assert_eq!(stats.kv_bytes, 2 * stats.kv_blocks_total as u64 * block);
    assert!(ledger.used(Tier::Device) > weights + stats.kv_bytes);
    engine.shutdown();
    drop((engine, model, draft));
    assert_eq!(ledger.used(Tier::Device), 0);
}

#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let (model, other) = (load(&open("tiny-chat")), load(&open("parity/qwen3")));
    let config =
        EngineConfig { speculation: Some(Speculation { draft_tokens: 4 }), ..EngineConfig::default() };
    let error = Engine::start_with_draft(model.clone(), other, config).err().expect("refused").to_string();
    assert!(error.contains("vocabulary"), "{error}");
    let error =
        Engine::start_with_draft(model.clone(), model, EngineConfig::default()).err().expect("refused");
    assert!(error.to_string().contains("number of tokens"), "{error}");
}

#[test]
fn what_repeats_takes_fewer_steps() {
    let model = load(&open("tiny-chat"));
    let request = greedy(&[3, 1, 4, 1, 5], 200);
    let run = |engine: EngineHandle| {
        let events = events(engine.submit(request.clone()).expect("fits"));
        engine.drain();
        assert!(matches!(events.last(), Some(Event::Finished { .. })));
        (tokens(&events), engine.stats())
    };
    let (plain, slow) = run(start(&model, 1, 64));
    let (guessed, fast) = run(guessing(&model, EngineConfig::default(), 8));
    assert_eq!(plain, guessed);
    assert_eq!((slow.generated_tokens, slow.drafts), (200, 0));
    assert_eq!(fast.steps + fast.accepted_tokens, slow.steps, "a right guess saves a step");
    assert!(fast.steps * 2 < slow.steps, "{fast:?}");
}

#[test]
fn absurd_guesses_are_refused() {
    let model = load(&open("tiny-chat"));
    for draft_tokens in [0, 33, usize::MAX] {
        let speculation = Some(Speculation { draft_tokens });
        let config = EngineConfig { speculation, ..EngineConfig::default() };
        let error = Engine::start(model.clone(), config).err().expect("refused").to_string();
        assert!(error.contains("from 1 to 32"), "{error}");
    }
}
