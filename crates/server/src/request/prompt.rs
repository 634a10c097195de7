//! Prompts: text, a list of texts, token ids, or a list of lists of token ids.

use super::fields::{Fields, as_token, describe};
use crate::error::ApiError;
use crate::state::Service;
use hearth_data::Tokenizer;
use hearth_engine::api::SubmitError;
use serde_json::Value;

/// One prompt as the client wrote it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    /// Still to be tokenized.
    Text(String),
    /// Below the vocabulary size.
    Tokens(Vec<u32>),
}

const EXPECTED: &str = "a string, a list of strings, a list of token ids or a list of lists of token ids";

/// Takes `prompt`, or `input` as embeddings call it, out of a request.
pub(crate) fn take(fields: &mut Fields, name: &str, vocab_size: usize) -> Result<Vec<Prompt>, ApiError> {
    match fields.take(name) {
        None => Err(fields.refuse(name, format!("{name:?} is missing; it must be {EXPECTED}"))),
        Some(Value::String(text)) => Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(list)) => from_list(fields, name, list, vocab_size),
        Some(other) => Err(fields.wrong(name, EXPECTED, &other)),
    }
}

fn from_list(
    fields: &Fields,
    name: &str,
    list: Vec<Value>,
    vocab_size: usize,
) -> Result<Vec<Prompt>, ApiError> {
    let ids = |list: &[Value]| tokens(list, vocab_size).map_err(|error| error.about(name));
    match list.first() {
        None => Err(fields.refuse(name, format!("{name:?} is an empty list"))),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(ids(&list)?)]),
        Some(_) => list
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(list) => Ok(Prompt::Tokens(ids(&list)?)),
                other => Err(fields.wrong(name, EXPECTED, &other)),
            })
            .collect(),
    }
}

/// Token ids, each below the vocabulary size: clients send ids of other models' tokenizers.
pub(crate) fn tokens(list: &[Value], vocab: usize) -> Result<Vec<u32>, ApiError> {
    let mut ids = Vec::with_capacity(list.len());
    for (position, value) in list.iter().enumerate() {
        let id = as_token(value).ok_or_else(|| {
            let message =
                format!("the item at position {position} must be a token id, not {}", describe(value));
            ApiError::field("prompt", message)
        })?;
        if id as usize >= vocab {
            return Err(SubmitError::TokenOutOfRange { id, position, vocab }.into());
        }
        ids.push(id);
    }
    Ok(ids)
}

impl Prompt {
    /// Its token ids.
    ///
    /// # Errors
    /// 400 for text when there is no tokenizer, or text it cannot take.
    pub(crate) fn ids(&self, service: &Service, add_special: bool) -> Result<Vec<u32>, ApiError> {
        match self {
            Self::Tokens(ids) => Ok(ids.clone()),
            Self::Text(text) => encode(service.text_tokenizer()?, text, add_special),
        }
    }

    /// The text, where the client gave text.
    pub(crate) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Tokens(_) => None,
        }
    }
}

/// Ids of a text from a client.
pub(crate) fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
    tokenizer.encode(text, add_special).map_err(|error| ApiError::field("prompt", error.to_string()))
}

impl Service {
    /// The tokenizer.
    ///
    /// # Errors
    /// 400 when the model has none.
    pub(crate) fn text_tokenizer(&self) -> Result<&Tokenizer, ApiError> {
        self.tokenizer
            .as_ref()
            .ok_or_else(|| ApiError::field("prompt", "this model has no tokenizer: send token ids, not text"))
    }
}

/// How many tokens to generate after a prompt of `prompt` tokens: what was `asked` for, or `default` where that fits.
///
/// # Errors
/// [`SubmitError::EmptyPrompt`], [`SubmitError::TooLong`].
pub(crate) fn budget(
    prompt: usize,
    asked: Option<usize>,
    default: usize,
    limit: usize,
) -> Result<usize, SubmitError> {
    if prompt == 0 {
        return Err(SubmitError::EmptyPrompt);
    }
    // Without a word about it at least one token is expected.
    let max_tokens = asked.unwrap_or_else(|| default.min(limit.saturating_sub(prompt)).max(1));
    match prompt.checked_add(max_tokens).is_some_and(|all| all <= limit) {
        true => Ok(max_tokens),
        false => Err(SubmitError::TooLong { prompt, max_tokens, limit }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_fits_the_context() {
        let too_long = |prompt, max_tokens| Err(SubmitError::TooLong { prompt, max_tokens, limit: 100 });
        for (prompt, asked, expected) in [
            (0, Some(5), Err(SubmitError::EmptyPrompt)),
            (10, None, Ok(16)),
            (90, None, Ok(10)),
            (100, None, too_long(100, 1)),
            (100, Some(0), Ok(0)),
            (90, Some(10), Ok(10)),
            (90, Some(11), too_long(90, 11)),
            (101, Some(0), too_long(101, 0)),
            (1, Some(usize::MAX), too_long(1, usize::MAX)),
        ] {
            assert_eq!(budget(prompt, asked, 16, 100), expected, "{prompt} {asked:?}");
        }
    }
}
