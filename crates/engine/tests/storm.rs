//! A storm of hostile clients against an engine whose allocator fails past the budget.
//!
//! Requests of any length, bursts, cancellations at any moment, readers that stall, requests that can never fit, all at
//! once from several threads: none is lost or stuck, none fails, what a request gets does not depend on the storm, the
//! budget holds, and memory is back where it was: with a host tier for KV blocks and without. `HEARTH_LONG_MATRIX=1` makes it 100,000 requests.

use hearth_engine::api::{Event, Generation, Request, Sampling, Standing, SubmitError};
use hearth_engine::{Activations, Engine, EngineConfig, EngineHandle, LoadedModel};
use hearth_memory::{Budget, Ledger, Size, Tier, heap};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[global_allocator]
static HEAP: heap::CountingAllocator = heap::CountingAllocator;

/// Threads that ask.
const CLIENTS: u64 = 6;
/// Bytes of the device.
const BUDGET: u64 = 3 << 20;
/// Bytes of host memory for KV blocks, where there are any.
const HOST: u64 = 60 * 6144;
/// What lies outside the ledger: the queue, events that nobody has read yet, threads.
const OUTSIDE: u64 = 6 << 20;

/// Numbers without end, the same for the same seed.
struct Dice(u64);

impl Dice {
    /// Below `n`.
    fn roll(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.roll(n) == 0
    }
}

/// Number `kind` of the requests whose answers are known.
fn known(kind: u64, vocab: u64) -> Request {
    let mut dice = Dice(kind * 977 + 5);
    let prompt = (0..1 + dice.roll(40)).map(|_| dice.roll(vocab) as u32).collect();
    let temperature = [0.0, 0.7, 1.3][dice.roll(3) as usize];
    Request {
        prompt,
        max_tokens: 1 + dice.roll(20) as usize,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature, seed: Some(kind), ..Sampling::default() },
        logprobs: dice.one_in(3).then_some(2),
        prompt_logprobs: None,
        adapter: None,
    }
}

/// Any request at all.
fn hostile(dice: &mut Dice, vocab: u64, context: u64) -> Request {
    let longest = if dice.one_in(8) { 2 * context } else { context / 4 };
    let prompt = (0..dice.roll(longest)).map(|i| (i % vocab) as u32).collect();
    let mut request = Request { prompt, ..known(dice.roll(1 << 40), vocab) };
    request.max_tokens = dice.roll(context * 3 / 4) as usize;
    match dice.roll(12) {
        0 => request.prompt.push(vocab as u32),
        1 => request.sampling.top_p = f32::NAN,
        2 => request.prompt_logprobs = Some(1),
        _ => {}
    }
    request
}

/// What became of the requests.
#[derive(Debug, Default)]
struct Tally {
    finished: AtomicU64,
    cancelled: AtomicU64,
    overdue: AtomicU64,
    refused: AtomicU64,
    busy: AtomicU64,
}

impl Tally {
    fn total(&self) -> u64 {
        [&self.finished, &self.cancelled, &self.overdue, &self.refused, &self.busy]
            .iter()
            .map(|n| n.load(Ordering::Relaxed))
            .sum()
    }
}

struct Storm<'a> {
    engine: &'a EngineHandle,
    answers: &'a [Vec<Event>],
    tally: &'a Tally,
}

/// A generation under way, and which answer it must give.
type Running = (Generation, Option<usize>);

impl Storm<'_> {
    fn client(&self, seed: u64, requests: u64) {
        let mut dice = Dice(seed * 0x9e37_79b9 + 1);
        let mut running: Vec<Running> = Vec::new();
        for _ in 0..requests {
            running.extend(self.ask(&mut dice, seed));
            // Bursts: mostly asks on without reading.
            while running.len() > 16 || (!running.is_empty() && dice.one_in(3)) {
                let one = running.swap_remove(dice.roll(running.len() as u64) as usize);
                self.follow(&mut dice, one);
            }
        }
        running.into_iter().for_each(|one| self.follow(&mut dice, one));
    }

    fn ask(&self, dice: &mut Dice, client: u64) -> Option<Running> {
        let (vocab, context) = (self.engine.vocab_size() as u64, self.engine.context_limit() as u64);
        let answer = dice.one_in(2).then(|| dice.roll(self.answers.len() as u64));
        let request = match answer {
            Some(kind) => known(kind, vocab),
            None => hostile(dice, vocab, context),
        };
        let standing = Standing {
            client: Some(client.to_string().into()),
            priority: dice.roll(3) as i32,
            max_queue_time: dice.one_in(16).then_some(Duration::from_millis(1)),
        };
        let counted = match self.engine.submit_as(request, standing) {
            Ok(generation) => return Some((generation, answer.map(|kind| kind as usize))),
            Err(SubmitError::Busy { .. }) => {
                std::thread::sleep(Duration::from_micros(dice.roll(500)));
                &self.tally.busy
            }
            Err(SubmitError::Stopped) => panic!("the engine is gone"),
            Err(refused) => {
                assert!(answer.is_none(), "{refused}");
                &self.tally.refused
            }
        };
        counted.fetch_add(1, Ordering::Relaxed);
        None
    }

    fn follow(&self, dice: &mut Dice, (mut generation, answer): Running) {
        let patience = if dice.one_in(4) { dice.roll(6) } else { u64::MAX };
        let stalls = dice.one_in(40);
        let mut events = Vec::new();
        for _ in 0..patience {
            if stalls {
                std::thread::sleep(Duration::from_micros(200));
            }
            let Some(event) = generation.next_blocking() else { break };
            events.push(event);
        }
        let counted = match events.last() {
            Some(Event::Finished { .. }) => {
                assert!(generation.next_blocking().is_none(), "nothing comes after the end");
                if let Some(kind) = answer {
                    assert_eq!(said(&events), said(&self.answers[kind]), "known request {kind}");
                }
                &self.tally.finished
            }
            Some(Event::Overdue { .. }) => &self.tally.overdue,
            Some(Event::Failed(why)) => panic!("{why}"),
            _ if patience < u64::MAX => &self.tally.cancelled,
            last => panic!("a generation stopped after {last:?}"),
        };
        counted.fetch_add(1, Ordering::Relaxed);
    }
}

/// Events without what the prefix cache did.
fn said(events: &[Event]) -> Vec<Event> {
    let is_end = |e: &&Event| !matches!(e, Event::Finished { .. });
    events.iter().filter(is_end).cloned().collect()
}

fn start(ledger: &Ledger, kv_host_bytes: u64) -> EngineHandle {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat/model");
    let files = hearth_weights::open(&model).expect("the fixture is there");
    let model = LoadedModel::load(&files, Activations::F32, ledger, &|_| ()).expect("it fits");
    let config = EngineConfig {
        max_seqs: 8,
        max_batch_tokens: 48,
        context_limit: Some(256),
        kv_bytes: Some(40 * 6144),
        max_waiting: 20,
        kv_host_bytes,
        ..EngineConfig::default()
    };
    Engine::start(model, config).expect("it fits")
}

/// The engine's counters once nothing is under way any more.
fn idle(engine: &EngineHandle) -> hearth_engine::api::EngineStats {
    let begun = Instant::now();
    loop {
        let stats = engine.stats();
        if stats.running + stats.waiting + stats.kv_blocks_used == 0 {
            return stats;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "stuck: {stats:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_storm_loses_nothing_changes_nothing_and_leaves_nothing() {
    let requests = if std::env::var_os("HEARTH_LONG_MATRIX").is_some() { 100_000 } else { 4_000 };
    // Kernels and threads keep what they make at first: made before the heap is read.
    idle(&start(&Ledger::default(), HOST));
    // A failed check needs memory to say so.
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        heap::set_limit(None);
        say(info);
    }));
    // One after the other: the heap is one.
    for host in [0, HOST] {
        storm(requests, host);
    }
}

fn storm(requests: u64, host: u64) {
    let before = heap::current().expect("the counter is installed");
    let ledger = Ledger::new(Budget { host: Some(Size(host)), ..Budget::device(BUDGET) });
    let engine = start(&ledger, host);
    heap::set_limit(Some(before + BUDGET + host + OUTSIDE));
    let answers: Vec<Vec<Event>> = (0..24)
        .map(|kind| {
            let request = known(kind, engine.vocab_size() as u64);
            let mut generation = engine.submit(request).expect("it fits");
            std::iter::from_fn(|| generation.next_blocking()).collect()
        })
        .collect();
    let tally = Tally::default();
    let storm = Storm { engine: &engine, answers: &answers, tally: &tally };
    std::thread::scope(|scope| {
        for seed in 0..CLIENTS {
            let share = requests / CLIENTS + u64::from(seed < requests % CLIENTS);
            let storm = &storm;
            scope.spawn(move || storm.client(seed, share));
        }
    });
    let stats = idle(&engine);
    assert_eq!(tally.total(), requests, "every request has one end");
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    // The storm was one: every way to end was taken, and memory ran short.
    for n in [&tally.finished, &tally.cancelled, &tally.overdue, &tally.refused, &tally.busy] {
        assert!(count(n) > requests / 1000, "{:?}, {stats:?}", tally);
    }
    assert!(stats.preemptions > 0, "{stats:?}");
    assert_eq!(stats.kv_blocks_brought_back > requests / 100, host > 0, "{stats:?}");
    assert!(ledger.peak(Tier::Device) <= BUDGET, "{} bytes", ledger.peak(Tier::Device));
    assert_eq!(ledger.peak(Tier::Host), host);
    engine.drain();
    drop((engine, answers));
    heap::set_limit(None);
    assert_eq!((ledger.used(Tier::Device), ledger.used(Tier::Host)), (0, 0));
    let after = heap::current().expect("the counter is installed");
    assert!(after <= before + (64 << 10), "{} bytes are left over", after - before);
}
