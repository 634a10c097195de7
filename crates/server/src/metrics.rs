//! What `/metrics` shows: here the server's own figures, in `figures` the engine's.

mod figures;

use crate::state::Loaded;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use hearth_engine::api::FinishReason;
use prometheus::{Encoder, Histogram, HistogramOpts, IntCounterVec, Opts, Registry, TextEncoder};
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const FIRST_TOKEN: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0];
const PER_TOKEN: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];
const WHOLE: &[f64] =
    &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0];

/// Counters and histograms of the server itself; the engine's are read when asked for.
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    finished: IntCounterVec,
    queue: Histogram,
    first_token: Histogram,
    per_token: Histogram,
    whole: Histogram,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let registry = Registry::new();
        Self {
            requests: counters(
                &registry,
                "hearth_http_requests_total",
                "HTTP requests by route and status",
                &["route", "code"],
            ),
            finished: counters(
                &registry,
                "hearth_sequences_finished_total",
                "Sequences that came to an end",
                &["reason"],
            ),
            queue: histogram(
                &registry,
                "hearth_queue_seconds",
                "From arrival of the request to the first forward pass",
                FIRST_TOKEN,
            ),
            first_token: histogram(
                &registry,
                "hearth_time_to_first_token_seconds",
                "From arrival of the request to the first token",
                FIRST_TOKEN,
            ),
            per_token: histogram(
                &registry,
                "hearth_time_per_output_token_seconds",
                "Mean time between a sequence's tokens after the first",
                PER_TOKEN,
            ),
            whole: histogram(
                &registry,
                "hearth_e2e_request_latency_seconds",
                "From arrival of the request to the end of a sequence",
                WHOLE,
            ),
            registry,
        }
    }

    /// All figures in Prometheus' text format.
    pub(crate) fn render(&self, model: &str, loaded: Option<&Loaded>) -> String {
        let mut out = Vec::new();
        // Writing into memory cannot fail, and every family was checked when it was registered.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        let mut text = String::from_utf8(out).unwrap_or_default();
        if let Some(loaded) = loaded {
            figures::write(&mut text, &label(model), &loaded.engine.stats());
            adapter_figures(&mut text, &loaded.adapters().names(), &loaded.adapters().in_use());
        }
        text
    }
}

/// A label's value, escaped.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Which adapters there are, as routers read it: they send a request to where its adapter is at work.
fn adapter_figures(out: &mut String, loaded: &[String], in_use: &[String]) {
    if loaded.is_empty() {
        return;
    }
    let (name, now) = ("vllm:lora_requests_info", SystemTime::now().duration_since(UNIX_EPOCH));
    let (now, running) = (now.map_or(0.0, |now| now.as_secs_f64()), label(&in_use.join(",")));
    // Writing into a string cannot fail.
    let _ = writeln!(
        out,
        "# HELP {name} Adapters that requests hold, at a time\n# TYPE {name} gauge\n\
         {name}{{max_lora=\"{}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"\"}} {now}",
        loaded.len()
    );
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let counters = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric name");
    registry.register(Box::new(counters.clone())).expect("each metric is registered once");
    counters
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    let histogram = Histogram::with_opts(options).expect("a valid metric name");
    registry.register(Box::new(histogram.clone())).expect("each metric is registered once");
    histogram
}

/// Counts every request by route and status.
pub(crate) async fn count(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    // The route, not the path: hostile paths must not become label values.
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    metrics.requests.with_label_values(&[route.as_str(), response.status().as_str()]).inc();
    response
}

/// Times of one sequence.
pub(crate) struct Timing {
    metrics: Arc<Metrics>,
    arrived: Instant,
    first: Option<Instant>,
    tokens: u32,
}

impl Timing {
    pub(crate) fn new(metrics: Arc<Metrics>, arrived: Instant) -> Self {
        Self { metrics, arrived, first: None, tokens: 0 }
    }

    /// When the request arrived.
    pub(crate) fn arrived(&self) -> Instant {
        self.arrived
    }

    /// The first token has come, of a sequence that was taken up at this moment.
    pub(crate) fn started(&self, at: Instant) {
        self.metrics.queue.observe(at.duration_since(self.arrived).as_secs_f64());
    }

    /// A token has come.
    pub(crate) fn token(&mut self) {
        self.tokens += 1;
        if self.first.is_none() {
            self.first = Some(Instant::now());
            self.metrics.first_token.observe(self.arrived.elapsed().as_secs_f64());
        }
    }

    /// The sequence has ended.
    pub(crate) fn finished(&mut self, reason: FinishReason) {
        self.metrics.finished.with_label_values(&[reason_name(reason)]).inc();
        self.metrics.whole.observe(self.arrived.elapsed().as_secs_f64());
        if let Some(first) = self.first
            && self.tokens > 1
        {
            let per_token: Duration = first.elapsed() / (self.tokens - 1);
            self.metrics.per_token.observe(per_token.as_secs_f64());
        }
    }
}

/// `stop` or `length`, as in `finish_reason`.
pub(crate) fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}
