//! Mistral: `[TOOL_CALLS]` and a list of `{"name": …, "arguments": …}`.

use super::{Forced, Open, Syntax};

pub(super) const SYNTAX: Syntax = Syntax {
    name: "mistral",
    template_marks: &["[TOOL_CALLS]"],
    open: Open::Mark("[TOOL_CALLS]"),
    close: None,
    arguments: "arguments",
    forced,
    id: short_id,
};

fn forced(forced: &Forced) -> String {
    let open = forced.mark("[TOOL_CALLS]");
    let calls = forced.repeated("call", "\", \" call");
    format!("start: {open} \"[\" {calls} \"]\"\n{}", forced.call_rules("arguments"))
}

/// Mistral's templates refuse ids that are not nine letters or digits.
fn short_id() -> String {
    crate::request_id::fresh("")[..9].to_owned()
}
