//! Token ids, already made: `{"input_ids": […], "labels": […]}`.

use super::{Format, Row, required_list};
use crate::IGNORE;
use serde_json::{Map, Value};

pub(super) const FORMAT: Format = Format {
    name: "tokens",
    about: "token ids: {\"input_ids\": […], \"labels\": […] (optional; -100 = not trained)}",
    sample: r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}"#,
    parse,
    plain_files: false,
};

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    // Labels are i32, so ids are too.
    let ids: Vec<u32> = numbers(row, "input_ids", "token ids", "a token id from 0 to 2147483647", |n| {
        i32::try_from(n).ok().and_then(|n| u32::try_from(n).ok())
    })?;
    if row.get("labels").is_none_or(Value::is_null) {
        return Ok(Row::Tokens { ids, labels: None });
    }
    let labels: Vec<i32> = numbers(row, "labels", "labels", "a token id or -100", |n| {
        i32::try_from(n).ok().filter(|&n| n >= 0 || n == IGNORE)
    })?;
    if labels.len() != ids.len() {
        return Err(format!(
            "{} labels for {} ids; one label beside each id is expected",
            labels.len(),
            ids.len()
        ));
    }
    Ok(Row::Tokens { ids, labels: Some(labels) })
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
