//! `{"instruction": …, "input": …, "output": …}`, as Stanford Alpaca's data.

use super::{Format, Instruction, Row, optional_string, required_string};
use serde_json::{Map, Value};

pub(super) const FORMAT: Format = Format {
    name: "alpaca",
    about: "instructions: {\"instruction\": …, \"input\": … (optional), \"output\": …}",
    sample: r#"{"instruction": "Add the numbers.", "input": "2, 3", "output": "5"}"#,
    parse,
    plain_files: false,
    pairs: false,
};

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    Ok(Row::Instruction(Instruction {
        system: optional_string(row, "system")?.filter(|s| !s.is_empty()).map(str::to_owned),
        instruction: required_string(row, "instruction")?.to_owned(),
        input: optional_string(row, "input")?.unwrap_or_default().to_owned(),
        output: required_string(row, "output")?.to_owned(),
    }))
}
