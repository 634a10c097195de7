//! Text → text and calls, as it comes.

use super::call::{CallScanner, Step};
use super::{Open, Syntax};

/// What was found, in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Found {
    /// Words for the user.
    Text(String),
    /// A call of this function begins.
    Call(String),
    /// More of its arguments.
    Arguments(String),
}

/// Reads one answer. However the text is cut into pieces, what is found adds up to the same.
pub(crate) struct Reader {
    syntax: &'static Syntax,
    at: At,
    /// Text that may be the beginning of a mark, or white space that a call may follow.
    held: String,
    /// Everything since the mark, to be given back as text if it turns out to be no call.
    raw: String,
    calls: usize,
    found: Vec<Found>,
}

enum At {
    /// Nothing but white space so far; only where calls stand at the beginning.
    Start,
    Text,
    /// Before a call: white space, list brackets and separators.
    BeforeCall,
    Call(Box<CallScanner>),
    /// Behind a call, before its closing mark.
    Closing,
}

impl Reader {
    pub(crate) fn new(syntax: &'static Syntax) -> Self {
        let at = match syntax.open {
            Open::Mark(_) => At::Text,
            Open::Start(_) => At::Start,
        };
        Self { syntax, at, held: String::new(), raw: String::new(), calls: 0, found: Vec::new() }
    }

    /// Calls begun so far.
    pub(crate) fn calls(&self) -> usize {
        self.calls
    }

    /// Takes a piece.
    pub(crate) fn push(&mut self, piece: &str) -> Vec<Found> {
        for c in piece.chars() {
            self.character(c);
        }
        self.take()
    }

    /// Nothing more comes.
    pub(crate) fn finish(&mut self) -> Vec<Found> {
        match self.at {
            At::Call(_) | At::BeforeCall if self.raw_is_no_call() => self.give_back(),
            At::Start | At::Text if self.calls == 0 => {
                let held = std::mem::take(&mut self.held);
                self.text(&held);
            }
            At::Text => {
                let held = std::mem::take(&mut self.held);
                self.text(held.trim_end());
            }
            _ => {}
        }
        self.take()
    }

    fn take(&mut self) -> Vec<Found> {
        std::mem::take(&mut self.found)
    }

    /// Whether what came since the mark was not told as a call.
    fn raw_is_no_call(&self) -> bool {
        !self.raw.trim().is_empty()
    }

    fn character(&mut self, c: char) {
        match &mut self.at {
            At::Start => self.start(c),
            At::Text => self.text_character(c),
            At::BeforeCall => self.before_call(c),
            At::Call(_) => self.call(c),
            At::Closing => self.closing(c),
        }
    }

    fn start(&mut self, c: char) {
        self.held.push(c);
        let Open::Start(tag) = self.syntax.open else { return };
        let begun = self.held.trim_start();
        if begun.is_empty() || (tag.starts_with(begun) && begun != tag) {
            return;
        }
        if begun == tag {
            self.raw = std::mem::take(&mut self.held);
            self.at = At::BeforeCall;
        } else if c == '{' && begun == "{" {
            self.held.clear();
            self.at = At::BeforeCall;
            self.before_call(c);
        } else {
            self.at = At::Text;
        }
    }

    fn text_character(&mut self, c: char) {
        self.held.push(c);
        let Open::Mark(mark) = self.syntax.open else {
            let held = std::mem::take(&mut self.held);
            return self.text(&held);
        };
        if let Some(before) = self.held.strip_suffix(mark) {
            let before = before.trim_end().to_owned();
            self.held.clear();
            self.text(&before);
            self.raw = mark.to_owned();
            self.at = At::BeforeCall;
            return;
        }
        // What may be the beginning of the mark stays, and white space before it.
        let ends = mark.char_indices().map(|(i, _)| i).rev();
        let open = ends.filter(|&i| i > 0).find(|&i| self.held.ends_with(&mark[..i])).unwrap_or(0);
        let shown = self.held[..self.held.len() - open].trim_end().len();
        let rest = self.held.split_off(shown);
        let shown = std::mem::replace(&mut self.held, rest);
        self.text(&shown);
    }

    fn text(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        match self.found.last_mut() {
            Some(Found::Text(last)) => last.push_str(text),
            _ => self.found.push(Found::Text(text.to_owned())),
        }
    }

    fn before_call(&mut self, c: char) {
        self.raw.push(c);
        match c {
            '{' => {
                self.at = At::Call(Box::new(CallScanner::new(self.syntax.arguments)));
                self.scan(c);
            }
            '[' | ',' | ';' => {}
            // A list is over; a further one has its own mark.
            ']' if self.calls > 0 => self.text_again(),
            c if c.is_whitespace() => {}
            _ => self.give_back(),
        }
    }

    fn text_again(&mut self) {
        self.raw.clear();
        self.at = At::Text;
    }

    fn give_back(&mut self) {
        let raw = std::mem::take(&mut self.raw);
        self.text(&raw);
        self.at = At::Text;
    }

    fn call(&mut self, c: char) {
        self.raw.push(c);
        self.scan(c);
    }

    fn scan(&mut self, c: char) {
        let At::Call(scanner) = &mut self.at else { return };
        match scanner.push(c) {
            Step::Nothing => {}
            Step::Name(name) => {
                let early = scanner.take_early();
                self.raw.clear();
                self.calls += 1;
                self.found.push(Found::Call(name));
                self.arguments(early);
            }
            Step::Arguments(text) => {
                self.raw.clear();
                self.arguments(text);
            }
            Step::Done => {
                let missing = scanner.missing_arguments().unwrap_or_default().to_owned();
                self.arguments(missing);
                self.raw.clear();
                self.at = if self.syntax.close.is_some() { At::Closing } else { At::BeforeCall };
            }
            Step::Bad => self.give_back(),
        }
    }

    fn arguments(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        match self.found.last_mut() {
            Some(Found::Arguments(last)) => last.push_str(&text),
            _ => self.found.push(Found::Arguments(text)),
        }
    }

    fn closing(&mut self, c: char) {
        self.raw.push(c);
        let close = self.syntax.close.unwrap_or_default();
        let begun = self.raw.trim_start();
        if begun == close {
            self.text_again();
        } else if !close.starts_with(begun) {
            self.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::syntax;

    /// What is found in `text`, pieces put together, whatever its cut.
    fn check(name: &str, text: &str, expected: &[Found]) {
        let chars: Vec<char> = text.chars().collect();
        for size in [1, 2, 3, 5, 7, 1000] {
            let mut reader = Reader::new(syntax(Some(name), None).unwrap());
            let mut found: Vec<Found> = Vec::new();
            let pieces = chars.chunks(size).map(|piece| piece.iter().collect::<String>());
            let mut all: Vec<Found> = pieces.flat_map(|piece| reader.push(&piece)).collect();
            all.extend(reader.finish());
            for next in all {
                match (found.last_mut(), next) {
                    (Some(Found::Text(a)), Found::Text(b))
                    | (Some(Found::Arguments(a)), Found::Arguments(b)) => a.push_str(&b),
                    (_, next) => found.push(next),
                }
            }
            assert_eq!(found, expected, "{name}: {text:?} in pieces of {size}");
        }
    }

    fn text(text: &str) -> Found {
        Found::Text(text.into())
    }

    fn call(name: &str, arguments: &str) -> [Found; 2] {
        [Found::Call(name.into()), Found::Arguments(arguments.into())]
    }

    #[test]
    fn calls_are_read_out_of_text() {
        let f = call("f", r#"{"x": "a}\"{", "y": [1, {}]}"#);
        let g = call("g", "{}");
        let both = [f.clone(), g.clone()].concat();
        let hermes = r#"<tool_call>
{"name": "f", "arguments": {"x": "a}\"{", "y": [1, {}]}}
</tool_call>"#;
        check("hermes", hermes, &f);
        check("hermes", &format!("{hermes}\n<tool_call>{{\"name\":\"g\"}}</tool_call>\n"), &both);
        check("hermes", &format!("I  look.\n\n{hermes}"), &[&[text("I  look.")][..], &f].concat());
        check("hermes", &format!("{hermes}\n so"), &[&f[..], &[text("\n so")]].concat());
        let mistral = r#"[TOOL_CALLS][{"name": "f", "arguments": {"x": "a}\"{", "y": [1, {}]}}, {"name": "g", "arguments": {}}]"#;
        check("mistral", mistral, &both);
        let llama = r#"{"name": "f", "parameters": {"x": "a}\"{", "y": [1, {}]}}"#;
        check("llama3_json", llama, &f);
        check("llama3_json", &format!("<|python_tag|>{llama}; {{\"name\": \"g\"}}"), &both);
    }

    #[test]
    fn keys_come_in_any_order_and_arguments_as_text_too() {
        let expected = call("f", r#"{"x": 1}"#);
        for inner in [
            r#"{"arguments": {"x": 1}, "name": "f"}"#,
            r#"{"id": [1, "}"], "name": "f", "type": null, "arguments": {"x": 1}}"#,
            r#"{"name": "f", "arguments": "{\"x\": 1}"}"#,
            r#"{ "name" : "f" , "n": 5, "arguments" : {"x": 1} }"#,
        ] {
            check("hermes", &format!("<tool_call>{inner}</tool_call>"), &expected);
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for (name, words) in [
            ("hermes", "no call at all\n"),
            ("hermes", "a < b <tool"),
            ("hermes", "<tool_call>not JSON</tool_call>"),
            ("hermes", "<tool_call>\n{\"arguments\": {}}\n</tool_call>"),
            ("hermes", "<tool_call>{\"name\": 5}</tool_call>"),
            ("hermes", "<tool_call>{\"name\"</tool_call>"),
            ("hermes", "<tool_call>"),
            ("llama3_json", "Paris is the {capital}."),
            ("llama3_json", "{\"city\": \"Paris\"}"),
            ("llama3_json", "{\"name\""),
            ("mistral", "[TOOL_CALLS]nonsense"),
            ("mistral", "[TOOL"),
        ] {
            check(name, words, &[text(words)]);
        }
    }

    #[test]
    fn a_call_cut_off_keeps_what_there_was() {
        check("hermes", "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": ", &call("f", "{\"x\": "));
    }
}
