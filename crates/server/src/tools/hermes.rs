//! Hermes and Qwen: `<tool_call>\n{"name": …, "arguments": …}\n</tool_call>`, any number, text before and between.

use super::{Forced, Open, Syntax, call_id};

pub(super) const SYNTAX: Syntax = Syntax {
    name: "hermes",
    template_marks: &["<tool_call>"],
    open: Open::Mark("<tool_call>"),
    close: Some("</tool_call>"),
    arguments: "arguments",
    forced,
    id: call_id,
};

fn forced(forced: &Forced) -> String {
    let (open, close) = (forced.mark("<tool_call>"), forced.mark("</tool_call>"));
    let calls = forced.repeated("marked", "\"\\n\" marked");
    let call = forced.call_rules("arguments");
    format!("start: {calls}\nmarked: {open} \"\\n\" call \"\\n\" {close}\n{call}")
}
