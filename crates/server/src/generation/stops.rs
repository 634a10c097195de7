//! Finds stop strings in text that comes in pieces.

/// Lets text through up to the first stop string, and holds back an end that might be the beginning of one.
#[derive(Debug)]
pub(super) struct StopMatcher {
    stops: Vec<String>,
    /// The stop string is let through too.
    include: bool,
    /// The longest end of the text so far that may still become a stop string.
    held: String,
}

/// What became of a piece of text.
#[derive(Debug, PartialEq)]
pub(super) struct Passed {
    /// Text that can be shown.
    pub(super) text: String,
    /// A stop string followed it.
    pub(super) stopped: bool,
}

impl StopMatcher {
    pub(super) fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// Takes the next piece.
    pub(super) fn push(&mut self, piece: &str) -> Passed {
        if self.stops.is_empty() {
            return Passed { text: piece.to_owned(), stopped: false };
        }
        self.held.push_str(piece);
        let found = |stop: &String| self.held.find(stop.as_str()).map(|start| (start, start + stop.len()));
        if let Some((start, end)) = self.stops.iter().filter_map(found).min() {
            self.held.truncate(if self.include { end } else { start });
            return Passed { text: std::mem::take(&mut self.held), stopped: true };
        }
        let rest = self.held.split_off(self.held.len() - self.open_end());
        Passed { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Nothing more comes: what was held back is text after all.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of `held` with which a stop string begins.
    fn open_end(&self) -> usize {
        let longest = |stop: &String| {
            let ends = stop.char_indices().map(|(i, _)| i).filter(|&i| i > 0 && i <= self.held.len());
            ends.rev().find(|&i| self.held.as_bytes().ends_with(&stop.as_bytes()[..i])).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `pieces`; gives what was shown after each, then the rest, and whether a stop was met.
    fn check(stops: &[&str], pieces: &[&str], shown: &[&str], rest: &str, stopped: bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect(), false);
        let mut met = false;
        let mut out = Vec::new();
        for piece in pieces {
            let passed = matcher.push(piece);
            out.push(passed.text);
            met = passed.stopped;
            if met {
                break;
            }
        }
        assert_eq!(out, shown, "{stops:?} {pieces:?}");
        assert_eq!(met, stopped, "{stops:?} {pieces:?}");
        if !met {
            assert_eq!(matcher.finish(), rest, "{stops:?} {pieces:?}");
        }
    }

    #[test]
    fn text_is_shown_as_soon_as_it_cannot_be_a_stop_string() {
        check(&[], &["a", "b"], &["a", "b"], "", false);
        check(&["END"], &["xE", "N", "T"], &["x", "", "ENT"], "", false);
        check(&["END"], &["x E", "N"], &["x ", ""], "EN", false);
        check(&["\n\n"], &["a\n", "b\n"], &["a", "\nb"], "\n", false);
        check(&["aab"], &["aaa", "a"], &["a", "a"], "aa", false);
    }

    #[test]
    fn stop_strings_are_found_across_pieces_and_cut_off() {
        check(&["END"], &["xE", "N", "D tail"], &["x", "", ""], "", true);
        check(&["END"], &["all ENDEND"], &["all "], "", true);
        check(&["aab"], &["aa", "ab!"], &["", "a"], "", true);
        check(&["b", "abc"], &["xabc"], &["x"], "", true);
        check(&["né🙂"], &["un", "é", "🙂"], &["u", "", ""], "", true);
    }

    #[test]
    fn a_stop_string_may_stay() {
        let mut matcher = StopMatcher::new(vec!["END".into(), "END!".into()], true);
        assert_eq!(matcher.push("xE"), Passed { text: "x".into(), stopped: false });
        assert_eq!(matcher.push("ND! y"), Passed { text: "END".into(), stopped: true });
    }

    #[test]
    fn however_the_text_is_cut_the_result_is_the_same() {
        let text = "one two\n\nthree <|stop|> four ÿ";
        for stops in [vec!["\n\n"], vec!["<|stop|>", "four"], vec!["ÿ"], vec!["zzz", "<|stop"]] {
            let whole = {
                let mut m = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect(), false);
                let passed = m.push(text);
                passed.text + if passed.stopped { "" } else { m.held.as_str() }
            };
            for size in 1..6 {
                let mut m = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect(), false);
                let chars: Vec<char> = text.chars().collect();
                let mut out = String::new();
                let mut stopped = false;
                for piece in chars.chunks(size) {
                    let passed = m.push(&piece.iter().collect::<String>());
                    out.push_str(&passed.text);
                    stopped = passed.stopped;
                    if stopped {
                        break;
                    }
                }
                if !stopped {
                    out.push_str(&m.finish());
                }
                assert_eq!(out, whole, "{stops:?} in pieces of {size}");
            }
        }
    }
}
