//! `POST /tokenize` and `POST /detokenize`.

use super::chat::{self, Conversation};
use super::fields::Fields;
use super::prompt::tokens;
use crate::error::ApiError;

/// What to tokenize.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TokenizeInput {
    /// A text, with or without the tokens that the tokenizer adds.
    Prompt { text: String, add_special_tokens: bool },
    /// A conversation, through the chat template.
    Conversation(Conversation),
}

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenizeRequest {
    pub(crate) input: TokenizeInput,
    pub(crate) return_token_strs: bool,
}

/// Parses the body of `/tokenize`.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn parse(body: &[u8]) -> Result<TokenizeRequest, ApiError> {
    let mut fields = Fields::parse(body)?;
    let return_token_strs = fields.boolean("return_token_strs")?.unwrap_or(false);
    let input = match fields.string("prompt")? {
        Some(text) => {
            let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
            TokenizeInput::Prompt { text, add_special_tokens }
        }
        None if fields.has("messages") => TokenizeInput::Conversation(chat::conversation(&mut fields)?),
        None => return Err(fields.refuse("prompt", "\"prompt\" or \"messages\" is missing")),
    };
    Ok(TokenizeRequest { input, return_token_strs })
}

/// Parses the body of `/detokenize`.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn parse_detokenize(body: &[u8], vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    let mut fields = Fields::parse(body)?;
    let list = fields
        .list("tokens")?
        .ok_or_else(|| fields.refuse("tokens", "\"tokens\" is missing; it must be a list of token ids"))?;
    tokens(&list, vocab_size).map_err(|error| error.about("tokens"))
}
