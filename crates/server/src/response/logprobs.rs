//! Log-probabilities: parallel arrays in completions, a list of objects in chat, and vLLM's maps for prompts.

use crate::generation::ScoredToken;
use hearth_data::Tokenizer;
use hearth_engine::api::TokenLogprobs;
use serde_json::{Map, Value, json};

/// JSON has no infinity; a token that cannot come gets what other servers write.
const IMPOSSIBLE: f32 = -9999.0;

fn number(logprob: f32) -> Value {
    // `f32::max` gives the other operand for NaN.
    json!(logprob.max(IMPOSSIBLE))
}

/// The text of a token; its id where there is no tokenizer.
fn text(tokenizer: Option<&Tokenizer>, id: u32) -> String {
    match tokenizer {
        Some(tokenizer) => tokenizer.token_text(id),
        None => format!("token_id:{id}"),
    }
}

/// The arrays of the completions API, one entry per token. A token without a log-probability (the first of a prompt)
/// is `null` in both `token_logprobs` and `top_logprobs`.
pub(crate) fn legacy(tokenizer: Option<&Tokenizer>, tokens: &[ScoredToken]) -> Value {
    let top = |token: &ScoredToken| match &token.logprobs {
        None => Value::Null,
        Some(scored) => {
            let mut map = Map::new();
            let own = std::iter::once((scored.token, scored.logprob));
            for (id, logprob) in scored.top.iter().copied().chain(own) {
                // Two ids may have one text; the likelier comes first and stays, so that the largest value of the map
                // is the largest of all.
                map.entry(text(tokenizer, id)).or_insert_with(|| number(logprob));
            }
            Value::Object(map)
        }
    };
    json!({
        "tokens": tokens.iter().map(|t| text(tokenizer, t.id)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprobs.as_ref().map(|s| number(s.logprob))).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
    })
}

/// The object of the chat API.
pub(crate) fn chat(tokenizer: Option<&Tokenizer>, tokens: &[ScoredToken]) -> Value {
    let entry = |id: u32, logprob: f32| {
        json!({
            "token": text(tokenizer, id),
            "logprob": number(logprob),
            "bytes": tokenizer.map(|t| t.token_bytes(id)),
        })
    };
    let content: Vec<Value> = tokens
        .iter()
        .filter_map(|token| {
            let scored = token.logprobs.as_ref()?;
            let mut out = entry(token.id, scored.logprob);
            out["top_logprobs"] = scored.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
            Some(out)
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// vLLM's `prompt_logprobs`: per position a map from token id to figures, `null` for the first.
pub(crate) fn prompt(tokenizer: Option<&Tokenizer>, rows: &[Option<TokenLogprobs>]) -> Value {
    let entry = |id: u32, logprob: f32, rank: usize| {
        let figures = json!({"logprob": number(logprob), "rank": rank, "decoded_token": text(tokenizer, id)});
        (id.to_string(), figures)
    };
    let row = |scored: &TokenLogprobs| -> Map<String, Value> {
        let own = entry(scored.token, scored.logprob, scored.rank);
        let top = scored.top.iter().enumerate().map(|(i, &(id, logprob))| entry(id, logprob, i + 1));
        std::iter::once(own).chain(top).collect()
    };
    rows.iter().map(|scored| scored.as_ref().map(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(id: u32, logprob: f32, top: &[(u32, f32)]) -> ScoredToken {
        let rank = 1 + top.iter().filter(|(_, other)| *other > logprob).count();
        let logprobs = Some(TokenLogprobs { token: id, logprob, rank, top: top.to_vec() });
        ScoredToken { id, offset: 0, logprobs }
    }

    #[test]
    fn a_greedy_token_equals_the_largest_alternative_exactly() {
        let best = -0.123_456_79_f32;
        let json = legacy(None, &[scored(5, best, &[(5, best), (6, -2.0)])]).to_string();
        let read: Value = serde_json::from_str(&json).unwrap();
        let top = read["top_logprobs"][0].as_object().unwrap();
        let most = top.values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
        assert_eq!(read["token_logprobs"][0].as_f64(), Some(most));
        assert_eq!(top.len(), 2);
    }

    #[test]
    fn the_token_itself_is_added_to_its_alternatives() {
        let json = legacy(None, &[scored(7, -3.0, &[(5, -0.5)])]);
        assert_eq!(json["top_logprobs"][0], json!({"token_id:5": -0.5, "token_id:7": -3.0}));
    }

    #[test]
    fn a_prompt_s_figures_are_maps_with_the_token_itself_and_its_rank() {
        let row = |token, logprob, rank, top: &[(u32, f32)]| {
            Some(TokenLogprobs { token, logprob, rank, top: top.to_vec() })
        };
        let rows = [None, row(7, -3.0, 9, &[(5, -0.5)]), row(5, -0.5, 1, &[(5, -0.5)]), row(2, -1.5, 2, &[])];
        let figures = |logprob: f32, rank: usize, text: &str| json!({"logprob": logprob, "rank": rank, "decoded_token": text});
        let expected = json!([
            null,
            {"7": figures(-3.0, 9, "token_id:7"), "5": figures(-0.5, 1, "token_id:5")},
            {"5": figures(-0.5, 1, "token_id:5")},
            {"2": figures(-1.5, 2, "token_id:2")},
        ]);
        assert_eq!(prompt(None, &rows), expected);
    }

    #[test]
    fn infinities_become_numbers_and_a_missing_figure_null() {
        let first = ScoredToken { id: 1, offset: 0, logprobs: None };
        let json = legacy(None, &[first, scored(2, f32::NEG_INFINITY, &[])]);
        assert_eq!(json["token_logprobs"], json!([null, -9999.0]));
        assert_eq!(json["top_logprobs"][0], Value::Null);
        assert_eq!(json["text_offset"], json!([0, 0]));
        assert_eq!(json["tokens"], json!(["token_id:1", "token_id:2"]));
    }
}
