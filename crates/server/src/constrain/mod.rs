//! Output that must conform to a format: JSON, a JSON schema, a regular expression, a grammar, one of some texts.
//!
//! - [`format`]: the formats, and how requests name them.
//! - here: [`Grammars`], which compiles formats for a vocabulary with `llguidance`.
//!
//! The matcher looks at the tokens of its own sequence alone, and its limits count work, not time: constrained output
//! is as independent of the batch as any other.

pub(crate) mod format;

use crate::error::ApiError;
use crate::state::Service;
use format::Format;
use hearth_data::Tokenizer;
use hearth_engine::api::{Constraint, ConstraintSource, Grammar};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use std::sync::{Arc, Mutex, PoisonError};

/// How the message of an engine begins when a grammar is at fault, not the server.
pub(crate) const AT_FAULT: &str = "the output format cannot be followed";
/// Longest source of a grammar, in bytes. A compiler's work is bounded too, but more loosely.
const LONGEST_SOURCE: usize = 256 << 10;

/// Compiles formats for one vocabulary.
pub(crate) struct Grammars(ParserFactory);

impl Grammars {
    /// For a model that has a tokenizer and a token to end with.
    ///
    /// # Errors
    /// 400 where it has not.
    pub(crate) fn new(service: &Service) -> Result<Self, ApiError> {
        let tokenizer = service.text_tokenizer()?;
        let Some(&eos) = service.eos_tokens.first() else {
            return Err(ApiError::field(
                "response_format",
                "this model has no end-of-sequence token; constrained output needs one",
            ));
        };
        let words = words(tokenizer, service.engine.vocab_size());
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos), &words);
        let trie = trie.with_eos_tokens(&service.eos_tokens);
        // Not canonical: the model chooses how to spell what is forced, as it would anywhere else.
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment)
            .map_err(|e| ApiError::internal(format!("the vocabulary cannot be used for grammars: {e}")))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self(factory))
    }

    /// A grammar for a format.
    ///
    /// # Errors
    /// 400 that names `field` and says what is wrong with the format.
    pub(crate) fn compile(&self, format: &Format, field: &str) -> Result<Grammar, ApiError> {
        let refuse = |what: String| {
            let what: String = what.chars().take(300).collect();
            ApiError::field(field, format!("{field:?} cannot be used: {what}"))
        };
        let source = format.source();
        if source.len() > LONGEST_SOURCE {
            return Err(refuse(format!(
                "it has {} bytes, at most {LONGEST_SOURCE} are allowed",
                source.len()
            )));
        }
        let grammar = match format {
            Format::Schema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
            Format::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Format::Lark(_) | Format::Choice(_) => TopLevelGrammar::from_lark(source),
        };
        let parser = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.0.create_parser(grammar)
        }));
        let mut matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(refuse(one_line(&error)));
        }
        // Nothing of the vocabulary may fit: known now rather than by the first token.
        let mask = matcher.compute_mask().map_err(|e| refuse(one_line(&e.to_string())))?;
        if mask.is_zero() {
            return Err(refuse("no token of the vocabulary can begin it".into()));
        }
        Ok(Grammar::new(Source { matcher: Mutex::new(matcher) }))
    }
}

/// Without line breaks, and without the backtrace that a caught panic carries.
fn one_line(text: &str) -> String {
    let text = text.split("<backtrace>").next().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What each token adds to the text; control tokens carry the marker that sets them apart from text that looks like
/// them.
fn words(tokenizer: &Tokenizer, vocab_size: usize) -> Vec<Vec<u8>> {
    let word = |id: u32| match tokenizer.is_special(id) {
        true => {
            let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
            word.extend(tokenizer.token(id).unwrap_or_default().into_bytes());
            word
        }
        false => tokenizer.token_bytes(id).to_vec(),
    };
    (0..vocab_size as u32).map(word).collect()
}

struct Source {
    matcher: Mutex<Matcher>,
}

impl ConstraintSource for Source {
    fn begin(&self) -> Result<Box<dyn Constraint>, String> {
        // Deep: matchers that shared a cache would spend each other's allowance of work.
        let matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Ok(Box::new(Matching(matcher)))
    }
}

struct Matching(Matcher);

impl Constraint for Matching {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self.0.compute_mask_or_eos().map_err(at_fault)?;
        if mask.is_zero() {
            return Err(format!("{AT_FAULT}: no token of the vocabulary can come next"));
        }
        for (token, logit) in logits.iter_mut().enumerate() {
            // The model's matrix may have more rows than the tokenizer has tokens.
            if token >= mask.len() || !mask.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn advance(&mut self, token: u32) -> Result<bool, String> {
        self.0.consume_token(token).map_err(at_fault)?;
        Ok(self.0.is_stopped())
    }
}

fn at_fault(error: impl std::fmt::Display) -> String {
    let error: String = one_line(&error.to_string()).chars().take(300).collect();
    format!("{AT_FAULT}: {error}")
}
