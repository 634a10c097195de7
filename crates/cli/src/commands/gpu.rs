//! `hearth gpu`: whether the kernels are right on this machine's card, and how fast they are.

use crate::ui::{Report, Ui, table};
use anyhow::Context;
use hearth_cuda::nvrtc::Nvrtc;
use hearth_cuda::runtime::device::ordinal_of;
use hearth_cuda::runtime::{Device, Libraries};
use hearth_gpu::bench::{self, Against, Extent, Speed, Training};
use hearth_gpu::checks::{self, Outcome};
use hearth_memory::{Budget, Ledger, Size};
use serde::Serialize;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

/// What to do with a card.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum GpuCommand {
    /// Holds every kernel against the CPU's
    Check(CheckArgs),
    /// The same, then measures kernels, copies, decoding and training against the card's own copies
    Bench(BenchArgs),
}

/// Which card.
#[derive(Clone, Debug, clap::Args)]
pub struct CheckArgs {
    /// The card: cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: String,
}

/// Which card, how much of it, and where results go.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// The card: cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: String,
    /// Most memory that may be taken on the card [default: all that is free]
    #[arg(long, value_name = "SIZE")]
    pub budget: Option<String>,
    /// Folder for gpu.json and gpu.md
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Sizes that only show that it works: figures mean nothing
    #[arg(long)]
    pub tiny: bool,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct GpuReport {
    /// When, in this machine's time.
    pub date: String,
    /// The card's name.
    pub card: String,
    /// Compute capability.
    pub compute_capability: String,
    /// Memory.
    pub total_bytes: u64,
    /// The CUDA that the driver is made for.
    pub driver: String,
    /// Version of the run-time compiler.
    pub nvrtc: String,
    /// Whether sizes were too small for figures to mean anything.
    pub tiny: bool,
    /// Every kernel against the CPU's.
    pub checks: Vec<Outcome>,
    /// Speeds; none when a check failed.
    pub speeds: Vec<Speed>,
    /// Training steps; none when a check failed.
    pub training: Vec<Training>,
    /// A sentence for each measurement that the card is too small for.
    pub left_out: Vec<String>,
}

/// Checks, and if asked to measures.
///
/// # Errors
/// One sentence each for no driver, too old a one, no such card, no compiler, a card too small and a lost one.
pub fn run(command: &GpuCommand, ui: &Ui) -> anyhow::Result<GpuReport> {
    match command {
        GpuCommand::Check(args) => {
            let (_, report) = check(&args.device, Budget::UNLIMITED, false, ui)?;
            Ok(report)
        }
        GpuCommand::Bench(args) => measure(args, ui),
    }
}

fn measure(args: &BenchArgs, ui: &Ui) -> anyhow::Result<GpuReport> {
    let budget = args.budget.as_deref().map_or(Ok(Budget::UNLIMITED), str::parse)?;
    let (card, mut report) = check(&args.device, budget, args.tiny, ui)?;
    if report.ok() {
        let extent = if args.tiny { Extent::Tiny } else { Extent::Full };
        let measured = bench::run(&card, extent, |speed| ui.note(line(speed)))?;
        (report.speeds, report.training) = (measured.speeds, measured.training);
        report.left_out = measured.left_out;
    }
    if let Some(folder) = &args.out {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let json = serde_json::to_string_pretty(&report)?;
        for (name, text) in [("gpu.json", json), ("gpu.md", report.markdown())] {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(report)
}

fn check(device: &str, budget: Budget, tiny: bool, ui: &Ui) -> anyhow::Result<(Arc<Device>, GpuReport)> {
    let ordinal = ordinal_of(device).with_context(|| format!("`{device}` is no card: write cuda:0"))?;
    let libraries = Libraries::of_system();
    let card = Device::open_with(ordinal, &Ledger::new(budget), &libraries)?;
    let (major, minor) = Nvrtc::open()?.version()?;
    let driver = Device::driver_version(&libraries)?;
    let checks = checks::run(&card, |outcome| {
        let verdict = outcome.failure.as_deref().unwrap_or("ok");
        ui.note(format!("{}: {verdict} ({:.2} s)", outcome.claim, outcome.seconds));
    })?;
    let described = card.card();
    let report = GpuReport {
        date: chrono::Local::now().format("%Y-%m-%d").to_string(),
        card: described.name.clone(),
        compute_capability: format!("{}.{}", described.capability.0, described.capability.1),
        total_bytes: described.total_bytes,
        driver: format!("CUDA {}.{}", driver.0, driver.1),
        nvrtc: format!("{major}.{minor}"),
        tiny,
        checks,
        speeds: Vec::new(),
        training: Vec::new(),
        left_out: Vec::new(),
    };
    Ok((card, report))
}

/// A speed in words.
fn line(speed: &Speed) -> String {
    format!("{}: {:.1} GB/s, {}", speed.what, speed.bandwidth() / 1e9, share(speed))
}

fn share(speed: &Speed) -> String {
    let of = match speed.against {
        Against::CardCopy => "of the card's copies",
        Against::PinnedCopy => "of pinned copies",
    };
    format!("{:.0}% {of}", 100.0 * speed.share)
}

fn goal(speed: &Speed, tiny: bool) -> String {
    match speed.goal {
        None => String::new(),
        Some(goal) if tiny => format!("≥ {:.0}%", 100.0 * goal),
        Some(goal) => {
            let verdict = if speed.share >= goal { "reached" } else { "missed" };
            format!("≥ {:.0}%: {verdict}", 100.0 * goal)
        }
    }
}

/// A line of the table of training steps.
fn training_row(steps: &Training) -> String {
    let bytes = [steps.planned_bytes, steps.ledger_bytes, steps.driver_bytes, steps.host_bytes];
    let [planned, ledger, driver, host] = bytes.map(|bytes| Size(bytes).to_string());
    let Training { what, units_on_host, blocks_streamed, .. } = steps;
    let tok_s = steps.tok_s();
    format!(
        "| {what} | {tok_s:.0} | {planned} | {ledger} | {driver} | {host} | {units_on_host}, {blocks_streamed} |\n"
    )
}

impl GpuReport {
    fn failures(&self) -> usize {
        self.checks.iter().filter(|outcome| outcome.failure.is_some()).count()
    }

    fn conditions(&self) -> String {
        let Self { date, card, compute_capability, driver, nvrtc, .. } = self;
        let warning = if self.tiny { " Tiny sizes: the figures mean nothing." } else { "" };
        format!("{date}, {card} ({compute_capability}), driver for {driver}, NVRTC {nvrtc}.{warning}")
    }

    /// What goes into `docs/gpu.md`.
    fn markdown(&self) -> String {
        let mut text = format!("{}\n\n| check | result |\n|---|---|\n", self.conditions());
        for outcome in &self.checks {
            let verdict = outcome.failure.as_deref().unwrap_or("holds");
            text += &format!("| {} | {verdict} |\n", outcome.claim);
        }
        text += "\n| what | GB/s | share | goal |\n|---|---|---|---|\n";
        for speed in &self.speeds {
            let gb_s = speed.bandwidth() / 1e9;
            text +=
                &format!("| {} | {gb_s:.1} | {} | {} |\n", speed.what, share(speed), goal(speed, self.tiny));
        }
        text += "\n| training | tokens/s | planned | ledger | driver | host | on the host, streamed |\n";
        text += "|---|---|---|---|---|---|---|\n";
        for steps in &self.training {
            text += &training_row(steps);
        }
        for sentence in &self.left_out {
            text += &format!("\nLeft out: {sentence}.\n");
        }
        text
    }
}

impl Report for GpuReport {
    fn text(&self) -> String {
        let failures = self.failures();
        let verdict = match failures {
            0 => format!("all {} checks hold", self.checks.len()),
            _ => format!("{failures} of {} checks fail", self.checks.len()),
        };
        let mut rows = vec![("card", self.conditions()), ("checks", verdict)];
        let speeds: Vec<String> = self.speeds.iter().map(line).collect();
        rows.extend(speeds.into_iter().map(|speed| ("speed", speed)));
        let trained =
            |steps: &Training| ("training", format!("{}: {:.0} tokens/s", steps.what, steps.tok_s()));
        rows.extend(self.training.iter().map(trained));
        rows.extend(self.left_out.iter().map(|sentence| ("left out", sentence.clone())));
        table(rows)
    }

    fn ok(&self) -> bool {
        self.checks.len() == checks::CHECKS.len() && self.failures() == 0
    }
}
