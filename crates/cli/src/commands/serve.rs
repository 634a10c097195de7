//! `hearth serve`: an OpenAI-compatible HTTP API over one model.

pub mod log;
pub mod recorder;
pub mod traces;

use crate::exit::{TryAgain, usage};
use crate::fingerprint::fingerprint;
use crate::interrupt::Interrupt;
use crate::open::Model;
use crate::running::{ModelArgs, Running, SpeculationArgs};
use crate::ui::{Report, Ui, table};
use anyhow::{Context, anyhow};
use hearth_engine::{EngineConfig, EngineHandle};
use hearth_memory::Size;
use hearth_server::record::Observers;
use hearth_server::{AppState, ServeError, ServerConfig, Service, check_adapter_name};
use serde::Serialize;
use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// Serves a model until SIGINT or SIGTERM; requests in flight are finished first.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// Address to listen on
    #[arg(long, value_name = "H", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 = any free one
    #[arg(long, value_name = "P", default_value_t = 8080)]
    pub port: u16,
    /// Key that clients must send as a bearer token
    #[arg(long, value_name = "K")]
    pub api_key: Option<String>,
    /// Sequences in the batch at once
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub max_seqs: usize,
    /// Tokens in one forward pass, those being generated and pieces of prompts together; less where memory is short
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().max_batch_tokens)]
    pub max_batch_tokens: usize,
    /// Host memory for KV blocks that were computed and that the device has no room for any more; prompts that begin alike
    /// get them back instead of computing them [default: none]
    #[arg(long, value_name = "SIZE")]
    pub kv_host: Option<Size>,
    /// Requests that may wait for a place in the batch; more are told when to come back
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_waiting: usize,
    /// Longest wait for a place in the batch; whoever waits longer is told when to come back [default: no limit]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub max_queue_time: Option<Duration>,
    /// Host memory for requests that are read and answers that are made or not yet taken, besides --memory: each reserves
    /// beforehand what it may become, and is told when to come back if that is not free
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    pub max_traffic: Size,
    /// Name under which the model is listed [default: the file's or directory's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Whether tokens are guessed
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Let clients load adapters from this folder and unload them, through /v1/load_lora_adapter
    #[arg(long, value_name = "DIR")]
    pub adapter_folder: Option<PathBuf>,
    /// Bytes of the device's budget kept free for the adapters that clients load
    #[arg(long, value_name = "SIZE", default_value = "64MiB", requires = "adapter_folder")]
    pub adapter_memory: Size,
    /// Largest rank of the adapters that clients load
    #[arg(long, value_name = "N", default_value_t = 64, requires = "adapter_folder")]
    pub max_adapter_rank: usize,
    /// How the model writes tool calls: hermes, mistral or llama3_json [default: as its chat template tells]
    #[arg(long, value_name = "FORMAT")]
    pub tool_format: Option<String>,
    /// Write a line of JSON to stderr for every request: sizes and times, no prompts
    #[arg(long)]
    pub log_requests: bool,
    /// Append prompts, parameters and tokens of every request to a file, for `hearth replay`
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// OpenTelemetry collector (OTLP over HTTP), as http://localhost:4318
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
}

impl ServeArgs {
    /// On this machine only, on any free port.
    pub fn local(model: ModelArgs) -> Self {
        Self {
            model,
            host: "127.0.0.1".into(),
            port: 0,
            api_key: None,
            max_seqs: 16,
            max_batch_tokens: EngineConfig::default().max_batch_tokens,
            kv_host: None,
            max_waiting: 1024,
            max_queue_time: None,
            max_traffic: Size(512 << 20),
            name: None,
            speculation: SpeculationArgs::default(),
            adapter_folder: None,
            adapter_memory: Size(64 << 20),
            max_adapter_rank: 64,
            tool_format: None,
            log_requests: false,
            record: None,
            otlp: None,
        }
    }
}

/// What a server did in its life.
#[derive(Clone, Debug, Serialize)]
pub struct ServeReport {
    /// Where it listened.
    pub url: String,
    /// Generations that were finished.
    pub finished: u64,
    /// Generations that were cancelled.
    pub cancelled: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
}

/// A server on threads of its own.
pub struct Server {
    address: SocketAddr,
    engine: EngineHandle,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), ServeError>>,
}

/// Serves until a signal asks for the end.
///
/// # Errors
/// A port in use, a model that cannot be loaded, requests that outlived the drain timeout.
pub fn run(args: &ServeArgs, ui: &Ui) -> anyhow::Result<ServeReport> {
    let interrupt = Interrupt::listen()?;
    let server = Server::start(args, ui)?;
    let line = format!("listening on {}", server.url());
    if ui.json() {
        ui.note(&line)
    } else {
        ui.stream(&(line + "\n"))?
    }
    while !interrupt.raised() && !server.thread.is_finished() && server.engine.failure().is_none() {
        std::thread::sleep(Duration::from_millis(50));
    }
    ui.note("finishing what is in flight …");
    server.stop()
}

impl Server {
    /// Listens at once, answers 503 until the model is loaded, and returns when it is.
    ///
    /// # Errors
    /// A port in use, a model that cannot be loaded.
    pub fn start(args: &ServeArgs, ui: &Ui) -> anyhow::Result<Self> {
        let config = config(args)?;
        let listener = listen(&args.host, args.port)?;
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() && args.api_key.is_none() {
            let host = address.ip();
            ui.note(format!(
                "anyone who reaches {host} may use this server; --api-key K keeps it to those who know K"
            ));
        }
        let state = AppState::new(config);
        let (stop, stopped) = oneshot::channel();
        let thread = spawn(listener, state.clone(), stopped)?;
        // From here on the server must be taken down again when loading fails: dropping `stop` does that.
        let Running { model, engine, adapters } =
            Running::start_serving(&args.model, &args.speculation, engine_config(args), ui)?;
        let eos_tokens = model.eos_tokens();
        state.ready(Service {
            engine: engine.clone(),
            tokenizer: model.tokenizer,
            template: model.template,
            eos_tokens,
            adapters,
        });
        Ok(Self { address, engine, stop, thread })
    }

    /// Where it listens, as `http://H:P`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Takes no more requests, finishes those in flight and ends.
    ///
    /// # Errors
    /// Requests that outlived the drain timeout, a listener that failed, an engine that ended by itself.
    pub fn stop(self) -> anyhow::Result<ServeReport> {
        let url = self.url();
        drop(self.stop);
        let ended = self.thread.join().map_err(|_| anyhow!("the server's thread panicked"))?;
        self.engine.shutdown();
        if let Some(failure) = self.engine.failure() {
            return Err(TryAgain(failure).into());
        }
        ended?;
        let stats = self.engine.stats();
        Ok(ServeReport {
            url,
            finished: stats.finished,
            cancelled: stats.cancelled,
            prompt_tokens: stats.prompt_tokens,
            generated_tokens: stats.generated_tokens,
        })
    }
}

fn config(args: &ServeArgs) -> anyhow::Result<ServerConfig> {
    args.model.budget()?;
    if args.max_seqs == 0 {
        return Err(usage("--max-seqs is 0, it must be at least 1"));
    }
    if args.api_key.as_deref() == Some("") {
        return Err(usage("--api-key is empty; give a key, or leave the flag out"));
    }
    if let Some(format) = args.tool_format.as_deref()
        && !hearth_server::tool_formats().any(|known| known == format)
    {
        let known = hearth_server::tool_formats().collect::<Vec<_>>().join(", ");
        return Err(usage(format!("--tool-format {format} is not known; known are {known}")));
    }
    if args.max_traffic.bytes() < 1 << 20 {
        return Err(usage(format!("--max-traffic is {}, no request fits below 1MiB", args.max_traffic)));
    }
    if let Some(folder) = args.adapter_folder.as_deref().filter(|folder| !folder.is_dir()) {
        return Err(usage(format!("--adapter-folder {}: there is no such folder", folder.display())));
    }
    let name = args.name.clone().unwrap_or_else(|| model_name(&args.model.model));
    let config = ServerConfig {
        model_aliases: vec![args.model.model.display().to_string()],
        api_key: args.api_key.clone(),
        max_seqs: args.max_seqs,
        max_queue_time: args.max_queue_time,
        max_traffic_bytes: args.max_traffic.bytes(),
        tool_format: args.tool_format.clone(),
        adapter_folder: args.adapter_folder.clone(),
        observers: observers(args)?,
        ..ServerConfig::new(name)
    };
    let mut names = BTreeSet::new();
    for (name, _) in args.model.live_adapters() {
        check_adapter_name(&config, name).map_err(|what| usage(format!("--adapter {name}=…: {what}")))?;
        if !names.insert(name) {
            return Err(usage(format!(
                "--adapter {name}=… is given twice; an adapter needs a name of its own"
            )));
        }
    }
    Ok(config)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = |_| "must be a number of seconds, as 2.5".to_owned();
    let seconds = text.parse().map_err(|e: std::num::ParseFloatError| wrong(e.to_string()))?;
    Duration::try_from_secs_f64(seconds).map_err(|e| wrong(e.to_string()))
}

fn engine_config(args: &ServeArgs) -> EngineConfig {
    let loads = args.adapter_folder.is_some();
    EngineConfig {
        max_seqs: args.max_seqs,
        max_batch_tokens: args.max_batch_tokens,
        max_waiting: args.max_waiting,
        kv_host_bytes: args.kv_host.map_or(0, Size::bytes),
        adapter_rank: if loads { args.max_adapter_rank } else { 0 },
        adapter_bytes: if loads { args.adapter_memory.bytes() } else { 0 },
        ..EngineConfig::default()
    }
}

/// Who is told of requests. The fingerprint of what is recorded needs the weights, so they are read twice.
fn observers(args: &ServeArgs) -> anyhow::Result<Observers> {
    let mut observers = Observers::default();
    if args.log_requests {
        observers.push(log::RequestLog);
    }
    if let Some(path) = &args.record {
        let model = Model::open_adapted(&args.model.model, args.model.merged_adapter()?, &Ui::silent())?;
        observers.push(recorder::Recorder::new(path, fingerprint(&model.files)?)?);
    }
    if let Some(url) = &args.otlp {
        if !url.starts_with("http://") {
            return Err(usage(format!("--otlp {url} is not an address that begins with http://")));
        }
        observers.push(traces::Traces::to(url).context("cannot start the thread that sends traces")?);
    }
    Ok(observers)
}

/// The last part of the path, without `.gguf`.
fn model_name(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let name = absolute.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

fn listen(host: &str, port: u16) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind((host, port)).map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => usage(format!(
            "port {port} of {host} is in use; choose another with --port, or --port 0 for any free one"
        )),
        _ => usage(format!("cannot listen on {host} port {port}: {e}")),
    })?;
    listener.set_nonblocking(true).context("cannot set up the listener")?;
    Ok(listener)
}

fn spawn(
    listener: TcpListener,
    state: AppState,
    stopped: oneshot::Receiver<()>,
) -> anyhow::Result<JoinHandle<Result<(), ServeError>>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .thread_name("hearth-http")
        .build()
        .context("cannot start the server's threads")?;
    let work = move || {
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let end = async {
                // An error means that the sender is gone: that is the signal.
                let _ = stopped.await;
            };
            hearth_server::serve(listener, state, end).await
        })
    };
    std::thread::Builder::new()
        .name("hearth-serve".into())
        .spawn(work)
        .context("cannot start the server's thread")
}

impl Report for ServeReport {
    fn text(&self) -> String {
        table([
            ("generations", format!("{} finished, {} cancelled", self.finished, self.cancelled)),
            ("prompt tokens", self.prompt_tokens.to_string()),
            ("generated tokens", self.generated_tokens.to_string()),
        ])
    }
}
