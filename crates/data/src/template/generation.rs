//! `{% generation %}` … `{% endgeneration %}`: the tags with which a template marks what the assistant says.
//!
//! minijinja has no custom tags, so the source is rewritten: for plain rendering the tags become an `if true`; for
//! marked rendering they also print two characters that are taken out again, leaving the ranges between them.

use super::Marked;

/// Private-use characters that no conversation is expected to hold; stray ones are dropped with the marks.
const OPEN: char = '\u{F8F0}';
const CLOSE: char = '\u{F8F1}';

/// A template source with its generation tags replaced.
pub(super) struct Replaced {
    pub(super) plain: String,
    pub(super) marked: String,
    pub(super) found: bool,
}

pub(super) fn replace(source: &str) -> Replaced {
    let mut out = Replaced { plain: String::new(), marked: String::new(), found: false };
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (text, tag_on) = rest.split_at(start);
        out.push(text);
        let Some(end) = tag_on.find("%}") else {
            out.push(tag_on);
            return out;
        };
        let (tag, after) = tag_on.split_at(end + 2);
        out.push_tag(tag);
        rest = after;
    }
    out.push(rest);
    out
}

impl Replaced {
    fn push(&mut self, text: &str) {
        self.plain.push_str(text);
        self.marked.push_str(text);
    }

    fn push_tag(&mut self, tag: &str) {
        let body = &tag[2..tag.len() - 2];
        let left = body.chars().next().filter(|c| "-+".contains(*c)).map(String::from).unwrap_or_default();
        let right = body.chars().last().filter(|c| "-+".contains(*c)).map(String::from).unwrap_or_default();
        match body.trim_matches(['-', '+']).trim() {
            "generation" => {
                self.found = true;
                self.plain.push_str(&format!("{{%{left} if true {right}%}}"));
                // The outer tag keeps the whitespace rule of the left side, the inner one that of the right side.
                self.marked
                    .push_str(&format!("{{%{left} if true %}}{{{{ '{OPEN}' }}}}{{% if true {right}%}}"));
            }
            "endgeneration" => {
                self.plain.push_str(&format!("{{%{left} endif {right}%}}"));
                self.marked.push_str(&format!("{{%{left} endif %}}{{{{ '{CLOSE}' }}}}{{% endif {right}%}}"));
            }
            _ => self.push(tag),
        }
    }
}

/// Takes the marks out and returns the ranges between them.
pub(super) fn unmark(text: &str) -> Marked {
    let mut out = Marked { text: String::with_capacity(text.len()), assistant: Vec::new() };
    let mut open = None;
    for c in text.chars() {
        match c {
            OPEN => open = open.or(Some(out.text.len())),
            CLOSE => {
                if let Some(start) = open.take().filter(|&start| start < out.text.len()) {
                    out.assistant.push(start..out.text.len());
                }
            }
            _ => out.text.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_keep_their_whitespace_rules() {
        let replaced = replace("a {%- generation -%} b {% endgeneration +%}c{% if x %}");
        assert!(replaced.found);
        assert_eq!(replaced.plain, "a {%- if true -%} b {% endif +%}c{% if x %}");
    }

    #[test]
    fn an_unclosed_tag_is_left_for_the_parser_to_name() {
        assert_eq!(replace("x {% generation").plain, "x {% generation");
    }

    #[test]
    fn marks_become_ranges() {
        let marked = unmark(&format!("ab{OPEN}cd{CLOSE}é{OPEN}{CLOSE}{OPEN}f{CLOSE}"));
        assert_eq!(marked.text, "abcdéf");
        assert_eq!(marked.assistant, vec![2..4, 6..7]);
    }
}
