//! `POST /v1/completions`.

use super::fields::Fields;
use super::options::Options;
use super::prompt::{self, Prompt};
use crate::error::ApiError;

/// Most alternatives per position.
pub(crate) const MOST_LOGPROBS: usize = 20;
/// Tokens generated when the request does not say.
pub(crate) const DEFAULT_MAX_TOKENS: usize = 16;

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CompletionRequest {
    pub(crate) model: Option<String>,
    pub(crate) prompts: Vec<Prompt>,
    /// `None` = [`DEFAULT_MAX_TOKENS`], or fewer where they would not fit.
    pub(crate) max_tokens: Option<usize>,
    /// Begin the text with the prompt.
    pub(crate) echo: bool,
    /// Alternatives per position.
    pub(crate) logprobs: Option<usize>,
    /// Add BOS to text prompts where the tokenizer asks for it. Never to token ids.
    pub(crate) add_special_tokens: bool,
    pub(crate) options: Options,
}

/// Parses a body.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn parse(body: &[u8], vocab_size: usize) -> Result<CompletionRequest, ApiError> {
    let mut fields = Fields::parse(body)?;
    refuse_unsupported(&mut fields)?;
    Ok(CompletionRequest {
        model: fields.string("model")?,
        prompts: prompt::take(&mut fields, vocab_size)?,
        max_tokens: fields.count("max_tokens", usize::MAX)?,
        echo: fields.boolean("echo")?.unwrap_or(false),
        logprobs: fields.count("logprobs", MOST_LOGPROBS)?,
        add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
        options: Options::take(&mut fields, vocab_size)?,
    })
}

fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(fields.refuse("suffix", "\"suffix\" (text after the completion) is not supported"));
    }
    if fields.integer("best_of", 1..=i64::MAX)?.is_some_and(|best_of| best_of > 1) {
        return Err(fields.refuse("best_of", "\"best_of\" above 1 is not supported; use \"n\""));
    }
    super::options::refuse_response_format(fields)
}
