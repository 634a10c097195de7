//! Reads the fields of a JSON object, each with the type and range it must have.
//!
//! `null` is the same as absence, as everywhere in OpenAI's API. Fields nobody asks for are ignored.

use crate::error::{ApiError, excerpt};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The fields of a request or of an object in it.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Where the object stands in the request: empty, or `stream_options.`.
    path: String,
}

impl Fields {
    /// Parses a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|e| ApiError::bad_request(format!("the request body is not valid JSON: {e}")))?;
        match value {
            Value::Object(map) => Ok(Self { map, path: String::new() }),
            other => Err(ApiError::bad_request(format!(
                "the request body must be a JSON object, not {}",
                describe(&other)
            ))),
        }
    }

    /// Whether a field is present and not `null`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// Takes a field out, whatever its type.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.take(name).map(|v| v.as_bool().ok_or_else(|| self.wrong(name, "a boolean", &v))).transpose()
    }

    /// A string.
    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "a string", &other)),
        }
    }

    /// An integer in a range. `16.0` counts as one: some languages write it so.
    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match as_integer(&value).filter(|i| range.contains(i)) {
            Some(integer) => Ok(Some(integer)),
            None => {
                let expected = match (*range.start(), *range.end()) {
                    (i64::MIN, i64::MAX) => "an integer of 64 bits".to_owned(),
                    (least, i64::MAX) => format!("an integer of at least {least}"),
                    (least, most) => format!("an integer from {least} to {most}"),
                };
                Err(self.wrong(name, &expected, &value))
            }
        }
    }

    /// A count, up to `most`.
    pub(crate) fn count(&mut self, name: &str, most: usize) -> Result<Option<usize>, ApiError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        Ok(self.integer(name, 0..=most)?.map(|i| i as usize))
    }

    /// A number in a range.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number as f32)),
            None => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(self.wrong(name, &expected, &value))
            }
        }
    }

    /// A list.
    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(self.wrong(name, "a list", &other)),
        }
    }

    /// An object within the request.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, path: format!("{}{name}.", self.path) })),
            Some(other) => Err(self.wrong(name, "an object", &other)),
        }
    }

    /// What has not been taken yet.
    pub(crate) fn rest(self) -> Map<String, Value> {
        self.map
    }

    /// 400: `name` is not what it should be.
    pub(crate) fn wrong(&self, name: &str, expected: &str, value: &Value) -> ApiError {
        let param = format!("{}{name}", self.path);
        let message = format!("{param:?} must be {expected}, not {}", describe(value));
        ApiError::field(param, message)
    }

    /// 400 about `name` in the caller's own words.
    pub(crate) fn refuse(&self, name: &str, message: impl Into<String>) -> ApiError {
        ApiError::field(format!("{}{name}", self.path), message)
    }
}

/// An integer, also when written as `16.0`.
pub(crate) fn as_integer(value: &Value) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_i64().or_else(|| {
        let number = value.as_f64()?;
        (number.fract() == 0.0 && number.abs() <= EXACT).then_some(number as i64)
    })
}

/// A token id.
pub(crate) fn as_token(value: &Value) -> Option<u32> {
    u32::try_from(as_integer(value)?).ok()
}

/// A value in a message: short, and never the whole of a long text.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => excerpt(text),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
        other => other.to_string(),
    }
}
