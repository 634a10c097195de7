//! The engine: a thread that turns requests into steps, and the handle callers hold.
//!
//! # Layout
//! - here: [`EngineConfig`], [`Engine::start`], [`EngineHandle`].
//! - `pace`: how fast the queue moves.
//! - `worker`: the loop on its own thread.
//!
//! # Invariants
//! - Callers and the worker share a [`State`] behind one lock, held for bookkeeping only, never during a forward
//!   pass. So a submission is taken or refused at once.
//! - Every accepted request ends with `Finished` or `Failed`, or was cancelled: also when a step panics or finds no weights,
//!   and when the worker itself panics.

mod pace;
mod worker;

use crate::adapter::AdapterLoader;
use crate::api::{Adapter, EngineStats, Generation, Pooling, Request, Standing, SubmitError};
use crate::backend::Backend;
use crate::draft::{Draft, DraftCache};
use crate::error::Error;
use crate::footprint::{self, Wishes};
use crate::loader::LoadedModel;
use crate::runner::{Forward, Runner};
use crate::sampler;
use crate::scheduler::{Arrival, Limits, RequestId, Scheduler};
use crate::score::check_tokens;
use crate::sequence::Sequence;
use crate::speculation::{Cost, Guesser, MOST_DRAFT_TOKENS, Source, Speculation};
use crate::streaming::Counters;
use hearth_kernels::paged::{KV_BLOCK, KvType};
use hearth_weights::{ModelConfig, RopeScaling};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, WaitTimeoutResult};
use std::thread::JoinHandle;
use std::time::Duration;

use pace::Pace;

/// Younger requests of others that may be admitted before one that is the next of its client.
const MAX_OVERTAKEN: usize = 64;

/// Bounds of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences in the batch at once.
    pub max_seqs: usize,
    /// Tokens in one forward pass, at least `max_seqs`. Made smaller when the device's budget asks for it.
    pub max_batch_tokens: usize,
    /// Requests that may wait for admission; more are refused as [`SubmitError::Busy`].
    pub max_waiting: usize,
    /// Tokens a sequence may reach. `None` = what the model was made for, or less if the KV cache holds less.
    pub context_limit: Option<usize>,
    /// Bytes of the KV cache. `None` = what the device's budget leaves, or 2 GiB without one; never more than
    /// `max_seqs` full sequences need.
    pub kv_bytes: Option<u64>,
    /// Bytes of host memory for KV blocks that were computed and that the device has no room for any more: they are
    /// brought back for whoever comes with their tokens. 0 = they are forgotten.
    pub kv_host_bytes: u64,
    /// Largest rank of the adapters requests may have; 0 = none.
    pub adapter_rank: usize,
    /// Bytes of the device's budget to leave free for adapters that are loaded later.
    pub adapter_bytes: u64,
    /// Guess tokens in advance. Responses are the same, only sooner.
    pub speculation: Option<Speculation>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_seqs: 16,
            max_batch_tokens: 512,
            max_waiting: 1024,
            context_limit: None,
            kv_bytes: None,
            kv_host_bytes: 0,
            adapter_rank: 0,
            adapter_bytes: 0,
            speculation: None,
        }
    }
}

impl EngineConfig {
    fn validate(&self) -> Result<(), Error> {
        let Self { max_seqs, max_batch_tokens, .. } = *self;
        let what = if max_seqs == 0 {
            "max_seqs is 0, it must be at least 1".into()
        } else if max_batch_tokens < max_seqs {
            format!(
                "max_batch_tokens is {max_batch_tokens}, it must be at least max_seqs, which is {max_seqs}: every \
                 running sequence needs a token per step"
            )
        } else if let Some(Speculation { draft_tokens: n }) = self.speculation
            && !(1..=MOST_DRAFT_TOKENS).contains(&n)
        {
            format!("{n} tokens are to be guessed at a time, it must be from 1 to {MOST_DRAFT_TOKENS}")
        } else if self.context_limit == Some(0) {
            "the context limit is 0, it must be at least 1".into()
        } else {
            return Ok(());
        };
        Err(Error::Config(what))
    }

    /// What is asked of the device.
    fn wishes(&self, kv_type: KvType) -> Wishes<'static> {
        Wishes {
            max_seqs: self.max_seqs,
            max_batch_tokens: self.max_batch_tokens,
            context_limit: self.context_limit,
            kv_bytes: self.kv_bytes,
            kv_host_bytes: self.kv_host_bytes,
            kv_type,
            adapter_rank: self.adapter_rank,
            adapter_bytes: self.adapter_bytes,
            draft: None,
        }
    }

    fn limits(&self, max_batch_tokens: usize) -> Limits {
        Limits {
            max_seqs: self.max_seqs,
            max_batch_tokens,
            max_waiting: self.max_waiting,
            max_overtaken: MAX_OVERTAKEN,
        }
    }
}

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Starts an engine on a thread of its own. It ends after [`EngineHandle::drain`] or
    /// [`EngineHandle::shutdown`], or once all handles are dropped and the accepted requests are done.
    ///
    /// # Errors
    /// [`Error::Config`] for contradictory bounds, [`Error::TooSmall`] when no useful KV cache fits the budget.
    pub fn start(model: LoadedModel, config: EngineConfig) -> Result<EngineHandle, Error> {
        Self::start_guessing(model, None, config)
    }

    /// The same with tokens guessed by a second model of the same vocabulary, loaded on the same ledger:
    /// [`EngineConfig::speculation`] says how many at a time.
    ///
    /// # Errors
    /// As [`Engine::start`], and [`Error::Config`] for a draft model of another vocabulary.
    pub fn start_with_draft(
        model: LoadedModel,
        draft: LoadedModel,
        config: EngineConfig,
    ) -> Result<EngineHandle, Error> {
        let (own, drafts) = (model.config().vocab_size, draft.config().vocab_size);
        if own != drafts {
            return Err(Error::Config(format!(
                "the draft model has a vocabulary of {drafts} tokens and the model one of {own}: its guesses would be \
                 other words"
            )));
        }
        if config.speculation.is_none() {
            return Err(Error::Config("a draft model needs a number of tokens to guess at a time".into()));
        }
        Self::start_guessing(model, Some(draft), config)
    }

    /// An engine over a model that another device runs. Its budget is hard: what does not fit is refused before anything is
    /// loaded.
    ///
    /// # Errors
    /// As [`Engine::start`], and what the device reports.
    pub fn start_on(backend: impl Backend, config: EngineConfig) -> Result<EngineHandle, Error> {
        config.validate()?;
        if config.adapter_rank > 0 || config.adapter_bytes > 0 {
            return Err(Error::Config("this device lays no adapters over a model; merge one instead".into()));
        }
        let wishes = config.wishes(backend.kv_type());
        let (grant, room) = footprint::grant_on(&backend, wishes)?;
        let weight_bytes = backend.weight_bytes();
        let source = (Source::Lookup, Cost::new(weight_bytes, 0, 0));
        let facts = Facts::new(backend.config(), grant.context_limit, &config, source);
        let block_bytes = footprint::kv_block_bytes(backend.config(), backend.kv_type());
        let stats = EngineStats {
            weight_bytes,
            kv_bytes: grant.blocks as u64 * block_bytes,
            kv_host_bytes: grant.host_blocks as u64 * block_bytes,
            ..EngineStats::default()
        };
        let scheduler = Scheduler::new(config.limits(grant.max_batch_tokens), grant.blocks, KV_BLOCK)
            .with_host(grant.host_blocks);
        Self::start_with(backend.start(room)?, None, scheduler, facts, stats, None, None)
    }

    fn start_guessing(
        model: LoadedModel,
        draft: Option<LoadedModel>,
        config: EngineConfig,
    ) -> Result<EngineHandle, Error> {
        config.validate()?;
        let draft_config = draft.as_ref().map(|draft| (draft.config(), draft.kv_type()));
        let wishes = Wishes { draft: draft_config, ..config.wishes(model.kv_type()) };
        let grant = footprint::grant(model.config(), wishes, model.ledger())?;
        let source = if draft.is_some() { Source::Draft } else { Source::Lookup };
        let (bytes, from_disk) = model.bytes_per_pass();
        let cost = Cost::new(bytes, from_disk, draft.as_ref().map_or(0, |draft| draft.bytes_per_pass().0));
        let facts = Facts::new(model.config(), grant.context_limit, &config, (source, cost));
        let models = || [Some(&model), draft.as_ref()].into_iter().flatten();
        let block_bytes = |m: &LoadedModel| footprint::kv_block_bytes(m.config(), m.kv_type());
        let block_bytes: u64 = models().map(block_bytes).sum();
        let stats = EngineStats {
            weight_bytes: models().map(LoadedModel::weight_bytes).sum(),
            kv_bytes: grant.blocks as u64 * block_bytes,
            kv_host_bytes: grant.host_blocks as u64 * block_bytes,
            ..EngineStats::default()
        };
        let scheduler = Scheduler::new(config.limits(grant.max_batch_tokens), grant.blocks, KV_BLOCK)
            .with_host(grant.host_blocks);
        let streaming = model.stream_counters();
        let adapters = model.adapter_loader()?;
        let runner = |model, working| Runner::new(model, grant.blocks, grant.host_blocks, working);
        let draft = draft.map(|draft| runner(draft, grant.draft_working_bytes));
        let cache = DraftCache {
            blocks: [grant.blocks, grant.host_blocks],
            block_tokens: KV_BLOCK,
            rows: grant.max_batch_tokens,
        };
        let draft = draft.transpose()?.map(|draft| Draft::new(draft, cache));
        let runner = runner(model, grant.working_bytes)?;
        Self::start_with(runner, draft, scheduler, facts, stats, streaming, Some(adapters))
    }

    fn start_with(
        forward: impl Forward + Send + 'static,
        draft: Option<Draft>,
        scheduler: Scheduler,
        facts: Facts,
        stats: EngineStats,
        streaming: Option<Arc<Counters>>,
        adapters: Option<AdapterLoader>,
    ) -> Result<EngineHandle, Error> {
        let state = State {
            scheduler,
            arrived: Vec::new(),
            next_id: 0,
            mode: Mode::Open,
            failure: None,
            pace: Pace::default(),
            fault: None,
            stats,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let worker = worker::Worker::new(shared.clone(), forward, draft);
        let thread = std::thread::Builder::new().name("hearth-engine".into()).spawn(move || worker.run());
        let thread = Mutex::new(Some(thread.map_err(Error::Thread)?));
        Ok(EngineHandle { owner: Arc::new(Owner { shared, facts, streaming, adapters, thread }) })
    }
}

/// What never changes while an engine lives.
#[derive(Clone, Copy, Debug)]
struct Facts {
    context_limit: usize,
    vocab_size: usize,
    hidden_size: usize,
    /// Dynamic RoPE scaling makes the keys of prompts longer than this depend on the prompt's length.
    rotates_by_length_from: Option<usize>,
    /// Largest rank of adapters.
    adapter_rank: usize,
    /// Whether and how tokens are guessed.
    guesses: Option<(Speculation, Source, Cost)>,
}

impl Facts {
    fn new(
        config: &ModelConfig,
        context_limit: usize,
        bounds: &EngineConfig,
        (source, cost): (Source, Cost),
    ) -> Self {
        let rotates_by_length_from = match config.rope.scaling {
            RopeScaling::Dynamic { original_max_position, .. } => Some(original_max_position),
            _ => None,
        };
        Self {
            context_limit,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            rotates_by_length_from,
            adapter_rank: bounds.adapter_rank,
            guesses: bounds.speculation.map(|speculation| (speculation, source, cost)),
        }
    }
}

/// How far an engine is on its way from start to end. Only ever moves down this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    /// Takes requests.
    Open,
    /// Finishes what it has.
    Draining,
    /// Fails what it has.
    Stopping,
    /// The worker has ended.
    Gone,
}

/// What callers and worker share.
struct State {
    scheduler: Scheduler,
    /// Accepted since the worker last looked.
    arrived: Vec<(RequestId, Sequence)>,
    next_id: RequestId,
    mode: Mode,
    /// What ended it, if nobody asked it to end.
    failure: Option<String>,
    pace: Pace,
    /// Why the last step could not be computed, unless it was for what it was about.
    fault: Option<String>,
    /// Counters; gauges are filled in when asked for.
    stats: EngineStats,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when requests arrive and when the mode changes.
    changed: Condvar,
}

impl Shared {
    /// A panic leaves the state usable: each critical section is bookkeeping that ends or asserts before it changes
    /// anything.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_at_most<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Duration,
    ) -> (MutexGuard<'a, State>, WaitTimeoutResult) {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner)
    }

    fn advance_to(&self, mode: Mode) {
        let mut state = self.lock();
        state.mode = state.mode.max(mode);
        self.changed.notify_all();
    }
}

/// A running engine. Clones are the same engine.
#[derive(Clone)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

/// Ends the engine when the last handle is gone.
struct Owner {
    shared: Arc<Shared>,
    facts: Facts,
    streaming: Option<Arc<Counters>>,
    adapters: Option<AdapterLoader>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.advance_to(Mode::Draining);
    }
}

impl EngineHandle {
    /// Queues a request of nobody in particular.
    ///
    /// # Errors
    /// As [`EngineHandle::submit_as`].
    pub fn submit(&self, request: Request) -> Result<Generation, SubmitError> {
        self.submit_as(request, Standing::default())
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`SubmitError`]: the request cannot be served, or not now. Nothing was queued then.
    pub fn submit_as(&self, request: Request, standing: Standing) -> Result<Generation, SubmitError> {
        self.check(&request.prompt, request.max_tokens)?;
        sampler::validate(&request.sampling, self.owner.facts.vocab_size)?;
        self.check_adapter(request.adapter.as_deref())?;
        let reuse = request.prompt_logprobs.is_none();
        let adapter = request.adapter.as_deref();
        let arrival = self.arrival(&request.prompt, request.max_tokens, reuse, adapter, &standing);
        let guesser = self.owner.facts.guesses.map(|(how, source, cost)| Guesser::new(how, source, cost));
        self.enqueue(Sequence::new(request, standing.max_queue_time, guesser)?, arrival)
    }

    /// Queues a prompt whose vector is wanted: it sends [`Event::Embedding`](crate::api::Event::Embedding).
    ///
    /// # Errors
    /// As [`EngineHandle::submit`].
    pub fn embed(
        &self,
        prompt: Vec<u32>,
        pooling: Pooling,
        adapter: Option<Arc<Adapter>>,
    ) -> Result<Generation, SubmitError> {
        self.check(&prompt, 0)?;
        self.check_adapter(adapter.as_deref())?;
        // Every token's hidden state is wanted, so none may be skipped.
        let arrival = self.arrival(&prompt, 0, false, adapter.as_deref(), &Standing::default());
        self.enqueue(Sequence::embedding(prompt, pooling, adapter), arrival)
    }

    fn enqueue(
        &self,
        (sequence, generation): (Sequence, Generation),
        arrival: Arrival,
    ) -> Result<Generation, SubmitError> {
        let mut state = self.owner.shared.lock();
        if state.mode != Mode::Open {
            return Err(SubmitError::Stopped);
        }
        let (id, limit) = (state.next_id, state.scheduler.limits().max_waiting);
        let queued = state.scheduler.enqueue(Arrival { id, ..arrival });
        queued.map_err(|full| SubmitError::Busy {
            waiting: full.waiting,
            limit,
            retry_after_s: state.pace.retry_after_s(full.waiting),
        })?;
        state.next_id += 1;
        state.arrived.push((id, sequence));
        self.owner.shared.changed.notify_all();
        Ok(generation)
    }

    fn arrival(
        &self,
        prompt: &[u32],
        max_tokens: usize,
        reuse: bool,
        adapter: Option<&Adapter>,
        standing: &Standing,
    ) -> Arrival {
        let length =
            self.owner.facts.rotates_by_length_from.map_or(0, |length| prompt.len().max(length) as u64);
        // Positions are u32, so the two never meet.
        let root = u64::from(adapter.map_or(0, Adapter::number)) << 32 | length;
        Arrival {
            client: standing.client.clone().unwrap_or_default(),
            priority: standing.priority,
            root,
            reuse,
            ..Arrival::new(0, prompt.to_vec(), max_tokens)
        }
    }

    fn check_adapter(&self, adapter: Option<&Adapter>) -> Result<(), SubmitError> {
        let limit = self.owner.facts.adapter_rank;
        match adapter.map(Adapter::rank).filter(|rank| *rank > limit) {
            Some(rank) => Err(SubmitError::AdapterRank { rank, limit }),
            None => Ok(()),
        }
    }

    fn check(&self, prompt: &[u32], max_tokens: usize) -> Result<(), SubmitError> {
        let Facts { context_limit: limit, vocab_size, .. } = self.owner.facts;
        check_tokens(prompt, vocab_size)?;
        let prompt = prompt.len();
        if prompt.saturating_add(max_tokens) > limit {
            return Err(SubmitError::TooLong { prompt, max_tokens, limit });
        }
        Ok(())
    }

    /// Loads an adapter for requests to come, while others run. It stays in memory as long as it is held by somebody.
    ///
    /// # Errors
    /// As [`AdapterLoader::load`]; its rank may be [`EngineConfig::adapter_rank`] at most.
    pub fn load_adapter(&self, path: &Path) -> Result<Arc<Adapter>, Error> {
        let loader = self.owner.adapters.as_ref();
        let loader = loader.ok_or_else(|| Error::Config("this model takes no adapters".into()))?;
        loader.load(path, self.owner.facts.adapter_rank)
    }

    /// Counters and gauges of this moment.
    pub fn stats(&self) -> EngineStats {
        let state = self.owner.shared.lock();
        let blocks = state.scheduler.blocks();
        let (kv_host_blocks_total, kv_host_blocks_held) = blocks.host();
        let (kv_blocks_moved_out, kv_blocks_brought_back) = blocks.moved();
        EngineStats {
            kv_host_blocks_total,
            kv_host_blocks_held,
            kv_blocks_moved_out,
            kv_blocks_brought_back,
            running: state.scheduler.running(),
            waiting: state.scheduler.waiting(),
            kv_blocks_used: blocks.used(),
            streamed: self.owner.streaming.as_ref().map(|s| s.read()).unwrap_or_default(),
            preemptions: state.scheduler.preemptions(),
            kv_blocks_idle: blocks.idle(),
            kv_blocks_total: blocks.total(),
            ..state.stats
        }
    }

    /// Why requests cannot be answered at the moment, or any more. An engine whose weights could not be read fails the requests
    /// of that step, takes others and tries again; once it can read them this is `None` again.
    pub fn fault(&self) -> Option<String> {
        let state = self.owner.shared.lock();
        match state.mode {
            Mode::Open => state.fault.clone(),
            _ => Some(SubmitError::Stopped.to_string()),
        }
    }

    /// Whole seconds, at least 1, after which a client that was sent away should try again: when half of those who wait
    /// will probably have begun.
    pub fn retry_after_s(&self) -> u32 {
        let state = self.owner.shared.lock();
        state.pace.retry_after_s(state.scheduler.waiting())
    }

    /// Most tokens of prompt and output together.
    pub fn context_limit(&self) -> usize {
        self.owner.facts.context_limit
    }

    /// Token ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.owner.facts.vocab_size
    }

    /// Length of an embedding.
    pub fn hidden_size(&self) -> usize {
        self.owner.facts.hidden_size
    }

    /// What ended the engine, if it ended by itself: then it takes no requests any more, and those it had have failed.
    pub fn failure(&self) -> Option<String> {
        self.owner.shared.lock().failure.clone()
    }

    /// Takes no more requests, finishes those it has and ends. Blocks until then.
    pub fn drain(&self) {
        self.end(Mode::Draining);
    }

    /// Takes no more requests, fails those it has after the current step and ends. Blocks until then; also ends a
    /// [`EngineHandle::drain`] that takes too long.
    pub fn shutdown(&self) {
        self.end(Mode::Stopping);
    }

    fn end(&self, mode: Mode) {
        let shared = &self.owner.shared;
        shared.advance_to(mode);
        let mut state = shared.lock();
        while state.mode != Mode::Gone {
            state = shared.wait(state);
        }
        drop(state);
        let thread = self.owner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The worker catches its panics; what is left to wait for is that its memory is freed.
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests;
