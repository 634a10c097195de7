//! A model in memory, ready to answer: what `generate`, `chat`, `serve` and their kin start from.

use crate::commands::plan::serving;
use crate::exit::{TryAgain, usage};
use crate::golden;
use crate::open::Model;
use crate::running_on_card as card;
use crate::ui::{Ui, bytes};
use anyhow::{Context, anyhow, bail};
use hearth_engine::api::{Adapter, Event, FinishReason, Request, Sampling};
use hearth_engine::{
    Activations, Aim, Arithmetic, Crowd, Engine, EngineConfig, EngineHandle, KvType, LoadedModel, Scorer,
    Speculation, WeightPlan, footprint,
};
use hearth_memory::{Budget, Kind, Ledger, Tier};
use hearth_weights::ModelFiles;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which model, within which memory.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ModelArgs {
    /// Hugging Face directory, .gguf file, bundle or checkpoint
    pub model: PathBuf,
    /// LoRA adapter: DIR is merged into the weights; NAME=DIR, for serve, generate and replay, is laid over them
    /// for the requests that name it, and may be given several times
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<AdapterArg>,
    /// What computes: cpu, or a card as cuda:0 [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Byte limit: 600MiB, or device=600MiB,host=1GiB; a card's is nine tenths of what is free on it unless you say
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// What quantized weights multiply: f32, or int8 (activations rounded in blocks of 32, several times as fast)
    /// [default: int8; eval and logits: f32]
    #[arg(long, value_name = "TYPE", value_parser = activations)]
    pub activations: Option<Activations>,
    /// What the KV cache stores: f32, f16, bf16, or int8 (a scale per token and head; half the bytes of f16)
    /// [default: f16 for quantized weights with int8 activations, else f32]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    pub kv_dtype: Option<KvType>,
    /// What the device holds where it does not hold all weights: as many of them as it can (latency), or the keys and values
    /// of the batch that is forecast most tokens per second (throughput)
    #[arg(long, value_name = "AIM", value_enum, default_value_t)]
    pub placement: PlacementAim,
    /// Check a bundle's golden prompts before anything else
    #[arg(long)]
    pub verify_golden: bool,
}

/// What weights are placed for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PlacementAim {
    /// The soonest next token of one sequence.
    #[default]
    Latency,
    /// The most tokens per second of all sequences together.
    Throughput,
}

impl PlacementAim {
    /// As the engine takes it. This machine is measured only for weights that do not fit the device.
    ///
    /// # Errors
    /// As [`WeightPlan::new`], and a disk that cannot be measured.
    pub fn aim(
        self,
        files: &ModelFiles,
        arithmetic: Arithmetic,
        config: &EngineConfig,
        ledger: &Ledger,
        ui: &Ui,
    ) -> anyhow::Result<Aim> {
        if self == Self::Latency || WeightPlan::new(files, arithmetic, ledger)?.placement.is_resident() {
            return Ok(Aim::Latency);
        }
        Ok(Aim::Throughput(Crowd {
            max_seqs: config.max_seqs,
            max_batch_tokens: config.max_batch_tokens,
            context: serving::CONTEXT,
            speeds: serving::speeds(true, files, false, ui)?,
        }))
    }
}

/// An adapter on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterArg {
    /// The name requests ask for it by; without one it is merged.
    pub name: Option<String>,
    /// Its directory.
    pub path: PathBuf,
}

impl FromStr for AdapterArg {
    type Err = Infallible;

    /// A path that exists as it stands is one, whatever signs it holds.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.split_once('=').filter(|_| !Path::new(text).exists()) {
            Some((name, path)) => Self { name: Some(name.to_owned()), path: path.into() },
            None => Self { name: None, path: text.into() },
        })
    }
}

impl ModelArgs {
    /// The adapter to be merged.
    ///
    /// # Errors
    /// When there are several.
    pub fn merged_adapter(&self) -> anyhow::Result<Option<&Path>> {
        let mut merged = self.adapter.iter().filter(|a| a.name.is_none());
        match (merged.next(), merged.next()) {
            (first, None) => Ok(first.map(|a| a.path.as_path())),
            (_, Some(second)) => Err(usage(format!(
                "--adapter {}: one adapter can be merged; give the others names, as NAME=DIR",
                second.path.display()
            ))),
        }
    }

    /// The adapters to be laid over the running model, by name.
    pub fn live_adapters(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.adapter.iter().filter_map(|a| Some((a.name.as_deref()?, a.path.as_path())))
    }

    /// The model at this path, without limits.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { model: path.into(), ..Self::default() }
    }

    /// The byte limits.
    ///
    /// # Errors
    /// When the text is not a size.
    pub fn budget(&self) -> anyhow::Result<Budget> {
        match &self.memory {
            None => Ok(Budget::UNLIMITED),
            Some(text) => text.parse().map_err(|e: hearth_memory::Error| usage(format!("--memory: {e}"))),
        }
    }

    /// Opens the model's files; golden prompts are checked if that is wanted.
    ///
    /// # Errors
    /// Files that are missing or damaged, golden prompts that do not give their logits.
    pub fn open(&self, ui: &Ui) -> anyhow::Result<Model> {
        self.without_names()?;
        self.open_base(ui)
    }

    /// Scores sequences of up to `context` tokens; `activations` unless the user named others.
    ///
    /// # Errors
    /// Weights that cannot be read, a budget too small.
    pub fn scorer(
        &self,
        model: &Model,
        activations: Activations,
        context: usize,
        ui: &Ui,
    ) -> anyhow::Result<Scorer> {
        if let Some(ordinal) = card::ordinal(self.device.as_deref())? {
            return card::scorer(self, model, ordinal, context);
        }
        let alone = EngineConfig { max_seqs: 1, ..EngineConfig::default() };
        let loaded = self.load(model, activations, &alone, &Ledger::new(self.budget()?), ui)?;
        Ok(Scorer::new(loaded, context)?)
    }

    /// Refuses a card where only the CPU can be meant.
    ///
    /// # Errors
    /// A sentence that ends with what to do `instead`.
    pub fn on_cpu(&self, instead: &str) -> anyhow::Result<()> {
        match card::ordinal(self.device.as_deref())? {
            None => Ok(()),
            Some(ordinal) => Err(usage(format!("--device cuda:{ordinal}: {instead}"))),
        }
    }

    fn without_names(&self) -> anyhow::Result<()> {
        let Some((name, path)) = self.live_adapters().next() else { return Ok(()) };
        let path = path.display();
        Err(usage(format!(
            "--adapter {name}={path}: names are for serve, generate and replay; here give --adapter {path}"
        )))
    }

    fn open_base(&self, ui: &Ui) -> anyhow::Result<Model> {
        let model = Model::open_adapted(&self.model, self.merged_adapter()?, ui)?;
        if self.verify_golden {
            verify_golden(&self.model, &model, ui)?;
        }
        Ok(model)
    }

    /// Reads a model's weights into memory for an engine within these bounds.
    fn load(
        &self,
        model: &Model,
        activations: Activations,
        config: &EngineConfig,
        ledger: &Ledger,
        ui: &Ui,
    ) -> anyhow::Result<LoadedModel> {
        let activations = self.activations.unwrap_or(activations);
        let arithmetic = Arithmetic { activations, kv_type: self.kv_dtype };
        let aim = self.placement.aim(&model.files, arithmetic, config, ledger, ui)?;
        Ok(LoadedModel::load_aimed(&model.files, arithmetic, aim, ledger, &|_| ())?)
    }
}

fn activations(text: &str) -> Result<Activations, String> {
    match text {
        "f32" => Ok(Activations::F32),
        "int8" => Ok(Activations::Int8),
        _ => Err("must be f32 or int8".to_owned()),
    }
}

/// A KV cache's number format by its name.
///
/// # Errors
/// The names there are.
pub fn kv_type(text: &str) -> Result<KvType, String> {
    let found = KvType::ALL.into_iter().find(|(name, _)| *name == text);
    let names = || KvType::ALL.map(|(name, _)| name).join(", ");
    found.map(|(_, kind)| kind).ok_or_else(|| format!("must be one of {}", names()))
}

fn verify_golden(path: &Path, model: &Model, ui: &Ui) -> anyhow::Result<()> {
    let bundle = hearth_weights::bundle::is_bundle(path);
    let Some(golden) = (if bundle { hearth_weights::bundle::golden(path)? } else { None }) else {
        return Err(usage(format!("{} has no golden prompts; only bundles have", path.display())));
    };
    let difference = golden::difference(&model.files, &serde_json::from_slice(&golden)?)?;
    if difference > golden::TOLERANCE {
        bail!(
            "{}: logits of the golden prompts are off by {difference}, at most {} is allowed",
            path.display(),
            golden::TOLERANCE
        );
    }
    ui.note(format!("golden prompts: logits agree (largest difference {difference:e})"));
    Ok(())
}

/// Whether and how tokens are guessed in advance.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SpeculationArgs {
    /// Guess tokens in advance and check them together: ngram looks up what followed the last tokens before. Answers stay
    /// the same
    #[arg(long, value_name = "HOW", value_enum, group = "guesses")]
    pub speculative: Option<Speculative>,
    /// Let this smaller model of the same vocabulary guess, within the same byte limit. Answers stay the same
    #[arg(long, value_name = "MODEL", group = "guesses")]
    pub draft: Option<PathBuf>,
    /// Most tokens guessed at a time [default: 8; of a draft model 4]
    #[arg(long, value_name = "K", requires = "guesses")]
    pub draft_tokens: Option<usize>,
}

/// Where guesses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Speculative {
    /// From the sequence itself.
    Ngram,
}

impl SpeculationArgs {
    /// As the engine takes it.
    fn speculation(&self) -> Option<Speculation> {
        let usual = match (self.speculative, &self.draft) {
            (None, None) => return None,
            (Some(Speculative::Ngram), _) => 8,
            (None, Some(_)) => 4,
        };
        Some(Speculation { draft_tokens: self.draft_tokens.unwrap_or(usual) })
    }
}

/// A text whose tokens tell vocabularies apart.
const PROBE: &str = "The quick brown fox — 1,234 naïve words.\n\tdef f(x): return [x] * 2  # 東京";

/// The model that guesses.
fn load_draft(path: &Path, args: &ModelArgs, ledger: &Ledger) -> anyhow::Result<(Model, LoadedModel)> {
    let model = Model::open_adapted(path, None, &Ui::silent())?;
    let activations = args.activations.unwrap_or(Activations::Int8);
    let arithmetic = Arithmetic { activations, kv_type: args.kv_dtype };
    let loaded = LoadedModel::load(&model.files, arithmetic, ledger, &|_| ())
        .with_context(|| format!("--draft {}", path.display()))?;
    Ok((model, loaded))
}

/// Refuses a draft model whose tokens are other words.
fn check_draft(path: &Path, draft: &Model, model: &Model) -> anyhow::Result<()> {
    if let (Some(guesses), Some(own)) = (&draft.tokenizer, &model.tokenizer)
        && guesses.encode(PROBE, false)? != own.encode(PROBE, false)?
    {
        let path = path.display();
        return Err(usage(format!(
            "--draft {path}: its tokenizer is another one, so its guesses would be other words"
        )));
    }
    Ok(())
}

/// What guessing came to, in the words of reports.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Guessed {
    /// Forward passes.
    pub steps: u64,
    /// Tokens guessed.
    pub draft_tokens: u64,
    /// Of these, tokens that were right.
    pub accepted_tokens: u64,
}

impl Guessed {
    /// What an engine guessed so far; nothing if it never did.
    pub fn of(engine: &EngineHandle) -> Option<Self> {
        let s = engine.stats();
        let guessed =
            Self { steps: s.steps, draft_tokens: s.draft_tokens, accepted_tokens: s.accepted_tokens };
        (s.drafts > 0).then_some(guessed)
    }
}

/// Words, weights and a running engine.
pub struct Running {
    /// The words.
    pub model: Model,
    /// The engine.
    pub engine: EngineHandle,
    /// Adapters by name.
    pub adapters: Vec<(String, Arc<Adapter>)>,
}

/// Where a model's weights lie, in a few words.
fn weights(model: &LoadedModel) -> String {
    let size = bytes(model.weight_bytes());
    let budget = model.ledger().budget();
    match model.placement() {
        Some(p) => {
            let [device, host, nvme] = Tier::ALL.map(|tier| p.count(tier));
            format!(
                "{size} of weights on the device with {device} blocks; streamed: {host} blocks from host memory, {nvme} \
                 from disk"
            )
        }
        None if budget.host.is_some() || budget.nvme.is_some() => {
            format!("{size} of weights, all on the device: nothing is streamed")
        }
        None => format!("{size} of weights"),
    }
}

/// What streaming moved, in the words of reports.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Streaming {
    /// Passes over the model.
    pub passes: u64,
    /// Bytes of weights read from disk.
    pub nvme_bytes: u64,
    /// Bytes of weights read from host memory.
    pub host_bytes: u64,
    /// Bytes of both per pass.
    pub bytes_per_pass: u64,
    /// 10⁹ bytes of both per second of passes.
    pub gb_s: f64,
    /// Seconds of passes, and those of them in which the model waited for weights.
    pub pass_s: f64,
    /// As above.
    pub wait_s: f64,
}

impl Streaming {
    /// What an engine streamed so far; nothing if it has all weights on the device.
    pub fn of(engine: &EngineHandle) -> Option<Self> {
        let s = engine.stats().streamed;
        (s.passes > 0).then(|| Self {
            passes: s.passes,
            nvme_bytes: s.nvme_bytes,
            host_bytes: s.host_bytes,
            bytes_per_pass: (s.nvme_bytes + s.host_bytes) / s.passes,
            gb_s: s.gb_s(),
            pass_s: s.pass_s,
            wait_s: s.wait_s,
        })
    }
}

/// What one generation came to.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
    /// Prompt tokens per second, up to the first generated token.
    pub prefill_tok_s: f64,
    /// Generated tokens per second, after the first.
    pub decode_tok_s: f64,
}

impl Running {
    /// Loads a model and starts an engine for `max_seqs` sequences at a time.
    ///
    /// # Errors
    /// As [`ModelArgs::load`], and bounds that contradict each other.
    pub fn start(args: &ModelArgs, max_seqs: usize, ui: &Ui) -> anyhow::Result<Self> {
        args.without_names()?;
        let config = EngineConfig { max_seqs, ..EngineConfig::default() };
        Self::start_serving(args, &SpeculationArgs::default(), config, ui)
    }

    /// The same for any bounds, with the adapters that have names, and with tokens guessed in advance.
    ///
    /// # Errors
    /// As [`Running::start`], and adapters or a draft model that do not belong to the model or do not fit the budget.
    pub fn start_serving(
        args: &ModelArgs,
        guesses: &SpeculationArgs,
        config: EngineConfig,
        ui: &Ui,
    ) -> anyhow::Result<Self> {
        let config = EngineConfig { speculation: guesses.speculation(), ..config };
        if let Some(ordinal) = card::ordinal(args.device.as_deref())? {
            card::refuse(args, guesses, &config)?;
            let model = args.open_base(ui)?;
            let engine = card::start(args, &model, ordinal, config, ui)?;
            return Ok(Self { model, engine, adapters: Vec::new() });
        }
        let ledger = Ledger::new(args.budget()?);
        // Streamed weights leave room for evicted KV blocks.
        let evicted = ledger.charge(Tier::Host, Kind::KvCache, config.kv_host_bytes).context("--kv-host")?;
        let Some(path) = &guesses.draft else {
            let model = args.open_base(ui)?;
            let loaded = args.load(&model, Activations::Int8, &config, &ledger, ui)?;
            drop(evicted);
            return Self::run(args, model, loaded, None, config, ui);
        };
        let (draft, guessing) = load_draft(path, args, &ledger)?;
        // The model's weights leave room for the other's cache.
        let room = footprint::draft_room(guessing.config(), guessing.kv_type());
        let room = ledger.charge(Tier::Device, Kind::KvCache, room)?;
        let model = args.open_base(ui)?;
        let loaded = args.load(&model, Activations::Int8, &config, &ledger, ui)?;
        drop((room, evicted));
        check_draft(path, &draft, &model)?;
        ui.note(format!("guesses by {}: {}", path.display(), weights(&guessing)));
        Self::run(args, model, loaded, Some(guessing), config, ui)
    }

    fn run(
        args: &ModelArgs,
        model: Model,
        loaded: LoadedModel,
        draft: Option<LoadedModel>,
        mut config: EngineConfig,
        ui: &Ui,
    ) -> anyhow::Result<Self> {
        ui.note(format!("{}: {}", args.model.display(), weights(&loaded)));
        let loader = loaded.adapter_loader()?;
        let mut adapters = Vec::new();
        for (name, path) in args.live_adapters() {
            let adapter = loader.load(path, usize::MAX)?;
            let size = bytes(adapter.bytes());
            ui.note(format!("adapter {name}: {size}, rank {} ({})", adapter.rank(), path.display()));
            config.adapter_rank = config.adapter_rank.max(adapter.rank());
            adapters.push((name.to_owned(), adapter));
        }
        let engine = match draft {
            Some(draft) => Engine::start_with_draft(loaded, draft, config)?,
            None => Engine::start(loaded, config)?,
        };
        Ok(Self { model, engine, adapters })
    }

    /// Generates up to `n` tokens under the first adapter with a name, if there is one, handing each to `each` as it comes. Tokens of `stop` end it and are not given.
    ///
    /// # Errors
    /// A prompt that does not fit, an engine that fails, and whatever `each` returns.
    pub fn generate(
        &self,
        prompt: Vec<u32>,
        n: usize,
        sampling: Sampling,
        stop: Vec<u32>,
        mut each: impl FnMut(u32) -> anyhow::Result<()>,
    ) -> anyhow::Result<Answer> {
        let prompt_len = prompt.len();
        let request = Request {
            prompt,
            max_tokens: n,
            stop_tokens: stop,
            sampling,
            logprobs: None,
            prompt_logprobs: None,
            adapter: self.adapters.first().map(|(_, adapter)| adapter.clone()),
        };
        let start = Instant::now();
        let mut generation = self.engine.submit(request).map_err(|e| usage(e.to_string()))?;
        let (mut tokens, mut first) = (Vec::new(), None);
        let reason = loop {
            match generation.next_blocking() {
                Some(Event::Token { id, .. }) => {
                    first.get_or_insert_with(|| start.elapsed());
                    tokens.push(id);
                    each(id)?;
                }
                Some(Event::Prompt(_) | Event::Embedding(_)) => {}
                Some(Event::Finished { reason, .. }) => break reason,
                Some(Event::Overdue { limit }) => bail!("it was not begun within {limit:?}"),
                Some(Event::Failed(why)) => return Err(self.failed(why)),
                None => bail!("the engine ended before the generation did"),
            }
        };
        let first = first.unwrap_or_else(|| start.elapsed());
        let rest = start.elapsed().saturating_sub(first);
        Ok(Answer {
            prefill_tok_s: rate(prompt_len, first),
            decode_tok_s: rate(tokens.len().saturating_sub(1), rest),
            tokens,
            reason,
        })
    }
}

impl Running {
    /// Where the engine is gone with the request, another process may do better.
    fn failed(&self, why: String) -> anyhow::Error {
        match self.engine.failure() {
            Some(failure) => TryAgain(failure).into(),
            None => anyhow!("the engine could not go on: {why}"),
        }
    }
}

/// Things per second; 0 when there were none.
pub fn rate(count: usize, time: Duration) -> f64 {
    if count == 0 { 0.0 } else { count as f64 / time.as_secs_f64().max(1e-9) }
}

/// Token ids as users write them: `1,2,3`.
///
/// # Errors
/// The part that is not a whole number.
pub fn parse_tokens(text: &str) -> Result<Vec<u32>, String> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().map_err(|_| format!("{part:?} is not a token id; write them as 1,2,3")))
        .collect()
}

/// Whether the tokens exist, before anything is computed.
///
/// # Errors
/// The first that does not.
pub fn check_tokens(tokens: &[u32], vocab_size: usize) -> anyhow::Result<()> {
    if tokens.is_empty() {
        return Err(usage("there are no tokens; give at least one"));
    }
    match tokens.iter().position(|&id| id as usize >= vocab_size) {
        Some(at) => Err(usage(format!(
            "token id {} at position {at} is not below the vocabulary size {vocab_size}",
            tokens[at]
        ))),
        None => Ok(()),
    }
}
