//! `POST /v1/embeddings`.

use super::fields::{Fields, describe};
use super::prompt::{self, Prompt};
use crate::error::ApiError;
use hearth_engine::api::Pooling;

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EmbeddingsRequest {
    pub(crate) model: Option<String>,
    pub(crate) inputs: Vec<Prompt>,
    pub(crate) encoding: Encoding,
    /// Leading components that are kept; `None` = all.
    pub(crate) dimensions: Option<usize>,
    pub(crate) pooling: Pooling,
    /// Make every vector one of length 1.
    pub(crate) normalize: bool,
    /// Add BOS and EOS to texts where the tokenizer asks for them. Never to token ids.
    pub(crate) add_special_tokens: bool,
}

/// How a vector is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// A list of numbers.
    Float,
    /// Base64 of little-endian f32.
    Base64,
}

/// Parses a body; the model's vectors have `hidden_size` components.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn parse(
    body: &[u8],
    vocab_size: usize,
    hidden_size: usize,
) -> Result<EmbeddingsRequest, ApiError> {
    let mut fields = Fields::parse(body)?;
    Ok(EmbeddingsRequest {
        model: fields.string("model")?,
        inputs: prompt::take(&mut fields, "input", vocab_size)?,
        encoding: choice(
            &mut fields,
            "encoding_format",
            &[("float", Encoding::Float), ("base64", Encoding::Base64)],
        )?,
        dimensions: fields.integer("dimensions", 1..=hidden_size as i64)?.map(|d| d as usize),
        pooling: choice(&mut fields, "pooling", &[("mean", Pooling::Mean), ("last", Pooling::Last)])?,
        normalize: fields.boolean("normalize")?.unwrap_or(true),
        add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
    })
}

/// One of a few words; the first when nothing is said.
fn choice<T: Copy>(fields: &mut Fields, name: &str, choices: &[(&str, T)]) -> Result<T, ApiError> {
    let Some(value) = fields.take(name) else { return Ok(choices[0].1) };
    let found = choices.iter().find(|(word, _)| value.as_str() == Some(word));
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<String> = choices.iter().map(|(word, _)| format!("{word:?}")).collect();
        fields.refuse(name, format!("{name:?} must be {}, not {}", words.join(" or "), describe(&value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn inputs_come_in_four_forms() {
        for (input, count) in
            [(json!("a"), 1), (json!(["a", "b"]), 2), (json!([1, 2]), 1), (json!([[1], [2, 3]]), 2)]
        {
            let body = json!({"input": input}).to_string();
            let request = parse(body.as_bytes(), 320, 64).unwrap_or_else(|e| panic!("{body}: {e}"));
            assert_eq!(request.inputs.len(), count, "{body}");
            assert_eq!((request.encoding, request.pooling), (Encoding::Float, Pooling::Mean));
        }
    }

    #[test]
    fn wrong_requests_are_refused_with_the_field_named() {
        for (body, param, words) in [
            (json!({}), "input", "missing"),
            (json!({"prompt": "x"}), "input", "missing"),
            (json!({"input": []}), "input", "empty"),
            (json!({"input": {}}), "input", "an object"),
            (json!({"input": [[320]]}), "input", "token id 320"),
            (json!({"input": [1.5]}), "input", "1.5"),
            (json!({"input": "x", "encoding_format": "hex"}), "encoding_format", "\"float\" or \"base64\""),
            (json!({"input": "x", "encoding_format": 1}), "encoding_format", "1"),
            (json!({"input": "x", "dimensions": 0}), "dimensions", "from 1 to 64"),
            (json!({"input": "x", "dimensions": 65}), "dimensions", "from 1 to 64"),
            (json!({"input": "x", "pooling": "max"}), "pooling", "\"mean\" or \"last\""),
            (json!({"input": "x", "normalize": 1}), "normalize", "a boolean"),
        ] {
            let error = parse(body.to_string().as_bytes(), 320, 64).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
            assert!(error.message.contains(words), "{body}: {error}");
        }
    }
}
