//! Exit codes: 0 done, 1 failed, 2 wrong usage or environment, 75 try again.

use crate::recipe::RecipeError;
use std::io::Write;

/// The caller asked for something that cannot be, or the machine lacks something: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Starting again from the last checkpoint may succeed: exit code 75.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TryAgain(pub String);

/// All ranks failed together and rank 0 has said why: nothing is left but to end.
#[derive(Debug, thiserror::Error)]
#[error("rank 0 said why")]
pub struct Said {
    /// The exit code of every rank.
    pub code: u8,
}

/// A [`Usage`] error with this sentence.
pub fn usage(sentence: impl Into<String>) -> anyhow::Error {
    Usage(sentence.into()).into()
}

/// The process's exit code for an error.
pub fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of).unwrap_or(1)
}

/// The exit code that one cause asks for, if it does.
fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(said) = cause.downcast_ref::<Said>() {
        return Some(said.code);
    }
    if cause.is::<TryAgain>() {
        return Some(75);
    }
    if cause.is::<Usage>() || cause.is::<RecipeError>() {
        return Some(2);
    }
    if let Some(hearth_train::Error::Lost { .. }) = cause.downcast_ref() {
        return Some(75);
    }
    let collective = match cause.downcast_ref() {
        Some(hearth_train::Error::Collective(error)) => error,
        _ => cause.downcast_ref()?,
    };
    u8::try_from(collective.exit_code()).ok()
}

/// One line on stderr; if that is closed, so be it.
pub fn say(sentence: &str) {
    let _ = writeln!(std::io::stderr(), "hearth: {sentence}");
}

/// The error and its causes in one line. A cause that its effect already quotes is not said twice.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let words = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if text.contains(&words) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&words);
    }
    text
}

/// What the command-line parser says over several lines, as one sentence with the place to read more.
pub fn usage_sentence(text: &str) -> String {
    let (what, rest) = text.split_once("Usage:").unwrap_or((text, ""));
    let words: Vec<&str> = what.split_whitespace().filter(|word| *word != "error:").collect();
    let words =
        words.join(" ").replace(" For more information, try '--help'.", "").replace(" tip:", "; tip:");
    // "Usage: hearth train [OPTIONS] <RECIPE>" names the command whose help is meant.
    let command: Vec<&str> = rest
        .split_whitespace()
        .take_while(|word| word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-'))
        .collect();
    let command = if command.is_empty() { "hearth".to_owned() } else { command.join(" ") };
    format!("{words}; see {command} --help")
}

/// Whether the error is only that nobody reads our output any more.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>()).any(broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn the_kind_of_an_error_decides_the_exit_code() {
        assert_eq!(code(&anyhow!("broken")), 1);
        assert_eq!(code(&usage("no such flag")), 2);
        assert_eq!(code(&usage("inner").context("outer")), 2);
        assert_eq!(code(&anyhow::Error::from(TryAgain("later".into()))), 75);
    }

    #[test]
    fn a_wrong_command_line_is_one_sentence_with_the_place_to_read_more() {
        let text = "error: unexpected argument '--x' found\n\nUsage: hearth train [OPTIONS] <RECIPE>\n\nFor more …\n";
        assert_eq!(usage_sentence(text), "unexpected argument '--x' found; see hearth train --help");
        let text =
            "error: invalid value 'a' for '-n <N>': invalid digit\n\nFor more information, try '--help'.\n";
        assert_eq!(usage_sentence(text), "invalid value 'a' for '-n <N>': invalid digit; see hearth --help");
    }

    #[test]
    fn an_error_is_one_line_and_says_nothing_twice() {
        let error = Err::<(), _>(anyhow!("a\nb")).context("outer").expect_err("an error");
        assert_eq!(sentence(&error), "outer: a b");
        let error = Err::<(), _>(anyhow!("cause")).context("effect: cause").expect_err("an error");
        assert_eq!(sentence(&error), "effect: cause");
    }
}
