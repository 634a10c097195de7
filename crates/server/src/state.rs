//! What handlers share.

use crate::adapters::Adapters;
use crate::config::ServerConfig;
use crate::constrain::Grammars;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::room::Room;
use crate::tools::{self, Syntax};
use hearth_data::{ChatTemplate, Tokenizer};
use hearth_engine::EngineHandle;
use hearth_engine::api::Adapter;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// A loaded model, ready to answer.
pub struct Service {
    /// The engine.
    pub engine: EngineHandle,
    /// Text ⇄ ids. Without one the server takes and gives token ids only.
    pub tokenizer: Option<Tokenizer>,
    /// Renders conversations. Without one `/v1/chat/completions` is refused.
    pub template: Option<ChatTemplate>,
    /// Tokens that end a generation unless the request says `ignore_eos`.
    pub eos_tokens: Vec<u32>,
    /// Adapters by name, loaded for this engine.
    pub adapters: Vec<(String, Arc<Adapter>)>,
}

/// A model with what is made of it once.
pub(crate) struct Loaded {
    service: Service,
    adapters: Adapters,
    /// Made by the first request that asks for a format.
    grammars: OnceLock<Result<Grammars, ApiError>>,
    tool_syntax: Option<&'static Syntax>,
}

impl Deref for Loaded {
    type Target = Service;

    fn deref(&self) -> &Service {
        &self.service
    }
}

impl Loaded {
    /// Adapters by name.
    pub(crate) fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// How the model writes tool calls, if that is known.
    pub(crate) fn tool_syntax(&self) -> Option<&'static Syntax> {
        self.tool_syntax
    }

    /// Compiles output formats for the model's vocabulary.
    ///
    /// # Errors
    /// 400 when the model has no tokenizer or no token to end with.
    pub(crate) fn grammars(&self) -> Result<&Grammars, ApiError> {
        self.grammars.get_or_init(|| Grammars::new(&self.service)).as_ref().map_err(Clone::clone)
    }
}

/// State of a server, cheap to clone. It starts without a model; [`AppState::ready`] hands one in.
#[derive(Clone)]
pub struct AppState {
    shared: Arc<Shared>,
}

struct Shared {
    config: ServerConfig,
    service: OnceLock<Arc<Loaded>>,
    metrics: Arc<Metrics>,
    phase: watch::Sender<Phase>,
    created: u64,
    sequences: Arc<AtomicUsize>,
    room: Room,
}

/// How far the server's life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Requests are taken.
    Open,
    /// Requests in flight finish, new ones are refused.
    Draining,
    /// Requests in flight end with an error.
    Ending,
}

impl AppState {
    /// A server that listens but has no model yet.
    pub fn new(config: ServerConfig) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let shared = Shared {
            room: Room::new(config.max_traffic_bytes),
            config,
            service: OnceLock::new(),
            metrics: Arc::new(Metrics::new()),
            phase: watch::Sender::new(Phase::Open),
            created,
            sequences: Arc::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Hands in the loaded model; from now on `/health` answers 200. Later calls change nothing.
    pub fn ready(&self, mut service: Service) {
        // From here on the names own them: what is unloaded must not be held by anyone else.
        let adapters = Adapters::new(&std::mem::take(&mut service.adapters));
        let template = service.template.as_ref().map(|template| template.source());
        let tool_syntax = tools::syntax(self.config().tool_format.as_deref(), template);
        let loaded = Loaded { service, adapters, grammars: OnceLock::new(), tool_syntax };
        let _ = self.shared.service.set(Arc::new(loaded));
    }

    /// The settings.
    pub fn config(&self) -> &ServerConfig {
        &self.shared.config
    }

    /// The model, if it is loaded and the server is not shutting down.
    pub(crate) fn service(&self) -> Result<Arc<Loaded>, ApiError> {
        if *self.shared.phase.borrow() != Phase::Open {
            return Err(ApiError::shutting_down());
        }
        self.loaded().ok_or_else(ApiError::loading)
    }

    /// The model, whatever the phase.
    pub(crate) fn loaded(&self) -> Option<Arc<Loaded>> {
        self.shared.service.get().cloned()
    }

    /// Room for bodies and answers.
    pub(crate) fn room(&self) -> &Room {
        &self.shared.room
    }

    /// Seconds after which a refused request is worth another try.
    pub(crate) fn retry_after_s(&self) -> u32 {
        self.loaded().map_or(1, |loaded| loaded.engine.retry_after_s())
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// Unix time at which the server started.
    pub(crate) fn created(&self) -> u64 {
        self.shared.created
    }

    pub(crate) fn phase(&self) -> watch::Receiver<Phase> {
        self.shared.phase.subscribe()
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.shared.phase.send_replace(phase);
    }

    /// Counts a sequence until the guard is dropped.
    pub(crate) fn count_sequence(&self) -> SequenceGuard {
        self.shared.sequences.fetch_add(1, Ordering::Relaxed);
        SequenceGuard(self.shared.sequences.clone())
    }

    /// Sequences whose tasks are alive.
    pub(crate) fn sequences(&self) -> usize {
        self.shared.sequences.load(Ordering::Relaxed)
    }
}

/// One sequence in flight.
pub(crate) struct SequenceGuard(Arc<AtomicUsize>);

impl Drop for SequenceGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
