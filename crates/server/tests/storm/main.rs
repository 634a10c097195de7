//! A storm of hostile clients against the whole server, in a process whose allocator fails past the budget.
//!
//! Over real sockets, from many connections at once: requests of any length and kind, bursts, pipelines, answers read
//! drop by drop or not at all, connections closed at any moment, bodies that stop half-way, fields that are wrong, sizes
//! that can never be. Each request is answered, refused, cut off for its client's slowness or was cancelled by its client;
//! none is lost or stuck, none fails, an answer does not depend on the storm, the budget holds, and memory is back where it
//! was. `HEARTH_LONG_MATRIX=1` makes it 100,000 requests.
//!
//! # Layout
//! - here: the server under its budget, and what must be true afterwards.
//! - `room`: what is refused before memory is taken for it.
//! - `requests`: what is asked for. `client`: how it is asked, and what may come back. `wire`: HTTP, byte by byte.

mod client;
mod requests;
mod room;
mod wire;

use client::{Client, Tally};
use hearth_data::{ChatTemplate, Tokenizer};
use hearth_engine::{Activations, Engine, EngineConfig, EngineHandle, LoadedModel};
use hearth_memory::{Budget, Ledger, Tier, heap};
use hearth_server::{AppState, ServeError, ServerConfig, Service, serve};
use requests::{KNOWN, known};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

#[global_allocator]
static HEAP: heap::CountingAllocator = heap::CountingAllocator;

/// Threads that ask.
const CLIENTS: u64 = 6;
/// Bytes of the device: weights, KV cache, working memory.
const BUDGET: u64 = 1 << 20;
/// Bytes for bodies and answers. An answer of 16 sequences of 191 tokens with 20 alternatives each may take 26 MB, which is
/// refused at once; smaller ones have to wait for each other.
const TRAFFIC: u64 = 8 << 20;
/// What lies outside both: the buffers of connections, grammars, and the clients themselves.
const OUTSIDE: u64 = 24 << 20;
/// Bytes that may be left over: what maps and pools keep.
const LEFT_OVER: u64 = 128 << 10;
/// How long a client may take for anything.
const PATIENCE: Duration = Duration::from_millis(500);

struct Server {
    address: SocketAddr,
    engine: EngineHandle,
    runtime: Runtime,
    shutdown: oneshot::Sender<()>,
    end: JoinHandle<Result<(), ServeError>>,
}

impl Server {
    /// As the storm meets it.
    fn start(ledger: &Ledger) -> Self {
        Self::with(ledger, |config| ServerConfig { max_body_bytes: 16 << 10, ..config })
    }

    fn with(ledger: &Ledger, settings: impl Fn(ServerConfig) -> ServerConfig) -> Self {
        let service = service(ledger);
        let engine = service.engine.clone();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let config = ServerConfig {
            max_traffic_bytes: TRAFFIC,
            max_connections: 48,
            header_timeout: PATIENCE,
            body_timeout: PATIENCE,
            write_timeout: PATIENCE,
            max_queue_time: Some(Duration::from_secs(2)),
            max_seqs: 8,
            max_sequences_per_request: 16,
            ..ServerConfig::new("tiny")
        };
        let state = AppState::new(settings(config));
        state.ready(service);
        let (shutdown, signal) = oneshot::channel();
        let end = runtime.spawn(serve(listener, state, async {
            signal.await.ok();
        }));
        Self { address, engine, runtime, shutdown, end }
    }

    /// The server goes, and all that it held.
    fn stop(self) {
        self.shutdown.send(()).expect("the server still listens");
        self.runtime.block_on(self.end).expect("no task panicked").expect("nothing is in flight");
        self.engine.drain();
        self.runtime.shutdown_timeout(Duration::from_secs(10));
    }
}

/// The tiny chat model, with a KV cache that runs short and a queue that fills.
fn service(ledger: &Ledger) -> Service {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat/model");
    let files = hearth_weights::open(&folder).expect("the fixture is there");
    let model = LoadedModel::load(&files, Activations::F32, ledger, &|_| ()).expect("it fits");
    let config = EngineConfig {
        max_seqs: 8,
        max_batch_tokens: 48,
        context_limit: Some(256),
        kv_bytes: Some(40 * 6144),
        max_waiting: 8,
        ..EngineConfig::default()
    };
    let engine = Engine::start(model, config).expect("it fits");
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let source = std::fs::read_to_string(folder.join("chat_template.jinja")).unwrap();
    let (bos, eos) = (tokenizer.bos_token(), tokenizer.eos_token());
    let template = ChatTemplate::new(&source, bos.as_deref(), eos.as_deref()).unwrap();
    let eos_tokens = tokenizer.eos_id().into_iter().collect();
    Service { engine, tokenizer: Some(tokenizer), template: Some(template), eos_tokens, adapters: Vec::new() }
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

/// Lets `requests` requests loose; every one of them comes to an end.
fn storm(server: &Server, answers: &[Vec<Value>], requests: u64) -> Tally {
    let tally = Tally::default();
    std::thread::scope(|scope| {
        for seed in 0..CLIENTS {
            let share = requests / CLIENTS + u64::from(seed < requests % CLIENTS);
            let client = Client::new(server.address, answers, &tally, seed);
            scope.spawn(move || client.run(share));
        }
    });
    assert_eq!(tally.total(), requests, "every request has one end");
    tally
}

/// What each known request is answered when nothing else is going on.
fn answers(address: SocketAddr) -> Vec<Vec<Value>> {
    (0..KNOWN).map(|kind| wire::ask_alone(address, &known(kind))).collect()
}

/// The heap is one: tests that measure it take turns.
fn heap_alone() -> MutexGuard<'static, ()> {
    static HEAP: Mutex<()> = Mutex::new(());
    let guard = HEAP.lock().unwrap_or_else(PoisonError::into_inner);
    // A failed check needs memory to say so.
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        heap::set_limit(None);
        say(info);
    }));
    guard
}

#[test]
fn a_storm_over_http_loses_nothing_changes_nothing_and_leaves_nothing() {
    let _alone = heap_alone();
    let requests = if std::env::var_os("HEARTH_LONG_MATRIX").is_some() { 100_000 } else { 2_000 };
    // Kernels, threads, regular expressions and grammars keep what they make at first: made before the heap is read.
    let first = Server::start(&Ledger::default());
    let calm = answers(first.address);
    storm(&first, &calm, 300);
    idle(&first.engine);
    first.stop();
    let before = heap::current().expect("the counter is installed");
    heap::reset_peak();
    heap::set_limit(Some(before + BUDGET + TRAFFIC + OUTSIDE));
    let ledger = Ledger::new(Budget::device(BUDGET));
    let server = Server::start(&ledger);
    let begun = Instant::now();
    let tally = storm(&server, &calm, requests);
    let seconds = begun.elapsed().as_secs_f64();
    let stats = idle(&server.engine);
    tally.was_a_storm(requests);
    assert!(stats.preemptions > 0, "{stats:?}");
    assert!(ledger.peak(Tier::Device) <= BUDGET, "{} bytes", ledger.peak(Tier::Device));
    server.stop();
    let peak = heap::peak().expect("the counter is installed") - before;
    heap::set_limit(None);
    assert_eq!(ledger.used(Tier::Device), 0);
    let after = heap::current().expect("the counter is installed");
    println!("{requests} requests in {seconds:.1} s: {tally:?}; {} preemptions", stats.preemptions);
    println!(
        "ledger's peak {} of {BUDGET} bytes; heap's peak {peak} of {} bytes, {} left over",
        ledger.peak(Tier::Device),
        BUDGET + TRAFFIC + OUTSIDE,
        after.saturating_sub(before)
    );
    assert!(after <= before + LEFT_OVER, "{} bytes are left over", after - before);
}
