//! `hearth train`: a run as a recipe says.

use crate::card::{self, CardJob, Placement};
use crate::exit::usage;
use crate::interrupt::Interrupt;
use crate::machine;
use crate::open::Model;
use crate::probe;
use crate::ranks::Start;
use crate::recipe::Recipe;
use crate::tiers::Tiers;
use crate::training::{self, Job, Material};
use crate::ui::{Progress, Report, Ui, bytes, table};
use hearth_collective::Ordered;
use hearth_data::Sequence;
use hearth_data::dataset::Stats;
use hearth_memory::{Budget, Ledger, Tier};
use hearth_train::{Observer, StepReport, Summary, TrainConfig, Trainer};
use hearth_weights::ModelConfig;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Trains as a recipe says.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TrainArgs {
    /// Recipe file
    pub recipe: PathBuf,
    /// Override a recipe key, for example optim.lr=1e-5
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Byte limits over those of the recipe's [memory]: device=512MiB,host=2GiB,nvme=20GiB
    #[arg(long, value_name = "SIZES")]
    pub memory: Option<String>,
    /// Go on from the newest complete checkpoint in checkpoint.dir
    #[arg(long)]
    pub resume: bool,
    /// Check everything, print the whole recipe and what it comes to, and train nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// What a run came to, or with `--dry-run` would work on.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum TrainReport {
    /// It ran.
    Done(Box<Trained>),
    /// It was only looked at.
    Planned(Box<Planned>),
}

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Trained {
    /// Steps taken in all, those before a resume included.
    pub steps: u64,
    /// Loss of the last step, before its update.
    pub loss: f64,
    /// Loss on the held-out data at the end, if there is any.
    pub eval_loss: Option<f64>,
    /// Tokens per second.
    pub tok_s: f64,
    /// Largest resident memory of rank 0's process.
    pub peak_rss_bytes: u64,
    /// Most that lay in each tier, as `hearth plan` has it: rank 0's ledger, host and disk for the ranks of this machine.
    /// Activations count where the device has a budget.
    pub tiers: Tiers,
    /// What was planned before the first step.
    pub planned_tiers: Tiers,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Whether a signal ended it early.
    pub stopped: bool,
}

/// What a run would work on.
#[derive(Clone, Debug, Serialize)]
pub struct Planned {
    /// Steps it would take.
    pub steps: usize,
    /// Parameters of the model.
    pub parameters: usize,
    /// Parameters that would be trained.
    pub trained_parameters: usize,
    /// Training examples.
    pub examples: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Those of them that carry loss.
    pub trained_tokens: usize,
    /// The whole recipe, defaults included, as TOML.
    pub recipe: String,
    /// What it would hold where, if it is on a card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<CardPlan>,
}

/// What a run on a card would hold.
#[derive(Clone, Debug, Serialize)]
pub struct CardPlan {
    /// Which of its units lie where.
    #[serde(flatten)]
    pub placement: Placement,
    /// Most that would lie in each tier.
    pub tiers: Tiers,
}

/// Trains, or looks at what would be trained: on as many threads as the recipe wants ranks, or as one rank of those
/// that a launcher started. SIGINT and SIGTERM finish the step, save and end the run well. Only rank 0 has a report.
///
/// # Errors
/// A wrong recipe, a model or data that cannot be read, a budget that does not hold the run, a loss that is not finite,
/// a checkpoint that cannot be written (earlier ones stay), ranks that differ or are lost.
pub fn run(args: &TrainArgs, ui: &Ui) -> anyhow::Result<Option<TrainReport>> {
    let mut start = Start::join(ui)?;
    let load = || recipe(&args.recipe, &args.set, args.memory.as_deref());
    let recipe = start.agree(load())?;
    if let Some(ordinal) = card::ordinal(&recipe) {
        return on_card(&mut start, &recipe, ordinal, args, ui).map(Some);
    }
    let (recipe, job) = job(&mut start, || Ok(recipe), Job::new, ui)?;
    if args.dry_run {
        let report = start.speaks().then(|| planned(&recipe, &job.config, &job.stats, job.model()));
        return Ok(report.transpose()?.map(|planned| TrainReport::Planned(Box::new(planned))));
    }
    let interrupt = Interrupt::listen()?;
    let steps = job.config.steps;
    let done = train(start, &recipe, job, args.resume, ui, &interrupt.flag())?;
    Ok(done.map(|done| finished(done, steps, ui)))
}

fn finished(done: Trained, steps: usize, ui: &Ui) -> TrainReport {
    if done.stopped {
        ui.note(format!("stopped after step {} of {steps}; go on with --resume", done.steps));
    }
    TrainReport::Done(Box::new(done))
}

/// The same on an NVIDIA card.
fn on_card(
    start: &mut Start,
    recipe: &Recipe,
    ordinal: usize,
    args: &TrainArgs,
    ui: &Ui,
) -> anyhow::Result<TrainReport> {
    let world_size = start.world_size(recipe.parallel.data)?;
    let job = start.agree(CardJob::open(recipe, ordinal, world_size, ui))?;
    let Material { config, stats, files, .. } = &job.material;
    if args.dry_run {
        let tiers = Tiers::of(&job.planned()?, 1);
        let planned = planned(recipe, config, stats, &files.config)?;
        let card = Some(CardPlan { placement: job.placement(), tiers });
        return Ok(TrainReport::Planned(Box::new(Planned { card, ..planned })));
    }
    let interrupt = Interrupt::listen()?;
    let steps = config.steps;
    Ok(finished(job.run(args.resume, ui, &interrupt.flag())?, steps, ui))
}

/// A recipe with what the command line puts over it: keys, and byte limits.
///
/// # Errors
/// A wrong recipe, limits that are no sizes.
pub fn recipe(path: &Path, set: &[String], memory: Option<&str>) -> anyhow::Result<Recipe> {
    let mut recipe = Recipe::load(path, set)?;
    if let Some(text) = memory {
        let over: Budget = text.parse().map_err(|e: hearth_memory::Error| usage(format!("--memory: {e}")))?;
        let m = &mut recipe.memory;
        for (tier, limit) in
            [(Tier::Device, &mut m.device), (Tier::Host, &mut m.host), (Tier::Nvme, &mut m.nvme)]
        {
            *limit = over.limit(tier).map(|bytes| bytes.to_string()).or(limit.take());
        }
    }
    Ok(recipe)
}

/// How a job comes of a recipe: [`Job::new`] or [`Job::open`].
pub type MakeJob = fn(&Recipe, Model, usize, usize, &Ui) -> anyhow::Result<Job>;

/// What all ranks are to do, if they agree on it.
///
/// # Errors
/// As [`run`].
pub fn job(
    start: &mut Start,
    recipe: impl FnOnce() -> anyhow::Result<Recipe>,
    make: MakeJob,
    ui: &Ui,
) -> anyhow::Result<(Recipe, Job)> {
    let recipe = start.agree(recipe())?;
    start.set_timeout(timeout(&recipe));
    let world_size = start.world_size(recipe.parallel.data)?;
    let here = start.spread(world_size)?.here;
    let open = || make(&recipe, Model::open(Path::new(&recipe.model.path), ui)?, world_size, here, ui);
    let job = start.agree(open())?;
    start.same("recipe", &job.config_sha256())?;
    let model = start.agree(job.model_sha256())?;
    start.same("model", &model)?;
    start.same("data", &job.data_sha256())?;
    Ok((recipe, job))
}

/// How long ranks wait for each other.
pub fn timeout(recipe: &Recipe) -> Duration {
    Duration::from_secs_f64(recipe.parallel.timeout_s)
}

fn train(
    mut start: Start,
    recipe: &Recipe,
    mut job: Job,
    resume: bool,
    ui: &Ui,
    stop: &AtomicBool,
) -> anyhow::Result<Option<Trained>> {
    // Measured by one rank, before any of them computes.
    let peak = start.speaks().then(probe::flops);
    let world_size = start.world_size(recipe.parallel.data)?;
    let machines = start.spread(world_size)?.machines;
    job.config.peak_flops = peak.map(|flops| flops * machines as f64);
    let world = start.open(world_size, timeout(recipe))?;
    world.run(move || {
        let job = job.clone();
        move |comm: Ordered| {
            // Of the ranks that are threads of this process only the first talks.
            let ui = if comm.rank() == 0 { ui.clone() } else { Ui::silent() };
            Prepared::of(job, comm, resume, &ui)?.run(&ui, stop)
        }
    })
}

/// A rank's trainer with its data, ready to run.
pub struct Prepared {
    /// The trainer.
    pub trainer: Trainer,
    /// Held-out sequences; may be empty.
    pub validation: Arc<[Sequence]>,
    config: TrainConfig,
    here: usize,
    planned_tiers: Tiers,
}

impl Prepared {
    /// A run of one rank. Reads the data and builds the trainer; with `resume` it stands where the newest checkpoint
    /// left it.
    ///
    /// # Errors
    /// As [`run`].
    pub fn new(recipe: &Recipe, model: Model, resume: bool, ui: &Ui) -> anyhow::Result<Self> {
        let mut job = Job::new(recipe, model, 1, 1, ui)?;
        job.config.peak_flops = Some(probe::flops());
        Self::of(job, hearth_collective::single(), resume, ui)
    }

    fn of(job: Job, comm: Ordered, resume: bool, ui: &Ui) -> anyhow::Result<Self> {
        let (validation, config, here) = (job.validation.clone(), job.config.clone(), job.here());
        let planned = Ledger::new(job.budget);
        job.plan(comm.world_size(), &job.largest_micro_batch(), &planned)?;
        let planned_tiers = Tiers::of(&planned, here);
        let mut notices = Notices(ui);
        let resume = resume.then_some(&mut notices as &mut dyn Observer);
        Ok(Self { trainer: job.trainer(comm, resume)?, validation, config, here, planned_tiers })
    }

    /// Trains to the end, or until `stop` is raised.
    ///
    /// # Errors
    /// As [`run`].
    pub fn run(&mut self, ui: &Ui, stop: &AtomicBool) -> anyhow::Result<Trained> {
        let mut watcher = watch(ui, self.config.steps);
        let summary = self.trainer.run(&self.validation, &mut watcher, stop);
        let summary = summary.map_err(|e| training::explain(e, &self.config, self.here))?;
        watcher.finish();
        let tiers = Tiers::of(self.trainer.ledger(), self.here);
        Ok(Trained::new(summary, tiers, self.planned_tiers.clone()))
    }
}

impl Trained {
    pub(crate) fn new(summary: Summary, tiers: Tiers, planned_tiers: Tiers) -> Self {
        Self {
            steps: summary.steps,
            loss: summary.loss,
            eval_loss: summary.eval_loss,
            tok_s: summary.tok_s,
            peak_rss_bytes: machine::peak_rss_bytes(),
            tiers,
            planned_tiers,
            checkpoint: summary.checkpoint,
            stopped: summary.stopped,
        }
    }
}

fn planned(
    recipe: &Recipe,
    config: &TrainConfig,
    stats: &Stats,
    model: &ModelConfig,
) -> anyhow::Result<Planned> {
    let specs = hearth_model::params(hearth_model::architecture(model)?.as_ref());
    let parameters = specs.iter().map(|spec| spec.len()).sum();
    let trained_parameters = match &config.adapter {
        None => parameters,
        Some(lora) => {
            let hit = |name: &str| {
                let module = name.trim_end_matches(".weight").rsplit('.').next().unwrap_or_default();
                lora.targets.iter().any(|target| target == module || target == "all-linear")
            };
            let adapted = specs.iter().filter(|spec| spec.linear && hit(&spec.name));
            adapted.map(|spec| lora.rank * spec.shape.iter().sum::<usize>()).sum()
        }
    };
    Ok(Planned {
        steps: config.steps,
        parameters,
        trained_parameters,
        examples: stats.train.examples,
        tokens: stats.train.tokens,
        trained_tokens: stats.train.trained_tokens,
        recipe: recipe.to_toml(),
        card: None,
    })
}

/// Passes on what resuming has to say.
pub(crate) struct Notices<'a>(pub(crate) &'a Ui);

impl Observer for Notices<'_> {
    fn notice(&mut self, sentence: &str) {
        self.0.note(sentence);
    }
}

/// Shows every step.
pub(crate) struct Watcher {
    progress: Progress,
}

pub(crate) fn watch(ui: &Ui, steps: usize) -> Watcher {
    Watcher { progress: ui.progress(steps as u64) }
}

impl Watcher {
    pub(crate) fn finish(self) {
        self.progress.finish();
    }
}

impl Observer for Watcher {
    fn step(&mut self, report: &StepReport) {
        let line = format!("loss {:.4}  lr {:.2e}  {:.0} tok/s", report.loss, report.lr, report.tok_s);
        self.progress.at(report.step, &line);
        if let Some(loss) = report.eval_loss {
            self.progress.note(&format!("step {}: held-out loss {loss:.4}", report.step));
        }
    }

    fn saved(&mut self, path: &Path) {
        self.progress.note(&format!("saved {}", path.display()));
    }

    fn notice(&mut self, sentence: &str) {
        self.progress.note(sentence);
    }
}

impl Report for TrainReport {
    fn text(&self) -> String {
        match self {
            TrainReport::Done(done) => done.text(),
            TrainReport::Planned(planned) => planned.text(),
        }
    }
}

impl Report for Trained {
    fn text(&self) -> String {
        let held_out = self.eval_loss.map(|loss| ("held-out loss", format!("{loss:.4}")));
        let saved = self.checkpoint.as_ref().map(|path| ("checkpoint", path.display().to_string()));
        let rows = [
            ("steps", self.steps.to_string()),
            ("loss", format!("{:.4}", self.loss)),
            ("speed", format!("{:.0} tok/s", self.tok_s)),
            ("peak memory", bytes(self.peak_rss_bytes)),
        ];
        table(rows.into_iter().chain(held_out).chain(saved))
    }
}

impl Report for Planned {
    fn text(&self) -> String {
        let rows = table([
            ("steps", self.steps.to_string()),
            ("parameters", self.parameters.to_string()),
            ("of these trained", self.trained_parameters.to_string()),
            ("examples", self.examples.to_string()),
            ("tokens", self.tokens.to_string()),
            ("of these trained", self.trained_tokens.to_string()),
        ]);
        let card = self.card.as_ref().map_or(String::new(), CardPlan::text);
        format!("{}\n{rows}{card}", self.recipe)
    }
}

impl Report for CardPlan {
    fn text(&self) -> String {
        let Placement { card, units, units_on_host, blocks_streamed } = &self.placement;
        table([
            ("card", card.clone()),
            ("on the card", bytes(self.tiers.device.peak_bytes)),
            ("on the host", bytes(self.tiers.host.peak_bytes)),
            ("units updated by the host", format!("{units_on_host} of {units}")),
            ("blocks streamed", blocks_streamed.to_string()),
        ])
    }
}
