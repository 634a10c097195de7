//! Plain text: a file of any other kind as a whole, or `{"text": …}` rows.

use super::{Format, Row, required_string};
use serde_json::{Map, Value};

pub(super) const FORMAT: Format = Format {
    name: "text",
    about: "plain text: a .txt file, or rows {\"text\": …}",
    sample: r#"{"text": "Once upon a time."}"#,
    parse,
    plain_files: true,
    pairs: false,
};

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    Ok(Row::Text(required_string(row, "text")?.to_owned()))
}
