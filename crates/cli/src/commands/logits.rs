//! `hearth logits`: what the model thinks comes next.

use crate::exit::usage;
use crate::running::{ModelArgs, check_tokens, parse_tokens};
use crate::ui::{Report, Ui};
use hearth_engine::Activations;
use serde::Serialize;

/// Prints the logits after given tokens.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LogitsArgs {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// Token ids, as 1,2,3
    #[arg(long, value_name = "IDS")]
    pub tokens: String,
    /// After every token, not only after the last
    #[arg(long)]
    pub all: bool,
}

/// Logits.
#[derive(Clone, Debug, Serialize)]
pub struct LogitsReport {
    /// Row i follows token i; without `--all` only the last row. One figure per vocabulary entry.
    pub logits: Vec<Vec<f32>>,
}

/// Computes the logits through the engine's own runner.
///
/// # Errors
/// A model that cannot be loaded, tokens it does not have.
pub fn run(args: &LogitsArgs, ui: &Ui) -> anyhow::Result<LogitsReport> {
    let tokens = parse_tokens(&args.tokens).map_err(|e| usage(format!("--tokens: {e}")))?;
    let model = args.model.open(ui)?;
    check_tokens(&tokens, model.files.config.vocab_size)?;
    let wanted = if args.all { 0 } else { tokens.len() - 1 }..tokens.len();
    let mut logits = Vec::with_capacity(wanted.len());
    let mut scorer = args.model.scorer(&model, Activations::F32, tokens.len(), ui)?;
    scorer.score(&tokens, wanted, |_, row| logits.push(row.to_vec()))?;
    Ok(LogitsReport { logits })
}

impl Report for LogitsReport {
    /// The five most likely ids of each row, with their logits.
    fn text(&self) -> String {
        let line = |row: &Vec<f32>| {
            let mut ids: Vec<usize> = (0..row.len()).collect();
            ids.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            let best: Vec<String> = ids.iter().take(5).map(|id| format!("{id}: {}", row[*id])).collect();
            best.join("  ") + "\n"
        };
        self.logits.iter().map(line).collect()
    }
}
