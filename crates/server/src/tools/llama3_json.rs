//! Llama 3.1 and later: the whole answer is `{"name": …, "parameters": …}`, or several with `;` between.

use super::{Forced, Open, Syntax, call_id};

pub(super) const SYNTAX: Syntax = Syntax {
    name: "llama3_json",
    template_marks: &["\"parameters\"", "python"],
    open: Open::Start("<|python_tag|>"),
    close: None,
    arguments: "parameters",
    forced,
    id: call_id,
};

fn forced(forced: &Forced) -> String {
    let calls = forced.repeated("call", "\"; \" call");
    format!("start: {calls}\n{}", forced.call_rules("parameters"))
}
