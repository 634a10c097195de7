//! `hearth train`: a run as a recipe says.

use crate::interrupt::Interrupt;
use crate::machine;
use crate::open::Model;
use crate::probe;
use crate::recipe::Recipe;
use crate::resolve;
use crate::ui::{Progress, Report, Ui, bytes, table};
use hearth_data::{Dataset, Loader, Sequence};
use hearth_train::{Observer, Setup, StepReport, TrainConfig, Trainer};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Trains as a recipe says.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TrainArgs {
    /// Recipe file
    pub recipe: PathBuf,
    /// Override a recipe key, for example optim.lr=1e-5
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
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
    Done(Trained),
    /// It was only looked at.
    Planned(Planned),
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
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
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
}

/// Trains, or looks at what would be trained. SIGINT and SIGTERM finish the step, save and end the run well.
///
/// # Errors
/// A wrong recipe, a model or data that cannot be read, a loss that is not finite, a checkpoint that cannot be
/// written (earlier ones stay).
pub fn run(args: &TrainArgs, ui: &Ui) -> anyhow::Result<TrainReport> {
    let recipe = Recipe::load(&args.recipe, &args.set)?;
    let model = Model::open(Path::new(&recipe.model.path), ui)?;
    if args.dry_run {
        return Ok(TrainReport::Planned(planned(&recipe, &model, ui)?));
    }
    let interrupt = Interrupt::listen()?;
    let mut prepared = Prepared::new(&recipe, &model, args.resume, ui)?;
    let done = prepared.run(ui, &interrupt.flag())?;
    if done.stopped {
        ui.note(format!("stopped after step {} of {}; go on with --resume", done.steps, prepared.steps));
    }
    Ok(TrainReport::Done(done))
}

/// A trainer with its data, ready to run.
pub struct Prepared {
    /// The trainer.
    pub trainer: Trainer,
    /// Held-out sequences; may be empty.
    pub validation: Vec<Sequence>,
    steps: usize,
}

impl Prepared {
    /// Reads the data and builds the trainer; with `resume` it stands where the newest checkpoint left it.
    ///
    /// # Errors
    /// As [`run`].
    pub fn new(recipe: &Recipe, model: &Model, resume: bool, ui: &Ui) -> anyhow::Result<Self> {
        let data = load_data(recipe, model, ui)?;
        let loader = Loader::new(data.train, recipe.train.seed, recipe.train.global_batch)?;
        let config = resolve::training(recipe, loader.steps_per_epoch(), Some(probe::flops()))?;
        let setup = Setup {
            arch: hearth_model::architecture(&model.files.config)?,
            weights: &*model.files.tensors,
            loader,
            device: hearth_model::device::open(&recipe.model.device)
                .map_err(|e| crate::exit::usage(e.to_string()))?,
            comm: hearth_collective::single(),
            ledger: hearth_memory::Ledger::default(),
            activations: hearth_train::Activations::default(),
            companions: hearth_train::companions(&model.files)?,
        };
        let steps = config.steps;
        let trainer = build(setup, config, resume, ui)?;
        Ok(Self { trainer, validation: data.val, steps })
    }

    /// Trains to the end, or until `stop` is raised.
    ///
    /// # Errors
    /// As [`run`].
    pub fn run(&mut self, ui: &Ui, stop: &AtomicBool) -> anyhow::Result<Trained> {
        let mut watcher = Watcher { progress: ui.progress(self.steps as u64) };
        let summary = self.trainer.run(&self.validation, &mut watcher, stop)?;
        watcher.progress.finish();
        Ok(Trained {
            steps: summary.steps,
            loss: summary.loss,
            eval_loss: summary.eval_loss,
            tok_s: summary.tok_s,
            peak_rss_bytes: machine::peak_rss_bytes(),
            checkpoint: summary.checkpoint,
            stopped: summary.stopped,
        })
    }
}

fn build(setup: Setup<'_>, config: TrainConfig, resume: bool, ui: &Ui) -> anyhow::Result<Trainer> {
    Ok(if resume { Trainer::resume(setup, config, &mut Notices(ui))? } else { Trainer::new(setup, config)? })
}

fn load_data(recipe: &Recipe, model: &Model, ui: &Ui) -> anyhow::Result<Dataset> {
    resolve::method_takes_data(recipe)?;
    let config = resolve::dataset(recipe, model.files.config.vocab_size);
    let data = hearth_data::dataset::load(&config, model.tokenizer.as_ref(), model.template.as_ref())?;
    data.stats.warnings.iter().for_each(|warning| ui.note(warning));
    Ok(data)
}

fn planned(recipe: &Recipe, model: &Model, ui: &Ui) -> anyhow::Result<Planned> {
    let data = load_data(recipe, model, ui)?;
    let stats = data.stats.clone();
    let loader = Loader::new(data.train, recipe.train.seed, recipe.train.global_batch)?;
    let config = resolve::training(recipe, loader.steps_per_epoch(), None)?;
    config.validate()?;
    let specs = hearth_model::params(hearth_model::architecture(&model.files.config)?.as_ref());
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
    })
}

/// Passes on what resuming has to say.
struct Notices<'a>(&'a Ui);

impl Observer for Notices<'_> {
    fn notice(&mut self, sentence: &str) {
        self.0.note(sentence);
    }
}

/// Shows every step.
struct Watcher {
    progress: Progress,
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
        format!("{}\n{rows}", self.recipe)
    }
}
