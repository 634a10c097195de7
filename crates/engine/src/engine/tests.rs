//! The loop over a stand-in for the model: token → logits by a hash of everything before it, remembered in KV
//! blocks as the real one does, so that a wrong block, position or order changes the output.

use super::*;
use crate::api::{Event, FinishReason, Sampling, TokenLogprobs};
use crate::kv::Move;
use crate::runner::{EachRow, SequenceStep};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

const VOCAB: usize = 50;
const BLOCK: usize = 4;

struct Hashing {
    /// One token per slot, as keys and values are kept.
    slots: Vec<u32>,
    /// The same on the host.
    host: Vec<u32>,
    /// Tokens computed so far.
    rows: Arc<AtomicUsize>,
    /// Another one is another model.
    salt: u64,
    /// Panics on this token.
    explosive: Option<u32>,
    /// Answers NaN after this token.
    poisonous: Option<u32>,
    /// Finds no weights while this is set.
    unreadable: Arc<AtomicBool>,
    /// Waits for a go-ahead before each step, if there is one.
    gate: Option<mpsc::Receiver<()>>,
}

impl Hashing {
    fn new(blocks: usize) -> Self {
        Hashing {
            slots: vec![u32::MAX; blocks * BLOCK],
            host: Vec::new(),
            rows: Arc::default(),
            salt: 7,
            explosive: None,
            poisonous: None,
            unreadable: Arc::default(),
            gate: None,
        }
    }

    fn logits(&self, history: &[u32]) -> Vec<f32> {
        let hash = history.iter().fold(self.salt, |h, &t| (h ^ u64::from(t)).wrapping_mul(0x100_0000_01b3));
        if history.last() == self.poisonous.as_ref() {
            return vec![f32::NAN; VOCAB];
        }
        (0..VOCAB as u64)
            .map(|i| ((hash.rotate_left(i as u32) ^ i).wrapping_mul(31) % 97) as f32 / 10.0)
            .collect()
    }
}

impl Forward for Hashing {
    fn forward(&mut self, step: &[SequenceStep], each: &mut EachRow) -> Result<(), Error> {
        if let Some(gate) = &self.gate {
            gate.recv().ok();
        }
        self.check()?;
        self.rows.fetch_add(step.iter().map(|s| s.tokens.len()).sum(), Ordering::Relaxed);
        for (i, s) in step.iter().enumerate() {
            for (j, &token) in s.tokens.iter().enumerate() {
                assert!(Some(token) != self.explosive, "token {token} is explosive");
                let slot = |p: usize| s.table[p / BLOCK] as usize * BLOCK + p % BLOCK;
                self.slots[slot(s.first_position + j)] = token;
                if s.logits.contains(&j) {
                    let history: Vec<u32> = (0..=s.first_position + j).map(|p| self.slots[slot(p)]).collect();
                    each(i, j, &self.logits(&history));
                }
            }
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), Error> {
        match self.unreadable.load(Ordering::Relaxed) {
            true => Err(Error::Config("the disk is gone".into())),
            false => Ok(()),
        }
    }

    fn move_blocks(&mut self, moves: &[Move]) {
        for one in moves {
            match *one {
                Move::Out { block, slot } => {
                    self.host[cells(slot)].copy_from_slice(&self.slots[cells(block)]);
                }
                Move::Back { slot, block } => {
                    self.slots[cells(block)].copy_from_slice(&self.host[cells(slot)]);
                }
                Move::Swap { block, slot } => {
                    self.slots[cells(block)].swap_with_slice(&mut self.host[cells(slot)]);
                }
            }
        }
    }
}

fn cells(block: u32) -> std::ops::Range<usize> {
    block as usize * BLOCK..(block as usize + 1) * BLOCK
}

fn limits() -> Limits {
    Limits { max_seqs: 3, max_batch_tokens: 8, max_waiting: 100, max_overtaken: 9 }
}

fn start(limits: Limits, model: Hashing) -> EngineHandle {
    start_guessing(limits, model, None, None)
}

fn start_guessing(
    limits: Limits,
    model: Hashing,
    draft: Option<Hashing>,
    draft_tokens: Option<usize>,
) -> EngineHandle {
    let source = if draft.is_some() { Source::Draft } else { Source::Lookup };
    let blocks = model.slots.len() / BLOCK;
    let facts = Facts {
        context_limit: blocks * BLOCK,
        vocab_size: VOCAB,
        hidden_size: VOCAB,
        rotates_by_length_from: None,
        adapter_rank: 0,
        guesses: draft_tokens.map(|draft_tokens| (Speculation { draft_tokens }, source, Cost::new(1, 0, 0))),
    };
    let scheduler = Scheduler::new(limits, blocks, BLOCK);
    let cache = DraftCache { blocks: [blocks, 0], block_tokens: BLOCK, rows: limits.max_batch_tokens };
    let draft = draft.map(|draft| Draft::new(draft, cache));
    Engine::start_with(model, draft, scheduler, facts, EngineStats::default(), None, None).expect("a thread")
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        logprobs: None,
        prompt_logprobs: None,
        adapter: None,
    }
}

fn events(mut generation: Generation) -> Vec<Event> {
    std::iter::from_fn(|| generation.next_blocking()).collect()
}

fn tokens(events: &[Event]) -> Vec<u32> {
    let token = |e: &Event| if let Event::Token { id, .. } = e { Some(*id) } else { None };
    events.iter().filter_map(token).collect()
}

/// Greedy tokens straight from the stand-in.
fn expected(prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let (model, mut history) = (Hashing::new(0), prompt.to_vec());
    for _ in 0..max_tokens {
        let logits = model.logits(&history);
        let best = (0..VOCAB).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("not empty");
        history.push(best as u32);
    }
    history.split_off(prompt.len())
}

fn mixed_requests() -> Vec<Request> {
    let prompts: [&[u32]; 6] =
        [&[1], &[2, 3], &[4; 9], &[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], &[1, 1, 1], &[49]];
    let mut requests: Vec<Request> =
        prompts.iter().enumerate().map(|(i, p)| request(p, [7, 1, 12, 5, 0, 20][i])).collect();
    requests[1].sampling = Sampling { seed: Some(5), ..Sampling::default() };
    requests[2].logprobs = Some(3);
    requests[3].prompt_logprobs = Some(2);
    requests[4].prompt_logprobs = Some(0);
    requests[5].sampling =
        Sampling { seed: Some(6), top_p: 0.9, repetition_penalty: 1.3, ..Sampling::default() };
    requests
}

#[test]
fn a_response_is_the_same_alone_and_in_any_company_at_any_chunking() {
    let alone: Vec<Vec<Event>> = mixed_requests()
        .into_iter()
        .map(|r| events(start(limits(), Hashing::new(64)).submit(r).expect("fits")))
        .collect();
    assert_eq!(tokens(&alone[0]), expected(&[1], 7));
    for (max_seqs, max_batch_tokens, blocks) in [(1, 1, 8), (3, 3, 8), (6, 6, 64), (6, 7, 20), (6, 100, 64)] {
        let limits = Limits { max_seqs, max_batch_tokens, max_waiting: 100, max_overtaken: 9 };
        let guesses = (max_batch_tokens % 3 == 1).then_some(3);
        let engine = start_guessing(limits, Hashing::new(blocks), None, guesses);
        let running: Vec<_> = mixed_requests().into_iter().map(|r| engine.submit(r).expect("fits")).collect();
        for (generation, alone) in running.into_iter().zip(&alone) {
            assert_eq!(&events(generation), alone, "{max_seqs} sequences, {max_batch_tokens} tokens a step");
        }
        engine.drain();
        let stats = engine.stats();
        assert_eq!((stats.finished, stats.cancelled, stats.kv_blocks_used), (6, 0, 0));
        assert_eq!(stats.generated_tokens, 45);
        assert!(stats.prompt_tokens == 27 || stats.preemptions > 0 && stats.prompt_tokens > 27);
    }
}

#[test]
fn a_scored_prompt_reports_every_token_but_the_first_before_any_token() {
    let mut scored = request(&[3, 1, 4, 1, 5], 2);
    (scored.prompt_logprobs, scored.logprobs) = (Some(2), Some(1));
    let events = events(start(limits(), Hashing::new(8)).submit(scored).expect("fits"));
    let Event::Prompt(rows) = &events[0] else { panic!("the prompt comes first: {events:?}") };
    assert_eq!((rows.len(), &rows[0]), (5, &None));
    let model = Hashing::new(0);
    let check = |row: &TokenLogprobs, history: &[u32], token: u32| {
        let logits = model.logits(history);
        let report =
            sampler::logprobs::LogSoftmax::new(&logits).expect("finite").report(token, row.top.len());
        assert_eq!(row, &report);
    };
    let prompt = [3, 1, 4, 1, 5];
    for (i, row) in rows.iter().enumerate().skip(1) {
        check(row.as_ref().expect("all but the first"), &prompt[..i], prompt[i]);
    }
    let Event::Token { id, logprobs: Some(row) } = &events[1] else { panic!("{events:?}") };
    check(row, &prompt, *id);
    assert_eq!(row.top[0], (*id, row.logprob), "greedy takes the likeliest, and says so with the same float");
    assert_eq!(events[3], Event::Finished { reason: FinishReason::Length, cached_tokens: 0 });
}

#[test]
fn a_prompt_alone_is_scored_without_generating() {
    for prompt in [&[9][..], &[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9]] {
        let mut scored = request(prompt, 0);
        scored.prompt_logprobs = Some(0);
        let events = events(start(limits(), Hashing::new(8)).submit(scored).expect("fits"));
        let [Event::Prompt(rows), Event::Finished { reason, .. }] = &events[..] else { panic!("{events:?}") };
        assert_eq!((rows.len(), *reason), (prompt.len(), FinishReason::Length));
        assert!(rows[1..].iter().all(Option::is_some));
    }
    let events = events(start(limits(), Hashing::new(8)).submit(request(&[1], 0)).expect("fits"));
    assert!(matches!(events[..], [Event::Finished { reason: FinishReason::Length, .. }]));
}

#[test]
fn a_stop_token_ends_the_generation_and_is_not_emitted() {
    let whole = expected(&[1, 2], 6);
    let mut stopped = request(&[1, 2], 6);
    stopped.stop_tokens = vec![whole[3]];
    let first = whole.iter().position(|t| *t == whole[3]).expect("it is there");
    let events = events(start(limits(), Hashing::new(8)).submit(stopped).expect("fits"));
    assert_eq!(tokens(&events), whole[..first]);
    assert_eq!(events.last(), Some(&Event::Finished { reason: FinishReason::Stop, cached_tokens: 0 }));
}

#[test]
fn requests_that_can_never_be_served_are_refused_by_name() {
    let engine = start(limits(), Hashing::new(8));
    let refused = |r: Request| engine.submit(r).err().expect("refused");
    assert_eq!(refused(request(&[], 1)), SubmitError::EmptyPrompt);
    assert_eq!(
        refused(request(&[1, 50], 1)),
        SubmitError::TokenOutOfRange { id: 50, position: 1, vocab: 50 }
    );
    assert_eq!(refused(request(&[1], 32)), SubmitError::TooLong { prompt: 1, max_tokens: 32, limit: 32 });
    assert!(matches!(refused(request(&[1], usize::MAX)), SubmitError::TooLong { .. }));
    let mut hot = request(&[1], 1);
    hot.sampling.temperature = f32::INFINITY;
    assert!(matches!(refused(hot), SubmitError::Sampling { .. }));
    assert_eq!(events(engine.submit(request(&[1], 31)).expect("exactly fits")).len(), 32);
}

/// An engine that makes a step whenever something is sent.
fn gated(limits: Limits, blocks: usize) -> (EngineHandle, mpsc::Sender<()>) {
    let (go, gate) = mpsc::channel();
    (start(limits, Hashing { gate: Some(gate), ..Hashing::new(blocks) }), go)
}

#[test]
fn dropping_a_generation_frees_its_blocks_for_those_who_wait() {
    let (engine, go) = gated(limits(), 4);
    let mut first = engine.submit(request(&[1; 8], 8)).expect("half of the blocks, and it may grow");
    let second = engine.submit(request(&[2], 3)).expect("queued");
    assert_eq!(
        (engine.stats().running, engine.stats().waiting),
        (1, 1),
        "a full cache queues, it does not fail"
    );
    go.send(()).expect("the engine waits");
    assert!(matches!(first.next_blocking(), Some(Event::Token { .. })));
    drop(first);
    drop(go);
    assert_eq!(tokens(&events(second)), expected(&[2], 3));
    engine.drain();
    let stats = engine.stats();
    assert_eq!((stats.cancelled, stats.finished, stats.kv_blocks_used), (1, 1, 0));
}

#[test]
fn a_request_cancelled_in_the_queue_never_runs() {
    let (engine, go) = gated(Limits { max_seqs: 1, ..limits() }, 8);
    let first = engine.submit(request(&[1], 2)).expect("runs");
    drop(engine.submit(request(&[2], 2)).expect("queued"));
    drop(go);
    assert_eq!(tokens(&events(first)).len(), 2);
    engine.drain();
    assert_eq!((engine.stats().cancelled, engine.stats().prompt_tokens), (1, 1));
}

#[test]
fn a_preempted_request_goes_on_where_it_was() {
    let wanted = |i: u32| {
        let mut request = request(&[i, i + 1], 29);
        request.prompt_logprobs = (i == 2).then_some(1);
        request.logprobs = Some(1);
        request
    };
    let alone: Vec<_> =
        (0..3).map(|i| events(start(limits(), Hashing::new(8)).submit(wanted(i)).expect("fits"))).collect();
    let engine = start(limits(), Hashing::new(9));
    let running: Vec<_> = (0..3).map(|i| engine.submit(wanted(i)).expect("fits")).collect();
    assert_eq!(running.into_iter().map(events).collect::<Vec<_>>(), alone);
    engine.drain();
    assert!(engine.stats().preemptions > 0 && engine.stats().kv_blocks_used == 0);
}

#[test]
fn a_request_that_waits_longer_than_it_wants_is_told_so() {
    let (engine, go) = gated(Limits { max_seqs: 1, ..limits() }, 8);
    let first = engine.submit(request(&[1], 3)).expect("runs");
    let limit = std::time::Duration::ZERO;
    let standing = || Standing { max_queue_time: Some(limit), ..Standing::default() };
    let late = engine.submit_as(request(&[2], 3), standing()).expect("queued");
    drop(go);
    assert_eq!(events(late), [Event::Overdue { limit }]);
    assert_eq!(tokens(&events(first)).len(), 3);
    let at_once = engine.submit_as(request(&[2], 3), standing()).expect("runs");
    assert_eq!(tokens(&events(at_once)).len(), 3, "what was admitted has not waited");
    engine.drain();
    assert_eq!((engine.stats().overdue, engine.stats().finished), (1, 2));
}

#[test]
fn a_full_queue_says_busy_and_takes_more_later() {
    let (engine, go) =
        gated(Limits { max_seqs: 1, max_batch_tokens: 8, max_waiting: 1, max_overtaken: 9 }, 8);
    let taken: Vec<_> = (0..2).map(|_| engine.submit(request(&[1], 1)).expect("room")).collect();
    assert_eq!(
        engine.submit(request(&[1], 1)).err(),
        Some(SubmitError::Busy { waiting: 1, limit: 1, retry_after_s: 1 })
    );
    drop(go);
    taken.into_iter().for_each(|g| assert_eq!(events(g).len(), 2));
    assert_eq!(events(engine.submit(request(&[1], 1)).expect("room again")).len(), 2);
}

#[test]
fn a_panic_in_a_step_fails_its_requests_and_the_engine_goes_on() {
    let engine = start(limits(), Hashing { explosive: Some(13), ..Hashing::new(8) });
    let events_of = |r: Request| events(engine.submit(r).expect("fits"));
    assert_eq!(
        events_of(request(&[1, 13], 2)),
        [Event::Failed("a step failed: token 13 is explosive".into())]
    );
    assert_eq!(engine.stats().kv_blocks_used, 0);
    assert!(matches!(events_of(request(&[1], 1))[..], [Event::Token { .. }, Event::Finished { .. }]));
}

#[test]
fn a_step_without_weights_fails_its_requests_and_the_next_step_tries_again() {
    for drafts in [false, true] {
        let (unreadable, model) = (Arc::<AtomicBool>::default(), Hashing::new(8));
        // One sequence at a time: the others wait until the first has failed.
        let (go, gate) = mpsc::channel();
        let model = Hashing { gate: Some(gate), ..model };
        let (model, draft) = match drafts {
            false => (Hashing { unreadable: unreadable.clone(), ..model }, None),
            true => (model, Some(Hashing { unreadable: unreadable.clone(), ..Hashing::new(8) })),
        };
        let limits = Limits { max_seqs: 1, ..limits() };
        let engine = start_guessing(limits, model, draft, drafts.then_some(2));
        let mut first = engine.submit(request(&[1], 12)).expect("room");
        let others: Vec<_> = (2..4).map(|i| engine.submit(request(&[i], 4)).expect("room")).collect();
        // One step goes well, in a later one the weights are gone, then they are there again.
        let mut said = Vec::new();
        go.send(()).expect("it waits");
        said.extend(first.next_blocking());
        unreadable.store(true, Ordering::Relaxed);
        go.send(()).ok();
        said.extend(std::iter::from_fn(|| first.next_blocking()));
        assert_eq!(said.last(), Some(&Event::Failed("a step failed: the disk is gone".into())));
        eventually_some(&engine);
        unreadable.store(false, Ordering::Relaxed);
        drop(go);
        for (i, generation) in (2..4).zip(others) {
            let events = events(generation);
            // The one after it may have met the same.
            if !matches!(events.last(), Some(Event::Failed(_))) {
                assert_eq!(tokens(&events), expected(&[i], 4));
            }
        }
        let again = events(engine.submit(request(&[9], 4)).expect("room"));
        assert_eq!(tokens(&again), expected(&[9], 4));
        assert_eq!((engine.fault(), engine.stats().kv_blocks_used), (None, 0));
    }
}

#[test]
fn an_idle_engine_finds_out_by_itself_that_its_weights_can_be_had_again() {
    let model = Hashing::new(8);
    let unreadable = model.unreadable.clone();
    unreadable.store(true, Ordering::Relaxed);
    let engine = start(limits(), model);
    assert!(matches!(events(engine.submit(request(&[1], 1)).expect("room"))[..], [Event::Failed(_)]));
    assert_eq!(eventually_some(&engine), "a step failed: the disk is gone");
    unreadable.store(false, Ordering::Relaxed);
    let begun = std::time::Instant::now();
    while engine.fault().is_some() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it never looked");
        std::thread::sleep(Duration::from_millis(5));
    }
    engine.shutdown();
    assert_eq!(engine.fault().as_deref(), Some("the engine is shutting down"));
}

/// The engine's fault, which it says a moment after its requests know.
fn eventually_some(engine: &EngineHandle) -> String {
    let begun = std::time::Instant::now();
    loop {
        if let Some(fault) = engine.fault() {
            return fault;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "there is no fault");
        std::thread::yield_now();
    }
}

/// Requests that share prompts, more than there is room for at once.
fn crowd() -> Vec<Request> {
    let prompt = |i: u32| -> Vec<u32> { (0..5 + i % 4 * 3).map(|p| (p * 7 + i % 2) % 50).collect() };
    (0..12).map(|i| request(&prompt(i), 9 + i as usize % 5)).collect()
}

#[test]
fn a_model_that_drafts_for_itself_is_always_right_whatever_happens_to_its_blocks() {
    let mut preemptions = 0;
    for (max_seqs, max_batch_tokens, blocks, draft_tokens) in
        [(1, 8, 8, 4), (3, 8, 30, 1), (6, 40, 100, 3), (6, 12, 12, 2), (4, 60, 9, 8)]
    {
        let limits = Limits { max_seqs, max_batch_tokens, max_waiting: 100, max_overtaken: 9 };
        let (model, draft) = (Hashing::new(blocks), Hashing::new(blocks));
        let engine = start_guessing(limits, model, Some(draft), Some(draft_tokens));
        for _ in 0..2 {
            let running: Vec<_> = crowd().into_iter().map(|r| engine.submit(r).expect("room")).collect();
            for (request, generation) in crowd().into_iter().zip(running) {
                assert_eq!(tokens(&events(generation)), expected(&request.prompt, request.max_tokens));
            }
        }
        engine.drain();
        let stats = engine.stats();
        assert!(stats.draft_tokens > 0 && stats.kv_blocks_used == 0, "{stats:?}");
        // What it has not computed it knows, also in blocks that others brought into the prefix cache.
        assert_eq!(stats.draft_tokens, stats.accepted_tokens);
        preemptions += stats.preemptions;
    }
    assert!(preemptions > 0, "blocks are given up, too");
}

#[test]
fn a_draft_model_computes_nothing_where_no_guess_pays_and_makes_up_for_it_later() {
    let limits = Limits { max_seqs: 20, max_batch_tokens: 40, max_waiting: 100, max_overtaken: 9 };
    let (model, draft) = (Hashing::new(200), Hashing::new(200));
    let (computed, drafted) = (model.rows.clone(), draft.rows.clone());
    let engine = start_guessing(limits, model, Some(draft), Some(4));
    // Among twenty a guess must be surer than any is at first; the last of them is alone for long.
    let most = |i: u32| if i == 19 { 90 } else { 7 };
    let running: Vec<_> =
        (0..20).map(|i| engine.submit(request(&[i, i + 1, i + 2], most(i))).expect("room")).collect();
    let mut running: Vec<_> = running.into_iter().zip(0..).collect();
    let (last, _) = running.pop().expect("twenty");
    for (generation, i) in running {
        assert_eq!(tokens(&events(generation)), expected(&[i, i + 1, i + 2], most(i)));
    }
    let before = engine.stats();
    assert_eq!(tokens(&events(last)), expected(&[19, 20, 21], 90));
    engine.drain();
    let stats = engine.stats();
    let [computed, drafted] = [computed, drafted].map(|rows| rows.load(Ordering::Relaxed));
    // Of the last one all is made up for; it guesses right ever after.
    assert!(drafted < computed * 3 / 4, "{drafted} of {computed}, {before:?}");
    assert!(stats.accepted_tokens == stats.draft_tokens && stats.accepted_tokens > 40, "{stats:?}");
}

#[test]
fn a_draft_model_that_knows_nothing_changes_nothing() {
    let stranger = |blocks| Hashing { salt: 99, poisonous: Some(7), ..Hashing::new(blocks) };
    let limits = Limits { max_seqs: 4, max_batch_tokens: 30, max_waiting: 100, max_overtaken: 9 };
    let engine = start_guessing(limits, Hashing::new(20), Some(stranger(20)), Some(3));
    let running: Vec<_> = crowd().into_iter().map(|r| engine.submit(r).expect("room")).collect();
    // Every third is given up at some moment.
    for (i, (request, generation)) in crowd().into_iter().zip(running).enumerate() {
        if i % 3 > 0 {
            assert_eq!(tokens(&events(generation)), expected(&request.prompt, request.max_tokens));
        }
    }
    engine.drain();
    let stats = engine.stats();
    assert!(stats.accepted_tokens < stats.draft_tokens, "{stats:?}");
    assert_eq!((stats.finished + stats.cancelled, stats.kv_blocks_used), (12, 0));
}

#[test]
fn a_panic_of_the_draft_model_fails_the_steps_requests_and_the_engine_goes_on() {
    let draft = Hashing { explosive: Some(13), ..Hashing::new(8) };
    let engine = start_guessing(limits(), Hashing::new(8), Some(draft), Some(2));
    let events_of = |r: Request| events(engine.submit(r).expect("fits"));
    let why = "a step failed: token 13 is explosive";
    // It computes the prompt when it is to guess what follows the first token.
    let failed = events_of(request(&[1, 13], 5));
    assert_eq!((failed.len(), failed.last()), (2, Some(&Event::Failed(why.into()))), "{failed:?}");
    assert_eq!(engine.stats().kv_blocks_used, 0);
    assert_eq!(tokens(&events_of(request(&[1], 1))), expected(&[1], 1));
}

#[test]
fn logits_that_are_not_numbers_fail_their_request_alone() {
    let engine = start(limits(), Hashing { poisonous: Some(13), ..Hashing::new(16) });
    let good = engine.submit(request(&[1], 4)).expect("fits");
    let mut scored = request(&[13, 1], 4);
    scored.prompt_logprobs = Some(0);
    let (scored, bad) = (engine.submit(scored), engine.submit(request(&[13], 4)));
    for failing in [scored, bad] {
        let events = events(failing.expect("fits"));
        let [Event::Failed(why)] = &events[..] else { panic!("{events:?}") };
        assert!(why.contains("token 0 is NaN"), "{why}");
    }
    assert_eq!(tokens(&events(good)).len(), 4);
}

#[test]
fn draining_finishes_what_was_accepted_and_refuses_the_rest() {
    let (engine, go) = gated(limits(), 8);
    let accepted: Vec<_> = (0..5).map(|i| engine.submit(request(&[i], 3)).expect("room")).collect();
    let draining = std::thread::spawn({
        let engine = engine.clone();
        move || engine.drain()
    });
    while engine.owner.shared.lock().mode == Mode::Open {
        std::thread::yield_now();
    }
    assert_eq!(engine.submit(request(&[1], 1)).err(), Some(SubmitError::Stopped));
    drop(go);
    draining.join().expect("drained");
    for generation in accepted {
        assert_eq!(tokens(&events(generation)).len(), 3);
    }
    engine.drain();
}

#[test]
fn shutting_down_fails_what_is_left() {
    let (engine, go) = gated(limits(), 8);
    let running = engine.submit(request(&[1], 20)).expect("room");
    let waiting = engine.submit(request(&[1], 20)).expect("room");
    engine.owner.shared.advance_to(Mode::Stopping);
    drop(go);
    engine.shutdown();
    for generation in [running, waiting] {
        let events = events(generation);
        assert_eq!(events.last(), Some(&Event::Failed("the engine is shutting down".into())));
    }
    assert_eq!(engine.stats().kv_blocks_used, 0);
}

#[test]
fn generations_outlive_the_handles() {
    let generation = start(limits(), Hashing::new(8)).submit(request(&[1], 4)).expect("room");
    assert_eq!(tokens(&events(generation)), expected(&[1], 4));
}
