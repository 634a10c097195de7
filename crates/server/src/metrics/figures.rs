//! The engine's own figures, and some of them again under the names that routers read.

use hearth_engine::api::EngineStats;
use std::fmt::Write;

/// Name, kind, what it tells, and where it is read.
type Figure = (&'static str, &'static str, &'static str, fn(&EngineStats) -> f64);

const GAUGE: &str = "gauge";
const COUNTER: &str = "counter";

#[rustfmt::skip] // One line each.
const FIGURES: &[Figure] = &[
    ("hearth_sequences_running", GAUGE, "Sequences in the batch", |s| s.running as f64),
    ("hearth_sequences_waiting", GAUGE, "Requests waiting for admission", |s| s.waiting as f64),
    ("hearth_kv_blocks_used", GAUGE, "KV blocks in use", |s| s.kv_blocks_used as f64),
    ("hearth_kv_blocks", GAUGE, "KV blocks in all", |s| s.kv_blocks_total as f64),
    ("hearth_kv_host_blocks_held", GAUGE, "KV blocks kept on the host", |s| s.kv_host_blocks_held as f64),
    ("hearth_kv_host_blocks", GAUGE, "KV blocks that the host can keep", |s| s.kv_host_blocks_total as f64),
    ("hearth_kv_host_bytes", GAUGE, "Bytes of the KV cache on the host", |s| s.kv_host_bytes as f64),
    ("hearth_kv_blocks_moved_out_total", COUNTER, "KV blocks moved to the host", |s| s.kv_blocks_moved_out as f64),
    ("hearth_kv_blocks_brought_back_total", COUNTER, "KV blocks brought back from the host", |s| s.kv_blocks_brought_back as f64),
    ("hearth_weight_bytes", GAUGE, "Bytes of weights resident", |s| s.weight_bytes as f64),
    ("hearth_kv_bytes", GAUGE, "Bytes of the KV cache on the device", |s| s.kv_bytes as f64),
    ("hearth_prompt_tokens_total", COUNTER, "Prompt tokens computed", |s| s.prompt_tokens as f64),
    ("hearth_generated_tokens_total", COUNTER, "Tokens generated", |s| s.generated_tokens as f64),
    ("hearth_engine_finished_total", COUNTER, "Requests the engine finished", |s| s.finished as f64),
    ("hearth_engine_cancelled_total", COUNTER, "Requests cancelled by their caller", |s| s.cancelled as f64),
    ("hearth_engine_steps_total", COUNTER, "Forward passes", |s| s.steps as f64),
    ("hearth_prefix_cached_tokens_total", COUNTER, "Prompt tokens found in the prefix cache", |s| s.cached_tokens as f64),
    ("hearth_preemptions_total", COUNTER, "Sequences that gave up their KV blocks", |s| s.preemptions as f64),
    ("hearth_engine_overdue_total", COUNTER, "Requests that waited longer than they wanted", |s| s.overdue as f64),
    ("hearth_streamed_nvme_bytes_total", COUNTER, "Bytes of weights read from disk", |s| s.streamed.nvme_bytes as f64),
    ("hearth_streamed_host_bytes_total", COUNTER, "Bytes of weights read from host memory", |s| s.streamed.host_bytes as f64),
    ("hearth_streamed_gb_s", GAUGE, "10^9 bytes of weights streamed per second", |s| s.streamed.gb_s()),
    ("hearth_drafts_total", COUNTER, "Times that tokens were guessed in advance", |s| s.drafts as f64),
    ("hearth_draft_tokens_total", COUNTER, "Tokens guessed in advance", |s| s.draft_tokens as f64),
    ("hearth_accepted_tokens_total", COUNTER, "Guessed tokens that were right", |s| s.accepted_tokens as f64),
    ("vllm:spec_decode_num_drafts_total", COUNTER, "The first of these again", |s| s.drafts as f64),
    ("vllm:spec_decode_num_draft_tokens_total", COUNTER, "The second", |s| s.draft_tokens as f64),
    ("vllm:spec_decode_num_accepted_tokens_total", COUNTER, "The third", |s| s.accepted_tokens as f64),
    ("vllm:num_requests_running", GAUGE, "Sequences in the batch", |s| s.running as f64),
    ("vllm:num_requests_waiting", GAUGE, "Requests waiting for admission", |s| s.waiting as f64),
    ("vllm:kv_cache_usage_perc", GAUGE, "Share of KV blocks in use, 0 to 1", kv_usage),
    ("vllm:gpu_cache_usage_perc", GAUGE, "The same under its older name", kv_usage),
    ("vllm:prompt_tokens_total", COUNTER, "Prompt tokens computed", |s| s.prompt_tokens as f64),
    ("vllm:generation_tokens_total", COUNTER, "Tokens generated", |s| s.generated_tokens as f64),
];

fn kv_usage(stats: &EngineStats) -> f64 {
    stats.kv_blocks_used as f64 / stats.kv_blocks_total.max(1) as f64
}

/// Appends all figures of a model of this name, which is escaped.
pub(super) fn write(out: &mut String, model: &str, stats: &EngineStats) {
    for (name, kind, help, read) in FIGURES {
        let value = read(stats);
        // Writing into a string cannot fail.
        let _ = writeln!(
            out,
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{{model_name=\"{model}\"}} {value}"
        );
    }
}
