//! `hearth plan --serve`: where a served model's weights will lie, and how fast it can be.
//!
//! How fast is reckoned by [`hearth_engine::forecast`], with the speeds measured on this machine. With a draft model's `k`
//! guesses there come `k` steps of that model, and the step holds `k + 1` tokens of each sequence, of which from one to all
//! are kept.

use super::{Measured, PlanArgs};
use crate::exit::usage;
use crate::open::Model;
use crate::running::ModelArgs;
use crate::tiers::Tiers;
use crate::ui::{Report, Ui, bytes};
use crate::{machine, probe};
use anyhow::Context;
use hearth_engine::footprint::{self, Wishes};
use hearth_engine::forecast::{Load, Speeds, Step};
use hearth_engine::{Activations, AdapterLoader, Arithmetic, EngineConfig, WeightPlan};
use hearth_kernels::paged::KV_BLOCK;
use hearth_memory::{Budget, Charge, Kind, Ledger, Size, Tier};
use hearth_model::architecture;
use hearth_weights::ModelFiles;
use serde::Serialize;
use std::path::Path;

/// Batches that are forecast.
const BATCHES: [u64; 3] = [1, 8, 32];
/// Tokens of each sequence that are in the cache.
pub const CONTEXT: usize = 512;

/// What serving will be.
#[derive(Clone, Debug, Serialize)]
pub struct ServeReport {
    /// What lies in each tier.
    pub tiers: Tiers,
    /// Whether there are weights that the device does not hold.
    pub streams: bool,
    /// Transformer blocks in each tier.
    pub blocks: BlockCounts,
    /// Bytes of weights that the device does not hold, used in every step.
    pub streamed_bytes: u64,
    /// Of these, from disk.
    pub nvme_bytes: u64,
    /// Blocks read ahead from disk.
    pub look_ahead: usize,
    /// Whether the embedding stays on disk, and a step reads its tokens' rows.
    pub embedding_on_disk: bool,
    /// Tokens that the KV cache holds.
    pub kv_tokens: usize,
    /// The largest batch that it holds with 512 tokens behind each sequence, within the batch's limit: what clients together
    /// get where there are enough of them.
    pub crowd: Forecast,
    /// Tokens besides whose keys and values host memory keeps when the device has no room for them.
    pub kv_host_tokens: usize,
    /// Tokens per second of one sequence.
    pub tok_s: f64,
    /// What one sequence's step waits for.
    pub bound_by: &'static str,
    /// Batch by batch, each sequence with 512 tokens behind it.
    pub batches: Vec<Forecast>,
    /// What was reckoned with, in bytes or operations per second.
    pub speeds: MachineSpeeds,
}

/// Transformer blocks by tier.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BlockCounts {
    /// Resident.
    pub device: usize,
    /// In host memory, computed with where they lie.
    pub host: usize,
    /// Streamed from disk.
    pub nvme: usize,
}

/// One batch.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Forecast {
    /// Sequences.
    pub batch: u64,
    /// Seconds per step.
    pub step_s: f64,
    /// Tokens per second of all of them.
    pub tok_s: f64,
    /// The resource that takes longest.
    pub bound_by: &'static str,
    /// The same with a draft model's guesses, if there is one.
    pub guessing: Option<Guessing>,
}

/// One batch with guesses.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Guessing {
    /// Guesses at a time.
    pub draft_tokens: u64,
    /// Seconds per step that the draft model takes.
    pub draft_s: f64,
    /// Seconds per step, those included.
    pub step_s: f64,
    /// Tokens per second when no guess is right, and when all are.
    pub tok_s: [f64; 2],
    /// How many tokens per step must come for guessing to gain anything.
    pub pays_from: f64,
}

impl From<Step> for Forecast {
    fn from(step: Step) -> Self {
        let Step { batch, seconds, bound_by } = step;
        Self { batch, step_s: seconds, tok_s: step.tok_s(), bound_by: bound_by.name(), guessing: None }
    }
}

/// This machine's.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MachineSpeeds {
    /// Reading the disk; nothing where it is not read.
    pub nvme: Option<f64>,
    /// Reading the device's memory.
    pub memory: f64,
    /// Floating-point operations.
    pub flops: f64,
}

/// Plans; loads no weights.
///
/// # Errors
/// A model that cannot be read, a budget that is too small.
pub fn run(path: &Path, args: &PlanArgs, ui: &Ui) -> anyhow::Result<ServeReport> {
    let budget: Budget = match &args.memory {
        None => Budget::UNLIMITED,
        Some(text) => text.parse().map_err(|e: hearth_memory::Error| usage(format!("--memory: {e}")))?,
    };
    let named = ModelArgs { adapter: args.adapter.clone(), ..ModelArgs::at(path) };
    let model = Model::open_adapted(path, named.merged_adapter()?, ui)?;
    let ledger = Ledger::new(budget);
    let arithmetic = Arithmetic { activations: Activations::Int8, kv_type: args.kv_dtype };
    let kv_host_bytes = args.kv_host.map_or(0, Size::bytes);
    let evicted = ledger.charge(Tier::Host, Kind::KvCache, kv_host_bytes).context("--kv-host")?;
    let draft = args.draft.as_deref().map(|path| Draft::plan(path, arithmetic, &ledger, ui)).transpose()?;
    let default = EngineConfig::default();
    let serving = EngineConfig { max_seqs: args.max_seqs.unwrap_or(default.max_seqs), ..default };
    if serving.max_seqs == 0 {
        return Err(usage("--max-seqs is 0, it must be at least 1"));
    }
    let aim = args.placement.aim(&model.files, arithmetic, &serving, &ledger, ui)?;
    let plan = WeightPlan::aimed(&model.files, arithmetic, aim, &ledger)?;
    let charges = charge(&plan, &ledger)?;
    let draft = draft.map(Draft::with_the_other_placed);
    drop(evicted);
    ledger.reset_peaks();
    let adapters = Adapters::plan(&named, &model.files, &ledger)?;
    let guesses = draft.as_ref().map(|d| (&d.files.config, d.plan.kv_type));
    let wishes = Wishes {
        max_seqs: serving.max_seqs,
        max_batch_tokens: serving.max_batch_tokens,
        context_limit: None,
        kv_bytes: None,
        kv_host_bytes,
        kv_type: plan.kv_type,
        adapter_rank: adapters.rank,
        adapter_bytes: 0,
        draft: guesses,
    };
    let config = &model.files.config;
    let grant = footprint::grant(config, wishes, &ledger)?;
    let caches = [Some((config, plan.kv_type)), guesses].into_iter().flatten();
    let block: u64 = caches.map(|(config, kv_type)| footprint::kv_block_bytes(config, kv_type)).sum();
    let working = grant.working_bytes + grant.draft_working_bytes;
    let _serving = [
        ledger.charge(Tier::Device, Kind::KvCache, grant.blocks as u64 * block)?,
        ledger.charge(Tier::Device, Kind::Activations, working)?,
        ledger.charge(Tier::Host, Kind::KvCache, grant.host_blocks as u64 * block)?,
    ];
    let placed = Placed::new(&plan, &model.files)?;
    let guessing = draft.as_ref().map(|d| Placed::new(&d.plan, &d.files)).transpose()?;
    let from_disk = [Some(&placed), guessing.as_ref()].into_iter().flatten().find(|placed| placed.nvme > 0);
    let files = from_disk.map_or(&model.files, |placed| placed.files);
    let speeds = speeds(from_disk.is_some(), files, args.measure, ui)?;
    let forecast = |batch| match &guessing {
        None => placed.forecast(batch, speeds),
        Some(draft) => placed.forecast_with(draft, args.draft_tokens, batch, speeds),
    };
    let kv_tokens = grant.blocks * KV_BLOCK;
    let batches: Vec<Forecast> = BATCHES.into_iter().map(forecast).collect();
    let count = |tier| plan.placement.count(tier);
    let report = ServeReport {
        tiers: Tiers::of(&ledger, 1),
        streams: !plan.placement.is_resident(),
        blocks: BlockCounts { device: count(Tier::Device), host: count(Tier::Host), nvme: count(Tier::Nvme) },
        streamed_bytes: streamed(&plan),
        nvme_bytes: placed.nvme,
        look_ahead: plan.look_ahead,
        embedding_on_disk: plan.table.is_some(),
        kv_tokens,
        crowd: forecast((kv_tokens / CONTEXT).clamp(1, serving.max_seqs) as u64),
        kv_host_tokens: grant.host_blocks * KV_BLOCK,
        tok_s: batches[0].tok_s,
        bound_by: batches[0].bound_by,
        batches,
        speeds: MachineSpeeds { nvme: speeds.nvme, memory: speeds.memory, flops: speeds.flops },
    };
    drop((charges, adapters, draft));
    Ok(report)
}

/// A model that guesses. Its weights are placed before those of the model it guesses for, which leave room for its cache.
struct Draft {
    files: ModelFiles,
    plan: WeightPlan,
    _charges: Vec<Charge>,
    _room: Option<Charge>,
}

impl Draft {
    fn plan(path: &Path, arithmetic: Arithmetic, ledger: &Ledger, ui: &Ui) -> anyhow::Result<Self> {
        let files = Model::open_adapted(path, None, ui)?.files;
        let plan = WeightPlan::new(&files, arithmetic, ledger)?;
        let _charges = charge(&plan, ledger)?;
        let room = footprint::draft_room(&files.config, plan.kv_type);
        let _room = Some(ledger.charge(Tier::Device, Kind::KvCache, room)?);
        Ok(Self { files, plan, _charges, _room })
    }

    fn with_the_other_placed(self) -> Self {
        Self { _room: None, ..self }
    }
}

/// Adapters laid over the model.
struct Adapters {
    /// Their largest rank.
    rank: usize,
    _charges: Vec<Charge>,
}

impl Adapters {
    fn plan(named: &ModelArgs, files: &ModelFiles, ledger: &Ledger) -> anyhow::Result<Self> {
        let loader = AdapterLoader::new(architecture(&files.config)?.as_ref(), ledger);
        let mut all = Self { rank: 0, _charges: Vec::new() };
        for (name, path) in named.live_adapters() {
            let size = loader.size(path)?;
            let charge = ledger.charge(Tier::Device, Kind::Weights, size.bytes);
            all._charges.push(charge.with_context(|| format!("--adapter {name}={}", path.display()))?);
            all.rank = all.rank.max(size.rank);
        }
        Ok(all)
    }
}

/// What loading will charge.
fn charge(plan: &WeightPlan, ledger: &Ledger) -> anyhow::Result<Vec<Charge>> {
    let p = &plan.placement;
    let blocks = |tier| p.bytes(tier, &plan.blocks);
    let table = plan.table.map_or((0, 0), |table| (table.stored, table.staging));
    [
        (Tier::Device, Kind::Weights, plan.fixed + blocks(Tier::Device)),
        (Tier::Host, Kind::Weights, blocks(Tier::Host)),
        (Tier::Host, Kind::Staging, p.ring_bytes + table.1),
        (Tier::Nvme, Kind::Weights, blocks(Tier::Nvme) + table.0),
    ]
    .into_iter()
    .map(|(tier, kind, bytes)| Ok(ledger.charge(tier, kind, bytes)?))
    .collect()
}

fn streamed(plan: &WeightPlan) -> u64 {
    [Tier::Host, Tier::Nvme].into_iter().map(|tier| plan.placement.bytes(tier, &plan.blocks)).sum()
}

/// What this machine does in a second; of the disk what is kept of an earlier measurement, unless `again`.
pub(crate) fn speeds(reads_disk: bool, files: &ModelFiles, again: bool, ui: &Ui) -> anyhow::Result<Speeds> {
    let peaks = probe::peaks();
    let disk = match reads_disk {
        true => Measured::of(Some(&files.path), 1, again, ui)?.disk.map(|d| d.read),
        false => None,
    };
    Ok(Speeds { nvme: disk, memory: peaks.read_gb_s * 1e9, flops: peaks.flops })
}

/// A model whose weights have their places.
struct Placed<'a> {
    files: &'a ModelFiles,
    load: Load,
    /// Bytes on disk.
    nvme: u64,
}

impl<'a> Placed<'a> {
    fn new(plan: &WeightPlan, files: &'a ModelFiles) -> anyhow::Result<Self> {
        let weights = plan.fixed + plan.blocks.iter().map(|b| b.packed).sum::<u64>();
        let load = footprint::load(&files.config, plan.kv_type, weights, CONTEXT)?;
        Ok(Self { files, load, nvme: plan.placement.bytes(Tier::Nvme, &plan.blocks) })
    }

    fn forecast(&self, batch: u64, speeds: Speeds) -> Forecast {
        Forecast::from(self.load.step(batch, self.nvme, speeds))
    }

    /// The same with `count` guesses of a draft model at a time.
    fn forecast_with(&self, draft: &Placed, count: u64, batch: u64, speeds: Speeds) -> Forecast {
        let alone = self.forecast(batch, speeds);
        let draft_s = count as f64 * draft.load.step(batch, draft.nvme, speeds).seconds;
        let step_s = draft_s + self.load.step_of(batch, batch * (count + 1), self.nvme, speeds).seconds;
        let tok_s = [1, count + 1].map(|kept| (batch * kept) as f64 / step_s.max(1e-12));
        let pays_from = step_s / alone.step_s.max(1e-12);
        let guessing = Guessing { draft_tokens: count, draft_s, step_s, tok_s, pays_from };
        Forecast { guessing: Some(guessing), ..alone }
    }
}

impl Report for ServeReport {
    fn text(&self) -> String {
        let BlockCounts { device, host, nvme } = self.blocks;
        let mut lines = vec![match self.streams {
            false => "all weights fit the device: nothing is streamed".to_owned(),
            true => format!(
                "blocks: {device} on the device, {host} in host memory, {nvme} on disk; {} used per step, {} of it read from \
                 disk, {} blocks ahead{}",
                bytes(self.streamed_bytes),
                bytes(self.nvme_bytes),
                self.look_ahead,
                if self.embedding_on_disk { "; the embedding on disk, read by rows" } else { "" }
            ),
        }];
        for tier in Tier::ALL {
            let used = self.tiers.tier(tier);
            let parts: Vec<String> =
                used.by_kind.iter().map(|(kind, size)| format!("{kind} {}", bytes(*size))).collect();
            lines.push(format!("{:8}{:>12}  {}", tier.name(), bytes(used.peak_bytes), parts.join(", ")));
        }
        lines.push(match self.kv_host_tokens {
            0 => format!("KV cache for {} tokens", self.kv_tokens),
            host => format!("KV cache for {} tokens, and for {host} more on the host", self.kv_tokens),
        });
        let line = |f: &Forecast| {
            let guessing = f.guessing.map_or(String::new(), |g| {
                let [none, all] = g.tok_s;
                format!(
                    "; with {} guesses {none:.2} if none is right, {all:.2} if all are, a gain from {:.1} tokens a step",
                    g.draft_tokens, g.pays_from
                )
            });
            format!("batch {:2}: {:10.2} tok/s, bound by {}{guessing}", f.batch, f.tok_s, f.bound_by)
        };
        lines.extend(self.batches.iter().map(line));
        let tokens = format!("what the cache holds at once with {CONTEXT} tokens behind each");
        lines.push(format!("{} ({tokens})", line(&self.crowd)));
        lines.push(format!("reckoned for {} threads with full overlap", machine::threads()));
        lines.join("\n")
    }
}
