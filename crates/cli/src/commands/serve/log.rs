//! One line of JSON on stderr for every sequence that ends: sizes and times, no words of anybody.

use hearth_server::record::{Observer, Record};
use serde_json::{Value, json};
use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

/// Writes to stderr.
pub struct RequestLog;

impl Observer for RequestLog {
    fn ended(&self, record: &Record) {
        // Nobody reading the log is no reason not to serve.
        let _ = writeln!(std::io::stderr().lock(), "{}", line(record));
    }
}

pub(super) fn line(record: &Record) -> Value {
    let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let about = &record.about;
    json!({
        "event": "request", "time": record.arrived.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()),
        "request_id": about.request_id, "id": about.response_id, "sequence": record.sequence, "api": about.api,
        "model": about.model, "stream": about.stream, "end": record.end, "error": record.error,
        "prompt_tokens": record.prompt_tokens, "cached_tokens": record.cached_tokens,
        "generated_tokens": record.generated_tokens, "queue_ms": ms(record.queue),
        "prefill_ms": ms(record.prefill), "decode_ms": ms(record.decode),
    })
}
