//! What the server is told when it starts.

use crate::record::Observers;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of a server. [`ServerConfig::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Name under which the model is listed and asked for.
    pub model_id: String,
    /// Other names that are accepted in a request's `model`.
    pub model_aliases: Vec<String>,
    /// If set, requests must carry `Authorization: Bearer <key>`. `/health`, `/metrics`, the
    /// playground's page and the OpenAPI document stay open.
    pub api_key: Option<String>,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Bytes for bodies that are read and answers that are made or not yet taken, at most: each reserves beforehand what
    /// it may become.
    pub max_traffic_bytes: u64,
    /// Most connections at once; more wait in the system's queue.
    pub max_connections: usize,
    /// How long a client may take to send a request's head, and how long a connection may be idle.
    pub header_timeout: Duration,
    /// How long a client may read nothing of what is written to it.
    pub write_timeout: Duration,
    /// How long a client may take to send its body.
    pub body_timeout: Duration,
    /// How long a request may take from arrival to last token; `None` = as long as it needs.
    pub request_timeout: Option<Duration>,
    /// How long a sequence may wait for its first forward pass; `None` = as long as it takes.
    pub max_queue_time: Option<Duration>,
    /// How long requests in flight may go on once shutdown begins.
    pub drain_timeout: Duration,
    /// Sequences of one request that are handed to the engine at a time, so that a large batch of prompts does not
    /// fill the queue for everyone else. Usually the engine's batch size.
    pub max_seqs: usize,
    /// Most sequences (prompts times `n`) in one request.
    pub max_sequences_per_request: usize,
    /// Where adapters lie that clients may load and unload. `None` = they may not.
    pub adapter_folder: Option<PathBuf>,
    /// How the model writes tool calls: `hermes`, `mistral` or `llama3_json`. `None` = as its chat template tells.
    pub tool_format: Option<String>,
    /// Who is told of every sequence that ends.
    pub observers: Observers,
    /// Silence after which a streamed response sends an SSE comment.
    pub keep_alive: Duration,
}

impl ServerConfig {
    /// Defaults for a model of this name.
    pub fn new(model_id: impl Into<String>) -> Self {
        Self {
            model_id: model_id.into(),
            model_aliases: Vec::new(),
            api_key: None,
            max_body_bytes: 8 << 20,
            max_traffic_bytes: 512 << 20,
            max_connections: 4096,
            header_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(60),
            request_timeout: None,
            max_queue_time: None,
            drain_timeout: Duration::from_secs(30),
            max_seqs: 16,
            max_sequences_per_request: 1024,
            adapter_folder: None,
            tool_format: None,
            observers: Observers::default(),
            keep_alive: Duration::from_secs(15),
        }
    }

    /// Whether the model itself goes by this name.
    pub(crate) fn is_base(&self, name: &str) -> bool {
        name == self.model_id || self.model_aliases.iter().any(|alias| alias == name)
    }
}
