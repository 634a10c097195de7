//! `hearth verify`: a recipe's own layout against one plain rank, bit for bit.

use crate::commands::train;
use crate::exit::usage;
use crate::ranks::Start;
use crate::recipe::Recipe;
use crate::training::{self, Job};
use crate::ui::{Report, Ui, table};
use anyhow::Context;
use hearth_collective::Ordered;
use hearth_memory::Budget;
use hearth_train::{Offload, TrainConfig};
use serde::Serialize;
use std::path::PathBuf;

/// Compares a recipe's ranks, stages and tiers with one plain rank.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct VerifyArgs {
    /// Recipe file
    pub recipe: PathBuf,
    /// Steps to compare
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub steps: usize,
    /// Override a recipe key, for example parallel.zero=3
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Whether two runs came to the same.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// Whether losses, gradient norms and states are the same bits.
    pub equal: bool,
    /// Where they differ first.
    pub first_difference: Option<Difference>,
    /// Steps that were compared.
    pub steps: usize,
    /// States that were compared by hash.
    pub states: usize,
    /// What was compared with one plain rank.
    pub layout: Layout,
}

/// How a recipe divides its run.
#[derive(Clone, Debug, Serialize)]
pub struct Layout {
    /// Ranks.
    pub data: usize,
    /// ZeRO stage.
    pub zero: u8,
    /// Where the training state lies.
    pub offload: Offload,
}

/// Where two runs differ first: at a step, or in a state after the last step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The step, from 1; nothing for a state.
    pub step: Option<usize>,
    /// `loss`, `grad_norm`, or the state's name: `weight.<parameter>`, `m.<parameter>` …
    pub quantity: String,
    /// The recipe's value, or the state's sha256.
    pub recipe: String,
    /// The plain rank's.
    pub plain: String,
}

/// Everything that must not differ between two layouts of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Loss and gradient norm of each step.
    pub steps: Vec<(f64, f64)>,
    /// Every master and optimizer state after the last step: name and sha256.
    pub states: Vec<(String, String)>,
}

/// Runs the recipe as it says, then on one rank with everything on the device and without limits, and compares. Writes
/// no checkpoint. Only rank 0 has a report.
///
/// # Errors
/// As [`train::run`].
pub fn run(args: &VerifyArgs, ui: &Ui) -> anyhow::Result<Option<VerifyReport>> {
    if args.steps == 0 {
        return Err(usage("--steps is 0, there must be at least one to compare"));
    }
    let mut start = Start::join(ui)?;
    let load = || Ok(Recipe::load(&args.recipe, &args.set)?);
    let (recipe, mut job) = train::job(&mut start, load, Job::new, ui)?;
    job.config.checkpoint = None;
    job.config.steps = job.config.steps.max(args.steps);
    let layout = Layout {
        data: start.world_size(recipe.parallel.data)?,
        zero: job.config.zero,
        offload: job.config.offload.clone(),
    };
    ui.note(format!("{} as the recipe says …", number_of(args.steps)));
    let Some(own) = trace(start, &recipe, job.clone(), args.steps)? else { return Ok(None) };
    ui.note(format!("{} on one plain rank …", number_of(args.steps)));
    let plain = plain_trace(job, args.steps)?;
    let first_difference = compare(&own, &plain);
    Ok(Some(VerifyReport {
        equal: first_difference.is_none(),
        first_difference,
        steps: args.steps,
        states: plain.states.len(),
        layout,
    }))
}

/// What the first `steps` steps of a job come to in its own layout, where rank 0 lives.
///
/// # Errors
/// As [`train::run`].
pub fn trace(mut start: Start, recipe: &Recipe, job: Job, steps: usize) -> anyhow::Result<Option<Trace>> {
    let world_size = start.world_size(recipe.parallel.data)?;
    let world = start.open(world_size, train::timeout(recipe))?;
    world.run(move || {
        let job = job.clone();
        move |comm: Ordered| take_steps(job, comm, steps)
    })
}

/// What the same steps come to on one rank that holds everything on the device.
///
/// # Errors
/// As [`train::run`].
pub fn plain_trace(mut job: Job, steps: usize) -> anyhow::Result<Trace> {
    job.budget = Budget::UNLIMITED;
    job.config = TrainConfig { zero: 0, offload: Offload::default(), ..job.config };
    take_steps(job, hearth_collective::single(), steps).context("on one plain rank")
}

fn take_steps(job: Job, comm: Ordered, steps: usize) -> anyhow::Result<Trace> {
    let (config, here) = (job.config.clone(), job.here());
    let mut trainer = job.trainer(comm, None)?;
    let explain = |e| training::explain(e, &config, here);
    let mut trace = Trace { steps: Vec::new(), states: Vec::new() };
    for _ in 0..steps {
        let report = trainer.step().map_err(explain)?;
        trace.steps.push((report.loss, report.grad_norm));
    }
    trace.states = trainer.fingerprint().map_err(explain)?;
    Ok(trace)
}

/// Where two runs differ first.
pub fn compare(recipe: &Trace, plain: &Trace) -> Option<Difference> {
    for (i, (ours, theirs)) in recipe.steps.iter().zip(&plain.steps).enumerate() {
        for (quantity, ours, theirs) in [("loss", ours.0, theirs.0), ("grad_norm", ours.1, theirs.1)] {
            if ours.to_bits() != theirs.to_bits() {
                let (recipe, plain) = (ours.to_string(), theirs.to_string());
                return Some(Difference { step: Some(i + 1), quantity: quantity.into(), recipe, plain });
            }
        }
    }
    let none = || "none".to_owned();
    let state = |states: &[(String, String)], i: usize| states.get(i).cloned().unwrap_or((none(), none()));
    (0..recipe.states.len().max(plain.states.len())).find_map(|i| {
        let (ours, theirs) = (state(&recipe.states, i), state(&plain.states, i));
        (ours != theirs).then_some(Difference {
            step: None,
            quantity: theirs.0,
            recipe: ours.1,
            plain: theirs.1,
        })
    })
}

fn number_of(steps: usize) -> String {
    if steps == 1 { "1 step".into() } else { format!("{steps} steps") }
}

impl Report for VerifyReport {
    fn text(&self) -> String {
        let o = &self.layout.offload;
        let tiers = format!("params {:?}, grads {:?}, optim {:?}", o.params, o.grads, o.optim).to_lowercase();
        let ranks =
            if self.layout.data == 1 { "1 rank".into() } else { format!("{} ranks", self.layout.data) };
        let result = match &self.first_difference {
            None => "the same bits as one plain rank".to_owned(),
            Some(d) => {
                let place = d.step.map_or("after the last step".into(), |step| format!("at step {step}"));
                format!("differs {place}: {} is {}, on one plain rank {}", d.quantity, d.recipe, d.plain)
            }
        };
        table([
            ("layout", format!("{ranks}, stage {}, {tiers}", self.layout.zero)),
            (
                "compared",
                format!("loss and gradient norm of {}, {} states", number_of(self.steps), self.states),
            ),
            ("result", result),
        ])
    }

    fn ok(&self) -> bool {
        self.equal
    }
}
