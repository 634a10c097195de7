//! The plan as text, at most 80 columns wide.

use super::{PlanReport, Search};
use crate::tiers::{TierUse, word};
use crate::ui::bytes;
use hearth_memory::{Kind, Tier};
use hearth_train::plan::StepTime;
use hearth_train::{Place, Recompute, TrainConfig};

/// Columns of a bar.
const BAR: usize = 44;
/// How a bar shows each kind.
const GLYPHS: [(Kind, char); 5] = [
    (Kind::Weights, '█'),
    (Kind::Gradients, '▓'),
    (Kind::Optimizer, '▒'),
    (Kind::Activations, '░'),
    (Kind::Staging, '·'),
];

/// A configuration in a line.
pub fn layout(config: &TrainConfig) -> String {
    let o = &config.offload;
    let place = |place: Place| place.name();
    let recompute = if config.recompute == Recompute::Full { ", recomputed" } else { "" };
    let ratio = if o.ratio < 1.0 { format!(" ({:.0} %)", o.ratio * 100.0) } else { String::new() };
    format!(
        "stage {}, params {}, grads {}, optim {}{ratio}, micro-batch {}{recompute}",
        config.zero,
        place(o.params),
        place(o.grads),
        place(o.optim),
        config.micro_batch
    )
}

/// All of it.
pub fn text(report: &PlanReport) -> String {
    let ranks = if report.ranks == 1 { "1 rank".to_owned() } else { format!("{} ranks", report.ranks) };
    let mut text = format!("{ranks}, {}\n\n", report.layout);
    text += &tiers(report);
    text.push('\n');
    text += &bars(report);
    text.push('\n');
    text += &phases(report);
    text.push('\n');
    text += &time(report);
    if let Some(why) = &report.why {
        text += &format!("\nDoes not fit. {why}\n");
    }
    if let Some(search) = &report.search {
        text += &found(search);
    }
    text
}

fn row(name: &str, cells: [String; 3]) -> String {
    let line = format!("{name:<14}{:>20}{:>20}{:>20}", cells[0], cells[1], cells[2]);
    format!("{}\n", line.trim_end())
}

fn some(n: u64) -> String {
    if n == 0 { "-".into() } else { bytes(n) }
}

fn tiers(report: &PlanReport) -> String {
    let of = |cell: &dyn Fn(&TierUse) -> String| Tier::ALL.map(|tier| cell(report.tiers.tier(tier)));
    let mut text = row("", Tier::ALL.map(|tier| tier.name().into()));
    for (kind, _) in GLYPHS {
        text += &row(word(kind), of(&|tier| some(tier.by_kind.get(word(kind)).copied().unwrap_or(0))));
    }
    text += &row("peak", of(&|tier| some(tier.peak_bytes)));
    text += &row("budget", of(&|tier| tier.budget_bytes.map_or("none".into(), bytes)));
    if report.ranks_here > 1 {
        text += &format!("device: of each rank; host and nvme: of {} ranks together\n", report.ranks_here);
    }
    text + &format!("the whole process: {}\n", bytes(report.process_peak_bytes))
}

fn bars(report: &PlanReport) -> String {
    let largest = Tier::ALL.map(|tier| report.tiers.tier(tier).peak_bytes).into_iter().max().unwrap_or(0);
    let mut text = String::new();
    for tier in Tier::ALL {
        let held = report.tiers.tier(tier);
        let full = held.budget_bytes.unwrap_or(largest).max(held.peak_bytes).max(1);
        let share = match held.budget_bytes {
            Some(budget) if held.peak_bytes > budget => "  too small".to_owned(),
            Some(budget) => {
                format!("  {:.0} % of budget", 100.0 * held.peak_bytes as f64 / budget.max(1) as f64)
            }
            None => String::new(),
        };
        text += format!("{:<8}|{}|{:>11}{share}", tier.name(), bar(held, full), bytes(held.peak_bytes))
            .trim_end();
        text.push('\n');
    }
    let legend: Vec<String> = GLYPHS.iter().map(|(kind, glyph)| format!("{glyph} {}", word(*kind))).collect();
    text + &format!("         {}\n", legend.join("  "))
}

/// What a tier holds, by kind, of `full` bytes.
fn bar(held: &TierUse, full: u64) -> String {
    let column = |bytes: u64| (bytes as f64 / full as f64 * BAR as f64).round() as usize;
    let (mut bar, mut sum) = (String::new(), 0);
    for (kind, glyph) in GLYPHS {
        sum += held.by_kind.get(word(kind)).copied().unwrap_or(0);
        let missing = column(sum).saturating_sub(bar.chars().count());
        bar.extend(std::iter::repeat_n(glyph, missing));
    }
    format!("{bar:<BAR$}")
}

fn phases(report: &PlanReport) -> String {
    let mut text = row("peak in phase", Tier::ALL.map(|tier| tier.name().into()));
    for phase in &report.by_phase {
        text += &row(&format!("  {}", phase.phase), [phase.device, phase.host, phase.nvme].map(some));
    }
    text
}

/// Seconds for people.
pub fn seconds(s: f64) -> String {
    match s {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s => format!("{:.1} ms", s * 1e3),
    }
}

fn time(report: &PlanReport) -> String {
    let StepTime { compute_s, disk_s, exchange_s, update_s, step_s, bound_by } = report.time;
    let speeds = &report.speeds;
    let mut parts = vec![format!("compute {}", seconds(compute_s))];
    for (name, s) in [("disk", disk_s), ("exchange", exchange_s)] {
        parts.extend((s > 0.0).then(|| format!("{name} {}", seconds(s))));
    }
    let mut used =
        vec![format!("{:.1} GFLOP/s", speeds.flops / 1e9), format!("memory {:.1} GB/s", speeds.memory / 1e9)];
    if speeds.disk_read.is_finite() {
        used.push(format!("disk {:.2} read, {:.2} write", speeds.disk_read / 1e9, speeds.disk_write / 1e9));
    }
    if speeds.link.is_finite() {
        used.push(format!("exchange {:.1}", speeds.link / 1e9));
    }
    format!(
        "step {}, {:.0} tok/s, bound by {bound_by}\n  {} side by side, then update {}\n\
         arithmetic was timed just now on one transformer block, the head and the\n\
         embedding of this recipe; the rest was measured once (--measure: again) on\n{}:\n  {}\n",
        seconds(step_s),
        report.tok_s,
        parts.join(", "),
        seconds(update_s),
        report.machine,
        used.join(", ")
    )
}

fn found(search: &Search) -> String {
    let mut text = format!("\n{} configurations\n", search.considered);
    for rejected in &search.rejected {
        text += &format!("{:>6}  {}\n", rejected.count, rejected.reason);
    }
    if search.fastest.is_empty() {
        return text + "none fits\n";
    }
    for (i, found) in search.fastest.iter().enumerate() {
        let tiers = Tier::ALL.map(|tier| format!("{tier} {}", some(found.tiers.tier(tier).peak_bytes)));
        text += &format!(
            "\n{}. step {}, {:.0} tok/s, bound by {}; {}\n   {}\n",
            i + 1,
            seconds(found.step_s),
            found.tok_s,
            found.bound_by,
            tiers.join(", "),
            found.set
        );
    }
    text
}
