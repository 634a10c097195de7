//! `hearth bench serve`: load on any OpenAI-compatible server, and what its users would have felt.
//!
//! # Layout
//! - here: arguments, the two ways of asking (clients in a closed loop, arrivals at a rate), the report.
//! - [`client`]: one streamed request, token by token.
//! - [`load`]: lengths and prompts.
//! - [`figures`]: percentiles, effective throughput, bandwidth.
//! - [`html`]: the report as a page with plots.

mod client;
mod figures;
mod html;
mod load;

use crate::exit::usage;
use crate::probe;
use crate::ui::{Report, Ui, table};
use anyhow::{Context, bail};
use client::{Client, Sample};
use figures::{Figures, Sla};
use load::{Load, Planned};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Load on a server.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeBench {
    /// Where it is: http://127.0.0.1:8080
    pub url: String,
    /// Model to ask for [default: the first of /v1/models]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Key to send
    #[arg(long, value_name = "K")]
    pub api_key: Option<String>,
    /// Requests in all, after those that warm up
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub requests: usize,
    /// Closed loop: each of so many clients asks again as soon as it is answered
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub clients: usize,
    /// Arrivals per second instead of a closed loop, at random moments (Poisson)
    #[arg(long, value_name = "R")]
    pub rate: Option<f64>,
    /// Mean tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prompt_tokens: usize,
    /// Mean tokens generated
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub output_tokens: usize,
    /// Conversations that take turns: the requests of one begin with the same words [default: no two requests do]
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub conversations: usize,
    /// Tokens that the requests of a conversation begin with, before those of --prompt-tokens
    #[arg(long, value_name = "N", default_value_t = 1024, requires = "conversations")]
    pub shared_tokens: usize,
    /// Standard deviation of both lengths as a share of the mean
    #[arg(long, value_name = "S", default_value_t = 0.3)]
    pub spread: f64,
    /// Seed of lengths, words and arrivals
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Effective throughput: prompt tokens per second until the first token
    #[arg(long, value_name = "TOK_S", default_value_t = 512.0)]
    pub sla_prompt: f64,
    /// Effective throughput: tokens per second afterwards, as a moving average
    #[arg(long, value_name = "TOK_S", default_value_t = 4.0)]
    pub sla_generation: f64,
    /// Bytes of the model's weights, for the share of memory bandwidth [default: as a hearth server says]
    #[arg(long, value_name = "N")]
    pub weight_bytes: Option<f64>,
    /// Peak memory bandwidth in GB/s [default: measured, where the server is on this machine]
    #[arg(long, value_name = "GB_S")]
    pub peak_gb_s: Option<f64>,
    /// Write the report as a page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct ServeReport {
    /// `serve`.
    pub name: &'static str,
    /// Which server.
    pub url: String,
    /// Which model.
    pub model: String,
    /// How requests came: `closed loop, 8 clients` or `2 arrivals/s`.
    pub arrivals: String,
    /// Output tokens per second over the whole run.
    pub tok_s: f64,
    /// Share of the memory's bandwidth, where it is known.
    pub of_peak: Option<f64>,
    /// Largest resident memory of this process, the client's.
    pub peak_rss_bytes: u64,
    /// Everything else.
    #[serde(flatten)]
    pub figures: Figures,
    /// Each request.
    pub samples: Vec<Sample>,
}

/// Measures.
///
/// # Errors
/// A server that cannot be reached or does not answer the first request.
pub(super) fn run(args: &ServeBench, ui: &Ui) -> anyhow::Result<ServeReport> {
    check(args)?;
    let client = Client::connect(&args.url, args.model.as_deref(), args.api_key.as_deref())?;
    ui.note(format!("{}: model {}", args.url, client.model()));
    let load = warm_up(&client, args)?;
    let plan = load.plan(args.requests, args.seed);
    ui.note(format!("{} requests, {} …", plan.len(), arrivals(args)));
    let start = Instant::now();
    let samples = match args.rate {
        None => closed_loop(&client, &plan, args.clients, start),
        Some(rate) => at_rate(&client, &plan, rate, args.seed, start),
    };
    let wall = start.elapsed().as_secs_f64();
    let sla = Sla { prompt_tok_s: args.sla_prompt, generation_tok_s: args.sla_generation };
    let mut figures = Figures::of(&samples, wall, sla);
    let of_peak = bandwidth(args, &client, &mut figures);
    let report = ServeReport {
        name: "serve",
        url: args.url.clone(),
        model: client.model().to_owned(),
        arrivals: arrivals(args),
        tok_s: figures.output_tok_s,
        of_peak,
        peak_rss_bytes: crate::machine::peak_rss_bytes(),
        figures,
        samples,
    };
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&report)).with_context(|| path.display().to_string())?;
    }
    Ok(report)
}

fn check(args: &ServeBench) -> anyhow::Result<()> {
    let positive = |what: &str, value: f64| match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(usage(format!("{what} is {value}, it must be above 0"))),
    };
    positive("--requests", args.requests as f64)?;
    positive("--clients", args.clients as f64)?;
    positive("--prompt-tokens", args.prompt_tokens as f64)?;
    positive("--output-tokens", args.output_tokens as f64)?;
    positive("--rate", args.rate.unwrap_or(1.0))?;
    positive("--sla-prompt", args.sla_prompt)?;
    positive("--sla-generation", args.sla_generation)?;
    if !(0.0..=1.0).contains(&args.spread) {
        return Err(usage(format!("--spread is {}, it must be from 0 to 1", args.spread)));
    }
    Ok(())
}

fn arrivals(args: &ServeBench) -> String {
    match args.rate {
        Some(rate) => format!("{rate} arrivals/s"),
        None => format!("closed loop, {} clients", args.clients),
    }
}

/// Asks once or twice: the server is warm then, and it is known how many tokens a word has.
fn warm_up(client: &Client, args: &ServeBench) -> anyhow::Result<Load> {
    let load = Load::new(args.prompt_tokens, args.output_tokens, args.spread);
    let mut load = load.in_conversations(args.conversations, args.shared_tokens);
    for round in 0..2 {
        let planned = load.one(args.prompt_tokens, args.output_tokens.min(8), args.seed ^ (0x5eed + round));
        let sample = client.ask(&planned, Instant::now());
        if let Some(error) = &sample.error {
            bail!("{}: the first request was not answered: {error}", args.url);
        }
        load.learn(planned.words, sample.prompt_tokens);
    }
    Ok(load)
}

fn closed_loop(client: &Client, plan: &[Planned], clients: usize, start: Instant) -> Vec<Sample> {
    let (next, samples) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..clients.min(plan.len()) {
            scope.spawn(|| {
                while let Some(planned) = plan.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let sample = client.ask(planned, start);
                    samples.lock().unwrap_or_else(|e| e.into_inner()).push(sample);
                }
            });
        }
    });
    samples.into_inner().unwrap_or_else(|e| e.into_inner())
}

/// Every request comes at its moment, however many are still on their way: else a slow server would be asked less.
fn at_rate(client: &Client, plan: &[Planned], rate: f64, seed: u64, start: Instant) -> Vec<Sample> {
    let samples = Mutex::new(Vec::new());
    let moments = load::arrivals(plan.len(), rate, seed);
    std::thread::scope(|scope| {
        for (planned, moment) in plan.iter().zip(moments) {
            let due = start + Duration::from_secs_f64(moment);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let samples = &samples;
            scope.spawn(move || {
                let sample = client.ask(planned, start);
                samples.lock().unwrap_or_else(|e| e.into_inner()).push(sample);
            });
        }
    });
    samples.into_inner().unwrap_or_else(|e| e.into_inner())
}

/// Databricks' model bandwidth utilization: (weights + KV cache read per token) / TPOT / peak.
fn bandwidth(args: &ServeBench, client: &Client, figures: &mut Figures) -> Option<f64> {
    let known = client.memory();
    let weights = args.weight_bytes.or(known.map(|memory| memory.weight_bytes))?;
    let kv = known.map_or(0.0, |memory| memory.kv_bytes_per_token) * figures.mean_context;
    let local = ["//127.", "//localhost", "//[::1]"].iter().any(|host| args.url.contains(host));
    let peak = args.peak_gb_s.or_else(|| local.then(|| probe::peaks().read_gb_s))?;
    figures.peak_gb_s = Some(peak);
    let tpot_s = figures.tpot_ms.p50 / 1e3;
    (tpot_s > 0.0).then(|| (weights + kv) / tpot_s / (peak * 1e9))
}

impl Report for ServeReport {
    fn text(&self) -> String {
        let f = &self.figures;
        let row = |p: &figures::Percentiles| {
            format!("p50 {:>8.1}  p90 {:>8.1}  p99 {:>8.1} ms", p.p50, p.p90, p.p99)
        };
        let mut rows = vec![
            ("load", format!("{}, {} requests, {} failed", self.arrivals, f.requests, f.errors)),
            ("output", format!("{:.1} tokens/s ({:.2} requests/s)", f.output_tok_s, f.requests_s)),
            ("first token", row(&f.ttft_ms)),
            ("found computed", format!("{} prompt tokens", f.cached_tokens)),
            ("per token", row(&f.tpot_ms)),
            ("whole request", row(&f.e2e_ms)),
            (
                "effective",
                format!(
                    "{:.2} requests/s; {:.0} % kept {} tok/s prompt, {} tok/s generation",
                    f.effective_requests_s,
                    100.0 * f.within_sla,
                    f.sla.prompt_tok_s,
                    f.sla.generation_tok_s
                ),
            ),
        ];
        rows.extend(
            self.of_peak.map(|share| ("memory bandwidth", format!("{:.0} % of peak", share * 100.0))),
        );
        rows.extend(f.first_error.iter().map(|error| ("first failure", error.clone())));
        format!("serve: {} at {}\n{}", self.model, self.url, table(rows))
    }

    fn ok(&self) -> bool {
        self.figures.errors == 0
    }
}
