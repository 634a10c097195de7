//! What each tier holds over a step, as an SVG picture: stacked areas by kind, one panel per tier.

use crate::tiers::{sharers, word};
use crate::training::Job;
use crate::ui::bytes;
use hearth_memory::ledger::Moment;
use hearth_memory::{Kind, Ledger, Tier};
use std::fmt::Write;

/// Lowest first, each with its colour: Paul Tol's bright scheme, which colour-blind readers can tell apart.
const KINDS: [(Kind, &str); 5] = [
    (Kind::Weights, "#4477aa"),
    (Kind::Optimizer, "#228833"),
    (Kind::Gradients, "#ee6677"),
    (Kind::Activations, "#ccbb44"),
    (Kind::Staging, "#aa3377"),
];
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 92.0;
const RIGHT: f64 = 16.0;
/// Where the panels begin: below title, legend and the names of micro-batches and phases.
const TOP: f64 = 112.0;
const PANEL: f64 = 150.0;
const GAP: f64 = 34.0;
/// Micro-batches that are drawn; of more the first, the fullest and the last.
const MOST_DRAWN: usize = 3;
/// Labels stay legible down to this.
const NARROWEST: f64 = 64.0;

/// A phase of a step: its moments, the first of them its mark.
struct Phase<'a> {
    label: &'a str,
    /// From 1; nothing before the first micro-batch and after the last.
    micro_batch: Option<usize>,
    moments: &'a [Moment],
}

/// The picture of what was recorded in one rank's `ledger`.
pub fn draw(ledger: &Ledger, job: &Job) -> String {
    let timeline = ledger.timeline();
    let phases = phases(&timeline);
    let micro_batches = phases.iter().filter_map(|phase| phase.micro_batch).max().unwrap_or(0);
    let shown = shown(phases, micro_batches);
    let edges = edges(&shown);
    let tiers: Vec<Tier> = Tier::ALL.into_iter().filter(|tier| ledger.peak(*tier) > 0).collect();
    let bottom = TOP + tiers.len() as f64 * (PANEL + GAP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {bottom}\" width=\"{WIDTH}\" \
         height=\"{bottom}\" font-family=\"DejaVu Sans, Verdana, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, LEFT, 24.0, "font-size=\"15\" font-weight=\"bold\"", "What a step holds");
    let empty: Vec<&str> =
        Tier::ALL.into_iter().filter(|tier| !tiers.contains(tier)).map(Tier::name).collect();
    if !empty.is_empty() {
        let words = format!("nothing lies in {}", empty.join(" and "));
        text(&mut svg, WIDTH - RIGHT, 24.0, "text-anchor=\"end\" fill=\"#666666\"", &words);
    }
    legend(&mut svg);
    heading(&mut svg, &shown, &edges, micro_batches, bottom);
    for (i, tier) in tiers.into_iter().enumerate() {
        let top = TOP + i as f64 * (PANEL + GAP);
        Panel { tier, top, ranks: sharers(tier, job.here()) }.draw(&mut svg, &shown, &edges, ledger, job);
    }
    svg + "</svg>\n"
}

fn phases(timeline: &[Moment]) -> Vec<Phase<'_>> {
    let marks: Vec<usize> = (0..timeline.len()).filter(|i| timeline[*i].peak.is_none()).collect();
    let ends = marks.iter().skip(1).copied().chain([timeline.len()]);
    let (mut micro_batch, mut before) = (0, "");
    let mut phases = Vec::new();
    for (from, to) in marks.iter().copied().zip(ends) {
        let label = timeline[from].label.as_str();
        if label == "reference" || label == "forward" && before != "reference" {
            micro_batch += 1;
        }
        let outside = matches!(label, "load" | "update" | "end");
        before = label;
        phases.push(Phase {
            label,
            micro_batch: (!outside).then_some(micro_batch),
            moments: &timeline[from..to],
        });
    }
    phases
}

/// Those that are drawn: not every micro-batch where there are many.
fn shown(phases: Vec<Phase<'_>>, micro_batches: usize) -> Vec<Phase<'_>> {
    let height = |phase: &Phase<'_>| {
        let totals = phase.moments.iter().map(|moment| moment.held.total(Tier::Device));
        totals.max().unwrap_or(0)
    };
    // The first of equals: `max_by_key` takes the last.
    let fullest = phases.iter().rev().filter(|phase| phase.micro_batch.is_some()).max_by_key(|p| height(p));
    let fullest = fullest.and_then(|phase| phase.micro_batch).unwrap_or(1);
    let drawn = |n: usize| micro_batches <= MOST_DRAWN || n == 1 || n == fullest || n == micro_batches;
    phases.into_iter().filter(|phase| phase.label != "end" && phase.micro_batch.is_none_or(drawn)).collect()
}

/// Where each phase begins, and the last one ends: as wide as it has moments, within reason.
fn edges(phases: &[Phase<'_>]) -> Vec<f64> {
    let weight = |phase: &Phase<'_>| (phase.moments.len() as f64).sqrt();
    let whole = WIDTH - LEFT - RIGHT;
    let narrowest = NARROWEST.min(whole / phases.len().max(1) as f64);
    let spare = whole - narrowest * phases.len() as f64;
    let sum: f64 = phases.iter().map(weight).sum();
    let mut edges = vec![LEFT];
    for phase in phases {
        edges.push(edges[edges.len() - 1] + narrowest + spare * weight(phase) / sum.max(1.0));
    }
    edges
}

fn text(svg: &mut String, x: f64, y: f64, style: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{}</text>", escaped(words));
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn legend(svg: &mut String) {
    for (i, (kind, colour)) in KINDS.into_iter().enumerate() {
        let x = LEFT + i as f64 * 118.0;
        let _ = writeln!(svg, "<rect x=\"{x}\" y=\"40\" width=\"12\" height=\"12\" fill=\"{colour}\"/>");
        text(svg, x + 18.0, 50.5, "", word(kind));
    }
}

/// Names of micro-batches and phases, and bands that carry them down through all panels.
fn heading(svg: &mut String, phases: &[Phase<'_>], edges: &[f64], micro_batches: usize, bottom: f64) {
    for (i, phase) in phases.iter().enumerate() {
        let (from, to) = (edges[i], edges[i + 1]);
        let fill = if i % 2 == 0 { "#f2f2f2" } else { "#fafafa" };
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"92\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{fill}\"/>",
            to - from,
            bottom - GAP - 92.0 + 6.0
        );
        text(svg, (from + to) / 2.0, 105.0, "text-anchor=\"middle\" font-size=\"11\"", phase.label);
    }
    let mut i = 0;
    while i < phases.len() {
        let same = phases[i..].iter().take_while(|phase| phase.micro_batch == phases[i].micro_batch).count();
        if let Some(n) = phases[i].micro_batch {
            let (from, to) = (edges[i], edges[i + same]);
            let _ = writeln!(
                svg,
                "<path d=\"M{:.1} 90 V84 H{:.1} V90\" fill=\"none\" stroke=\"#999999\"/>",
                from + 2.0,
                to - 2.0
            );
            let words = format!("micro-batch {n} of {micro_batches}");
            text(svg, (from + to) / 2.0, 79.0, "text-anchor=\"middle\" font-size=\"11\"", &words);
        }
        i += same;
    }
}

/// One tier.
struct Panel {
    tier: Tier,
    top: f64,
    /// Ranks whose bytes it shows.
    ranks: u64,
}

impl Panel {
    fn draw(&self, svg: &mut String, phases: &[Phase<'_>], edges: &[f64], ledger: &Ledger, job: &Job) {
        let peak = ledger.peak(self.tier) * self.ranks;
        let budget = job.budget.limit(self.tier).map(|limit| limit.saturating_mul(self.ranks));
        // A budget far above the peak would flatten the picture.
        let visible = budget.filter(|budget| *budget <= peak.saturating_mul(4));
        let full = peak.max(visible.unwrap_or(0)) as f64 * 1.12;
        let y = |bytes: u64| self.top + PANEL * (1.0 - bytes as f64 / full);
        self.areas(svg, phases, edges, &y);
        let right = WIDTH - RIGHT;
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {:.1} V{:.1} H{right}\" fill=\"none\" stroke=\"#333333\"/>",
            self.top,
            self.top + PANEL
        );
        self.scale(svg, peak, &y);
        let (line, end) =
            ("stroke-dasharray=\"6 4\" stroke-width=\"1.5\"", "text-anchor=\"end\" font-size=\"11\"");
        if let Some(budget) = visible {
            let at = y(budget);
            let _ = writeln!(svg, "<path d=\"M{LEFT} {at:.1} H{right}\" stroke=\"#cc0000\" {line}/>");
            let words = format!("budget {}", bytes(budget));
            text(svg, right - 4.0, at - 4.0, &format!("{end} fill=\"#cc0000\""), &words);
        }
        let beyond = budget.filter(|_| visible.is_none());
        let budget = beyond.map(|budget| format!(", budget {}", bytes(budget))).unwrap_or_default();
        let whose = if self.ranks > 1 { format!(" for {} ranks", self.ranks) } else { String::new() };
        let words = format!("peak {}{whose}{budget}", bytes(peak));
        text(svg, LEFT, self.top + PANEL + 16.0, "font-size=\"11\"", &words);
    }

    fn scale(&self, svg: &mut String, peak: u64, y: &dyn Fn(u64) -> f64) {
        let style = "text-anchor=\"end\" font-weight=\"bold\"";
        text(svg, LEFT - 8.0, self.top + 12.0, style, self.tier.name());
        let step = round_step(peak);
        for bytes_at in (0..).map(|i| i * step).take_while(|at| *at <= peak) {
            let at = y(bytes_at);
            // Above that the tier's name stands.
            if at > self.top + 22.0 {
                let style = "text-anchor=\"end\" font-size=\"10\" fill=\"#555555\"";
                text(svg, LEFT - 8.0, at + 3.5, style, &short(bytes_at));
            }
            let _ = writeln!(svg, "<path d=\"M{} {at:.1} h4\" stroke=\"#333333\"/>", LEFT - 4.0);
        }
    }

    fn areas(&self, svg: &mut String, phases: &[Phase<'_>], edges: &[f64], y: &dyn Fn(u64) -> f64) {
        // The first point of each phase closes the one before: where micro-batches were left out nothing is drawn
        // between.
        for (i, phase) in phases.iter().enumerate() {
            let width = edges[i + 1] - edges[i];
            let next = phases.get(i + 1).map(|next| &next.moments[0]);
            let count = phase.moments.len() as f64;
            let x = |at: usize| edges[i] + width * at as f64 / count;
            let closing = next.or(phase.moments.last());
            let points: Vec<(f64, &Moment)> =
                phase.moments.iter().chain(closing).enumerate().map(|(at, moment)| (x(at), moment)).collect();
            let mut below = vec![0u64; points.len()];
            for (kind, colour) in KINDS {
                let above: Vec<u64> = below
                    .iter()
                    .zip(&points)
                    .map(|(below, (_, moment))| below + moment.held.bytes(self.tier, kind) * self.ranks)
                    .collect();
                if above != below {
                    let up = points.iter().zip(&above).map(|((x, _), bytes)| (*x, y(*bytes)));
                    let back = points.iter().zip(&below).rev().map(|((x, _), bytes)| (*x, y(*bytes)));
                    let path: Vec<String> = up.chain(back).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                    let _ = writeln!(
                        svg,
                        "<polygon points=\"{}\" fill=\"{colour}\" shape-rendering=\"crispEdges\"/>",
                        path.join(" ")
                    );
                }
                below = above;
            }
        }
    }
}

/// A round number of bytes of which two to five make the peak.
fn round_step(peak: u64) -> u64 {
    let mut step = 1u64;
    while peak / step > 4 && step < 1 << 62 {
        step *= 2;
    }
    step
}

/// A round number of bytes, without decimals where it has none.
fn short(n: u64) -> String {
    bytes(n).replace(".0 ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_has_few_round_steps() {
        for peak in [1, 5, 1000, 3 << 20, (7 << 30) + 1, u64::MAX] {
            let steps = peak / round_step(peak);
            assert!((1..=4).contains(&steps), "{peak}: {steps}");
        }
    }

    #[test]
    fn words_cannot_break_the_picture() {
        assert_eq!(escaped("a<b & c>d"), "a&lt;b &amp; c&gt;d");
    }
}
