//! OpenTelemetry traces: a span per sequence with queue, prefill and decode in it, as OTLP's JSON over HTTP, sent by a
//! thread of its own.

use hearth_server::record::{Observer, Record};
use serde_json::{Value, json};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, UNIX_EPOCH};

/// Records that may wait to be sent; more are dropped rather than kept.
const MOST_WAITING: usize = 4096;
const BATCH: usize = 256;
const AT_LEAST_EVERY: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(5);

/// Hands records to the thread that sends them.
pub struct Traces(SyncSender<Record>);

impl Traces {
    /// Sends to a collector: `http://host:4318`, or the whole address of its traces.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn to(url: &str) -> std::io::Result<Self> {
        let url = match url.contains("/v1/") {
            true => url.to_owned(),
            false => format!("{}/v1/traces", url.trim_end_matches('/')),
        };
        let (sender, records) = sync_channel(MOST_WAITING);
        std::thread::Builder::new().name("hearth-traces".into()).spawn(move || send_all(&url, &records))?;
        Ok(Self(sender))
    }
}

impl Observer for Traces {
    fn ended(&self, record: &Record) {
        let _ = self.0.try_send(Record { content: None, ..record.clone() });
    }
}

fn send_all(url: &str, records: &Receiver<Record>) {
    let agent: ureq::Agent = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).build().into();
    let mut failed = false;
    loop {
        let (batch, open) = batch(records);
        if !batch.is_empty() {
            let spans: Vec<Value> = batch.iter().flat_map(spans).collect();
            let sent = agent.post(url).send_json(export(&spans));
            if let (Err(error), false) = (&sent, failed) {
                eprintln!("traces cannot be sent to {url}: {error}");
            }
            failed = sent.is_err();
        }
        if !open {
            return;
        }
    }
}

/// What has come, at the latest after a while; and whether more may come.
fn batch(records: &Receiver<Record>) -> (Vec<Record>, bool) {
    let mut batch = Vec::new();
    while batch.len() < BATCH {
        match records.recv_timeout(AT_LEAST_EVERY) {
            Ok(record) => batch.push(record),
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => return (batch, false),
        }
    }
    (batch, true)
}

fn export(spans: &[Value]) -> Value {
    let service = json!([{"key": "service.name", "value": {"stringValue": "hearth"}}]);
    let scope = json!({"name": "hearth", "version": env!("CARGO_PKG_VERSION")});
    json!({"resourceSpans": [{"resource": {"attributes": service}, "scopeSpans": [{"scope": scope, "spans": spans}]}]})
}

/// The sequence's span and its three parts.
fn spans(record: &Record) -> [Value; 4] {
    let (trace, parent) = trace_and_parent(record.about.trace_parent.as_deref());
    let root = format!("{:016x}", random());
    let start = record.arrived.duration_since(UNIX_EPOCH).unwrap_or_default();
    let admitted = start + record.queue;
    let first = admitted + record.prefill;
    let end = first + record.decode;
    let mut whole = span(&trace, &root, parent.as_deref(), record.about.api, start, end);
    whole["attributes"] = attributes(record);
    if record.end == "failed" {
        whole["status"] = json!({"code": 2, "message": record.error});
    }
    let part =
        |name: &str, from, to| span(&trace, &format!("{:016x}", random()), Some(&root), name, from, to);
    let parts =
        [part("queue", start, admitted), part("prefill", admitted, first), part("decode", first, end)];
    let [queue, prefill, decode] = parts;
    [whole, queue, prefill, decode]
}

fn span(trace: &str, id: &str, parent: Option<&str>, name: &str, from: Duration, to: Duration) -> Value {
    json!({
        "traceId": trace, "spanId": id, "parentSpanId": parent.unwrap_or(""), "name": name, "kind": 2,
        "startTimeUnixNano": from.as_nanos().to_string(), "endTimeUnixNano": to.as_nanos().to_string(),
    })
}

/// Named as OpenTelemetry's conventions for generative models name them.
fn attributes(record: &Record) -> Value {
    let text = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    let count = |key: &str, value: usize| json!({"key": key, "value": {"intValue": value.to_string()}});
    json!([
        text("gen_ai.operation.name", record.about.api),
        text("gen_ai.request.model", &record.about.model),
        text("gen_ai.response.id", &record.about.response_id),
        text("gen_ai.response.finish_reasons", record.end),
        count("gen_ai.usage.input_tokens", record.prompt_tokens),
        count("gen_ai.usage.output_tokens", record.generated_tokens),
        count("hearth.cached_tokens", record.cached_tokens),
        text("hearth.request_id", &record.about.request_id),
    ])
}

/// From `00-<32 hex>-<16 hex>-<flags>`, else a fresh trace.
fn trace_and_parent(given: Option<&str>) -> (String, Option<String>) {
    let hex = |text: &str, len: usize| text.len() == len && text.bytes().all(|b| b.is_ascii_hexdigit());
    let parts: Vec<&str> = given.unwrap_or_default().split('-').collect();
    match parts[..] {
        [_, trace, span, _] if hex(trace, 32) && hex(span, 16) => (trace.to_owned(), Some(span.to_owned())),
        _ => (format!("{:016x}{:016x}", random(), random()), None),
    }
}

fn random() -> u64 {
    RandomState::new().hash_one("a span").max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_goes_on_where_the_client_began_it() {
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        let given = trace_and_parent(Some(&format!("00-{trace}-{span}-01")));
        assert_eq!(given, (trace.to_owned(), Some(span.to_owned())));
        for bad in [None, Some(""), Some("00-x-y-01"), Some("00-é-é-é")] {
            let (trace, parent) = trace_and_parent(bad);
            assert_eq!((trace.len(), parent), (32, None));
        }
    }
}
