//! Token ids, already made: `{"input_ids": […], "labels": […]}`.

use super::{Format, Row, TokenRow, required_list};
use crate::IGNORE;
use serde_json::{Map, Value};

pub(super) const FORMAT: Format = Format {
    name: "tokens",
    about: "token ids: {\"input_ids\": […], \"labels\": […] (optional; -100 = not trained)}",
    sample: r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}"#,
    parse,
    plain_files: false,
    pairs: false,
};

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    Ok(Row::Tokens(ids_and_labels(row, "input_ids", "labels")?))
}

/// Token ids under one key and, where they are there, their labels under another.
pub(super) fn ids_and_labels(
    row: &Map<String, Value>,
    ids_key: &str,
    labels_key: &str,
) -> Result<TokenRow, String> {
    // Labels are i32, so ids are too.
    let ids: Vec<u32> = numbers(row, ids_key, "token ids", "a token id from 0 to 2147483647", |n| {
        i32::try_from(n).ok().and_then(|n| u32::try_from(n).ok())
    })?;
    if row.get(labels_key).is_none_or(Value::is_null) {
        return Ok(TokenRow { ids, labels: None });
    }
    let labels: Vec<i32> = numbers(row, labels_key, "labels", "a token id or -100", |n| {
        i32::try_from(n).ok().filter(|&n| n >= 0 || n == IGNORE)
    })?;
    if labels.len() != ids.len() {
        return Err(format!(
            "{} labels for {} ids; one label beside each id is expected",
            labels.len(),
            ids.len()
        ));
    }
    Ok(TokenRow { ids, labels: Some(labels) })
}

fn numbers<T>(
    row: &Map<String, Value>,
    key: &str,
    of: &str,
    each: &str,
    convert: impl Fn(i64) -> Option<T>,
) -> Result<Vec<T>, String> {
    required_list(row, key, of)?
        .iter()
        .enumerate()
        .map(|(i, value)| {
            value
                .as_i64()
                .and_then(&convert)
                .ok_or_else(|| format!("{key}[{i}] is {value}, {each} is expected"))
        })
        .collect()
}
