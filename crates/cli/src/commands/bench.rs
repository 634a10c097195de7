//! `hearth bench`: speed against this machine's own peak, measured in the same run.

mod decode;
mod rates;
mod serve;

pub use decode::DecodeBench;
pub use rates::{AdamBench, CommBench, IoBench, RateReport};
pub use serve::{ServeBench, ServeReport};

use crate::exit::usage;
use crate::machine;
use crate::probe::{self, Peaks};
use crate::running::ModelArgs;
use crate::ui::{Report, Ui, bytes, table};
use hearth_data::{Loader, Sequence};
use hearth_engine::Activations;
use hearth_kernels::PackedMatrix;
use hearth_model::{Group, ParamSpec};
use hearth_train::optim::StateDtype;
use hearth_train::{Compute, LoraConfig, Recompute, Setup, TrainConfig, Trainer};
use hearth_weights::ModelFiles;
use serde::Serialize;
use std::time::Instant;

/// What is measured.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum BenchCommand {
    /// Training steps on random tokens
    Train(TrainBench),
    /// Reading a prompt
    Prefill(PrefillBench),
    /// Generating token after token
    Decode(DecodeBench),
    /// Reading and writing the disk that training state is offloaded to
    Io(IoBench),
    /// Exchanging buffers between ranks; under mpirun between its processes
    Comm(CommBench),
    /// Updating parameters in memory
    Adam(AdamBench),
    /// Load on any OpenAI-compatible server
    Serve(ServeBench),
}

/// Training steps on random tokens.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainBench {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// Measured steps, after one that is not
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub steps: usize,
    /// Sequences per step, in one micro-batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
    /// Tokens per sequence
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub seq: usize,
    /// Train an adapter of this rank instead of every weight
    #[arg(long, value_name = "RANK")]
    pub lora: Option<usize>,
    /// Type of activations and the weights they meet: f32, bf16 or f16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub compute: String,
    /// Type of the optimizer's moments: f32, bf16 or f8
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub state_dtype: String,
    /// Recompute each transformer block in the backward pass instead of keeping its activations
    #[arg(long)]
    pub recompute: bool,
}

/// Reading a prompt.
#[derive(Clone, Debug, clap::Args)]
pub struct PrefillBench {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens in the prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub tokens: usize,
    /// Measured runs, after one that is not
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum BenchReport {
    /// Of a model, in tokens.
    Model(ModelReport),
    /// Of the machine, in bytes.
    Rate(RateReport),
    /// Of a server, as its users feel it.
    Serve(Box<ServeReport>),
}

/// What was measured of a model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// `train`, `prefill` or `decode`.
    pub name: &'static str,
    /// Tokens per second: the median of the samples.
    pub tok_s: f64,
    /// Arithmetic per second at that speed, in GFLOP/s.
    pub gflop_s: f64,
    /// Weights read per second at that speed, in GB/s, where reading them is what takes the time.
    pub gb_s: Option<f64>,
    /// Share of the peak that bounds it: arithmetic, or for decode memory reads.
    pub of_peak: f64,
    /// Peaks of this machine, measured just before.
    pub peaks: Peaks,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// Tokens per second of each run.
    pub samples: Vec<f64>,
}

/// Measures. Of several ranks only rank 0 has a report.
///
/// # Errors
/// A model that cannot be loaded, sizes that do not fit it, a disk that cannot be written, ranks that are lost.
pub fn run(command: &BenchCommand, ui: &Ui) -> anyhow::Result<Option<BenchReport>> {
    let peaks = || {
        ui.note("measuring this machine's peaks …");
        probe::peaks()
    };
    Ok(match command {
        BenchCommand::Train(args) => Some(BenchReport::Model(train(args, peaks, ui)?)),
        BenchCommand::Prefill(args) => Some(BenchReport::Model(prefill(args, peaks, ui)?)),
        BenchCommand::Decode(args) => Some(BenchReport::Model(decode::decode(args, peaks, ui)?)),
        BenchCommand::Io(args) => Some(BenchReport::Rate(rates::io(args, ui)?)),
        BenchCommand::Comm(args) => rates::comm(args, ui)?.map(BenchReport::Rate),
        BenchCommand::Adam(args) => Some(BenchReport::Rate(rates::adam(args, ui)?)),
        BenchCommand::Serve(args) => Some(BenchReport::Serve(Box::new(serve::run(args, ui)?))),
    })
}

/// Figures here are shares of what this machine's processor and memory reach.
const NOT_A_CARD: &str = "this measures the CPU; hearth gpu bench measures cards";

/// `peaks` are measured when nothing is left to be refused.
fn prefill(args: &PrefillBench, peaks: impl FnOnce() -> Peaks, ui: &Ui) -> anyhow::Result<ModelReport> {
    at_least_one("--tokens", args.tokens)?;
    at_least_one("--repeat", args.repeat)?;
    args.model.on_cpu(NOT_A_CARD)?;
    let model = args.model.open(ui)?;
    let flops = forward_flops(&model.files, args.tokens)?;
    let tokens = random_tokens(args.tokens, model.files.config.vocab_size);
    let mut scorer = args.model.scorer(&model, Activations::Int8, args.tokens, ui)?;
    let peaks = peaks();
    let last = args.tokens - 1..args.tokens;
    let samples = repeated(args.repeat, || {
        let start = Instant::now();
        scorer.score(&tokens, last.clone(), |_, _| ())?;
        Ok(args.tokens as f64 / start.elapsed().as_secs_f64())
    })?;
    Ok(report("prefill", samples, flops / args.tokens as f64, peaks))
}

/// As [`prefill`].
fn train(args: &TrainBench, peaks: impl FnOnce() -> Peaks, ui: &Ui) -> anyhow::Result<ModelReport> {
    args.model.on_cpu(NOT_A_CARD)?;
    at_least_one("--batch", args.batch)?;
    at_least_one("--steps", args.steps)?;
    if args.seq < 2 {
        return Err(usage(format!("--seq is {}, it must be at least 2", args.seq)));
    }
    let config = TrainConfig {
        steps: args.steps + 1,
        global_batch: args.batch,
        micro_batch: args.batch,
        compute: compute(&args.compute)?,
        state_dtype: state_dtype(&args.state_dtype)?,
        recompute: if args.recompute { Recompute::Full } else { Recompute::None },
        adapter: args.lora.map(|rank| LoraConfig { rank, ..LoraConfig::default() }),
        ..TrainConfig::default()
    };
    config.validate().map_err(|e| usage(e.to_string()))?;
    let model = crate::open::Model::open_adapted(&args.model.model, args.model.merged_adapter()?, ui)?;
    let peaks = peaks();
    let sequences: Vec<Sequence> =
        (0..args.batch).map(|_| sequence(args.seq, model.files.config.vocab_size)).collect();
    let config = TrainConfig { peak_flops: Some(peaks.flops), ..config };
    let setup = Setup {
        arch: hearth_model::architecture(&model.files.config)?,
        weights: &*model.files.tensors,
        loader: Loader::new(sequences, 0, args.batch)?,
        validation: &[],
        device: hearth_model::device::open("cpu")?,
        comm: hearth_collective::single(),
        ledger: hearth_memory::Ledger::default(),
        activations: hearth_train::Activations::default(),
        companions: Vec::new(),
    };
    let mut trainer = Trainer::new(setup, config)?;
    let mut mfu = Vec::new();
    let samples = repeated(args.steps, || {
        let step = trainer.step()?;
        mfu.push(step.mfu.unwrap_or(0.0));
        Ok(step.tok_s)
    })?;
    let of_peak = median(&mfu[1..]);
    Ok(ModelReport { of_peak, gflop_s: of_peak * peaks.flops / 1e9, ..report("train", samples, 0.0, peaks) })
}

fn compute(text: &str) -> anyhow::Result<Compute> {
    match text {
        "f32" => Ok(Compute::F32),
        "bf16" => Ok(Compute::Bf16),
        "f16" => Ok(Compute::F16),
        _ => Err(usage(format!("--compute is {text:?}; it must be f32, bf16 or f16"))),
    }
}

fn state_dtype(text: &str) -> anyhow::Result<StateDtype> {
    match text {
        "f32" => Ok(StateDtype::F32),
        "bf16" => Ok(StateDtype::Bf16),
        "f8" => Ok(StateDtype::F8),
        _ => Err(usage(format!("--state-dtype is {text:?}; it must be f32, bf16 or f8"))),
    }
}

/// The samples of all runs but the first, which warms up.
fn repeated(runs: usize, mut measure: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<Vec<f64>> {
    at_least_one("the number of runs", runs)?;
    measure()?;
    (0..runs).map(|_| measure()).collect()
}

fn report(name: &'static str, samples: Vec<f64>, flops_per_token: f64, peaks: Peaks) -> ModelReport {
    let tok_s = median(&samples);
    let flops = flops_per_token * tok_s;
    ModelReport {
        name,
        tok_s,
        gflop_s: flops / 1e9,
        gb_s: None,
        of_peak: flops / peaks.flops,
        peaks,
        peak_rss_bytes: machine::peak_rss_bytes(),
        samples,
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn at_least_one(what: &str, n: usize) -> anyhow::Result<()> {
    if n == 0 { Err(usage(format!("{what} is 0, it must be at least 1"))) } else { Ok(()) }
}

/// Ids that a linear congruential generator spreads over the vocabulary: the same in every run.
fn random_tokens(count: usize, vocab_size: usize) -> Vec<u32> {
    let mut state = 1u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab_size as u64) as u32
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn sequence(len: usize, vocab_size: usize) -> Sequence {
    let ids = random_tokens(len, vocab_size);
    let mut labels: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    labels[0] = hearth_data::IGNORE;
    Sequence { ids, labels, documents: vec![len], ..Default::default() }
}

/// Matrices that every token is multiplied by: all linear layers and the head.
fn multiplied(files: &ModelFiles) -> anyhow::Result<Vec<ParamSpec>> {
    let mut specs = hearth_model::params(hearth_model::architecture(&files.config)?.as_ref());
    let tied = files.config.tie_word_embeddings;
    specs.retain(|spec| spec.shape.len() == 2 && (tied || spec.group != Group::Embedding));
    Ok(specs)
}

/// Arithmetic of reading `tokens` tokens when only the last one's logits are wanted.
fn forward_flops(files: &ModelFiles, tokens: usize) -> anyhow::Result<f64> {
    let c = &files.config;
    let head = 2.0 * (c.vocab_size * c.hidden_size) as f64;
    let linear: usize = multiplied(files)?.iter().filter(|spec| spec.linear).map(ParamSpec::len).sum();
    let pairs = (tokens * (tokens + 1) / 2 * c.num_layers) as f64;
    Ok(2.0 * linear as f64 * tokens as f64 + 4.0 * (c.num_heads * c.head_dim) as f64 * pairs + head)
}

/// Weights read for one token, as they are held.
fn bytes_per_token(files: &ModelFiles) -> anyhow::Result<usize> {
    let mut total = 0;
    for spec in multiplied(files)? {
        let format = files.expect(&spec.name, &spec.shape)?.format.name();
        total += PackedMatrix::bytes_for(spec.shape[0], spec.shape[1], format);
    }
    Ok(total)
}

impl Report for BenchReport {
    fn text(&self) -> String {
        match self {
            BenchReport::Model(report) => report.text(),
            BenchReport::Rate(report) => report.text(),
            BenchReport::Serve(report) => report.text(),
        }
    }

    fn ok(&self) -> bool {
        match self {
            BenchReport::Serve(report) => report.ok(),
            BenchReport::Model(_) | BenchReport::Rate(_) => true,
        }
    }
}

impl Report for ModelReport {
    fn text(&self) -> String {
        let bound = if self.gb_s.is_some() { "memory reads" } else { "arithmetic" };
        let mut rows = vec![
            ("speed", format!("{:.1} tok/s", self.tok_s)),
            ("arithmetic", format!("{:.2} GFLOP/s of {:.1}", self.gflop_s, self.peaks.flops / 1e9)),
        ];
        rows.extend(
            self.gb_s.map(|gb_s| ("weights read", format!("{gb_s:.2} GB/s of {:.1}", self.peaks.read_gb_s))),
        );
        rows.extend([
            ("share of peak", format!("{:.0} % ({bound})", self.of_peak * 100.0)),
            ("peak memory", bytes(self.peak_rss_bytes)),
            ("samples", self.samples.iter().map(|s| format!("{s:.1}")).collect::<Vec<_>>().join("  ")),
        ]);
        format!("{}\n{}", self.name, table(rows))
    }
}
