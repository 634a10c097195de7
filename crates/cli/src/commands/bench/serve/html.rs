//! The report as one page with plots, whole in itself.

use super::ServeReport;
use super::client::Sample;
use super::figures::Percentiles;
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;\
color:#26211d;background:#faf8f5}h1{font-size:1.4em}h2{font-size:1.05em;margin-top:2em}table{border-collapse:collapse}\
td,th{padding:.25em .9em .25em 0;text-align:right;font-variant-numeric:tabular-nums}td:first-child,th:first-child\
{text-align:left}th{color:#7b7168;font-weight:normal;border-bottom:1px solid #e4ddd5}svg{width:100%;height:auto;\
background:#fff;border:1px solid #e4ddd5;border-radius:.4em}text{font:11px system-ui,sans-serif;fill:#7b7168}";

// Width and height of a plot and the margins that its axes take.
const W: f64 = 720.0;
const H: f64 = 220.0;
const LEFT: f64 = 52.0;
const BOTTOM: f64 = 28.0;
const TOP: f64 = 12.0;

/// The page.
pub fn page(report: &ServeReport) -> String {
    let f = &report.figures;
    let fine: Vec<&Sample> = report.samples.iter().filter(|s| s.error.is_none()).collect();
    let values = |of: fn(&Sample) -> f64| fine.iter().map(|s| of(s)).collect::<Vec<f64>>();
    let mut out = String::new();
    let title = escape(&format!("{} at {}", report.model, report.url));
    // Writing into a string cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style>\
         <h1>{title}</h1><p>{}, {} requests, {} failed, {:.1} s. Output {:.1} tokens/s, prompts {:.1} tokens/s, \
         {:.2} requests/s. Effective: {:.2} requests/s ({:.0} % kept {} tokens/s of prompt and {} tokens/s of \
         generation).</p>",
        escape(&report.arrivals),
        f.requests,
        f.errors,
        f.wall_s,
        f.output_tok_s,
        f.prompt_tok_s,
        f.requests_s,
        f.effective_requests_s,
        100.0 * f.within_sla,
        f.sla.prompt_tok_s,
        f.sla.generation_tok_s
    );
    if let (Some(share), Some(peak)) = (report.of_peak, f.peak_gb_s) {
        let _ = write!(out, "<p>Memory bandwidth: {:.0} % of {peak:.1} GB/s.</p>", share * 100.0);
    }
    out += "<table><tr><th>ms</th><th>mean</th><th>p50</th><th>p90</th><th>p99</th><th>max</th></tr>";
    for (name, p) in [
        ("time to first token", &f.ttft_ms),
        ("time per output token", &f.tpot_ms),
        ("between chunks", &f.itl_ms),
        ("whole request", &f.e2e_ms),
    ] {
        out += &row(name, p);
    }
    out += "</table>";
    for (name, values) in [
        ("Time to first token", values(|s| s.ttft_ms)),
        ("Time per output token", values(|s| s.tpot_ms)),
        ("Whole request", values(|s| s.e2e_ms)),
    ] {
        let _ = write!(out, "<h2>{name}: share of requests within so many ms</h2>{}", distribution(values));
    }
    let _ =
        write!(out, "<h2>Requests over time: waiting (light) and generating (dark)</h2>{}", timeline(&fine));
    out += "</html>\n";
    out
}

fn row(name: &str, p: &Percentiles) -> String {
    let cells: String =
        [p.mean, p.p50, p.p90, p.p99, p.max].iter().map(|v| format!("<td>{v:.1}</td>")).collect();
    format!("<tr><td>{name}</td>{cells}</tr>")
}

/// The cumulative distribution.
fn distribution(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let most = values.last().copied().unwrap_or(1.0).max(1e-9);
    let x = |value: f64| LEFT + (W - LEFT - 26.0) * value / most;
    let y = |share: f64| TOP + (H - TOP - BOTTOM) * (1.0 - share);
    let mut path = format!("M{:.1} {:.1}", x(0.0), y(0.0));
    for (i, &value) in values.iter().enumerate() {
        let share = (i + 1) as f64 / values.len() as f64;
        let _ = write!(path, "H{:.1}V{:.1}", x(value), y(share));
    }
    let mut out = frame();
    for share in [0.0, 0.5, 0.9, 0.99] {
        let at = y(share);
        let _ = write!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{W}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#efe9e2\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0} %</text>",
            LEFT - 6.0,
            at + if share == 0.99 { 1.0 } else { 5.0 },
            share * 100.0
        );
    }
    for tick in 0..=4 {
        let value = most * f64::from(tick) / 4.0;
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(value),
            H - 9.0,
            number(value)
        );
    }
    let _ = write!(out, "<path d=\"{path}\" fill=\"none\" stroke=\"#c9541f\" stroke-width=\"2\"/></svg>");
    out
}

/// A bar per request from asking to end.
fn timeline(samples: &[&Sample]) -> String {
    let end = samples.iter().map(|s| s.at_ms + s.e2e_ms).fold(1.0, f64::max);
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    let x = |ms: f64| LEFT + (W - LEFT - 26.0) * ms / end;
    let step = (H - TOP - BOTTOM) / sorted.len().max(1) as f64;
    let mut out = frame();
    for (i, s) in sorted.iter().enumerate() {
        let (y, h) = (TOP + step * i as f64, (step * 0.8).max(0.4));
        for (from, to, fill) in [(0.0, s.ttft_ms, "#f0c9b2"), (s.ttft_ms, s.e2e_ms.max(s.ttft_ms), "#c9541f")]
        {
            let (a, b) = (x(s.at_ms + from), x(s.at_ms + to));
            let _ = write!(
                out,
                "<rect x=\"{a:.1}\" y=\"{y:.2}\" width=\"{:.1}\" height=\"{h:.2}\" fill=\"{fill}\"/>",
                (b - a).max(0.3)
            );
        }
    }
    for tick in 0..=4 {
        let ms = end * f64::from(tick) / 4.0;
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} s</text>",
            x(ms),
            H - 9.0,
            number(ms / 1e3)
        );
    }
    out + "</svg>"
}

fn frame() -> String {
    format!("<svg viewBox=\"0 0 {W} {H}\" role=\"img\">")
}

fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
