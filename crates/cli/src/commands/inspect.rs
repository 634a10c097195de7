//! `hearth data inspect`: what the trainer will see.

use crate::open::Model;
use crate::recipe::Recipe;
use crate::resolve;
use crate::ui::{Report, Ui, table};
use hearth_data::inspect::{self, PairPieces, Piece};
use serde::Serialize;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Tokenizes a recipe's data and shows a sample with the trained tokens marked.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct InspectArgs {
    /// Recipe file
    pub recipe: PathBuf,
    /// Override a recipe key, for example train.max_seq_len=256
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Examples shown
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub show: usize,
}

/// How much data there is, and some of it.
#[derive(Clone, Debug, Serialize)]
pub struct InspectReport {
    /// Training examples; a preference pair is one.
    pub examples: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Those of them that carry loss.
    pub trained_tokens: usize,
    /// Examples held out for evaluation.
    pub val_examples: usize,
    /// Examples that lost their end to `max_seq_len`.
    pub truncated: usize,
    /// Examples left out because nothing in them is trained.
    pub dropped: usize,
    /// Preference pairs left out because both replies are the same.
    pub identical: usize,
    /// The first examples, in pieces that are trained or not; empty where they are preference pairs.
    pub sample: Vec<Vec<Piece>>,
    /// The first preference pairs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<PairPieces>,
    #[serde(skip)]
    colour: bool,
}

/// Loads the data exactly as `train` does.
///
/// # Errors
/// A wrong recipe, a model that cannot be opened, data that is empty or malformed (file and line are named).
pub fn run(args: &InspectArgs, ui: &Ui) -> anyhow::Result<InspectReport> {
    let recipe = Recipe::load(&args.recipe, &args.set)?;
    let model = Model::open(Path::new(&recipe.model.path), ui)?;
    let config = resolve::dataset(&recipe, model.files.config.vocab_size);
    let data = hearth_data::dataset::load(&config, model.tokenizer.as_ref(), model.template.as_ref())?;
    for warning in &data.stats.warnings {
        ui.note(warning);
    }
    let (tokenizer, paired) = (model.tokenizer.as_ref(), data.train.iter().any(|s| s.half.is_some()));
    Ok(InspectReport {
        examples: data.stats.train.examples,
        tokens: data.stats.train.tokens,
        trained_tokens: data.stats.train.trained_tokens,
        val_examples: data.stats.val.examples,
        truncated: data.stats.truncated,
        dropped: data.stats.dropped,
        identical: data.stats.identical,
        sample: inspect::sample(&data.train, tokenizer, if paired { 0 } else { args.show })?,
        pairs: inspect::sample_pairs(&data.train, tokenizer, args.show)?,
        colour: std::io::stdout().is_terminal(),
    })
}

impl Report for InspectReport {
    fn text(&self) -> String {
        let marks = if self.colour { "trained in green" } else { "trained in ⟦ ⟧" };
        let mut text = String::new();
        for (i, pieces) in self.sample.iter().enumerate() {
            text.push_str(&format!("example {i} ({marks}):\n{}\n\n", self.painted(pieces)));
        }
        for (i, pair) in self.pairs.iter().enumerate() {
            text.push_str(&format!("pair {i} ({marks}):\n{}\n", self.painted(&pair.prompt)));
            text.push_str(&format!("  chosen: {}\n", self.painted(&pair.chosen).trim_end()));
            text.push_str(&format!("  rejected: {}\n\n", self.painted(&pair.rejected).trim_end()));
        }
        let left_out = (self.identical > 0).then(|| ("left out, same replies", self.identical.to_string()));
        let rows = [
            ("examples", self.examples.to_string()),
            ("tokens", self.tokens.to_string()),
            ("trained tokens", self.trained_tokens.to_string()),
            ("held-out examples", self.val_examples.to_string()),
            ("cut at max_seq_len", self.truncated.to_string()),
            ("left out, nothing trained", self.dropped.to_string()),
        ];
        text + &table(rows.into_iter().chain(left_out))
    }
}

impl InspectReport {
    fn painted(&self, pieces: &[Piece]) -> String {
        pieces.iter().map(|piece| painted(piece, self.colour)).collect()
    }
}

fn painted(piece: &Piece, colour: bool) -> String {
    match (piece.trained, colour) {
        (true, true) => format!("\x1b[32m{}\x1b[0m", piece.text),
        (true, false) => format!("⟦{}⟧", piece.text),
        (false, true) => format!("\x1b[2m{}\x1b[0m", piece.text),
        (false, false) => piece.text.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_shown_as_its_prompt_and_two_replies() {
        let piece = |text: &str, trained| vec![Piece { text: text.into(), trained }];
        let mut report = InspectReport {
            examples: 1,
            tokens: 8,
            trained_tokens: 4,
            val_examples: 0,
            truncated: 0,
            dropped: 0,
            identical: 2,
            sample: Vec::new(),
            pairs: vec![PairPieces {
                prompt: piece("Q:", false),
                chosen: piece("yes", true),
                rejected: piece("no", true),
            }],
            colour: false,
        };
        let text = report.text();
        assert!(
            text.starts_with("pair 0 (trained in ⟦ ⟧):\nQ:\n  chosen: ⟦yes⟧\n  rejected: ⟦no⟧\n\n"),
            "{text}"
        );
        assert!(text.contains("left out, same replies"), "{text}");
        report.colour = true;
        assert!(report.text().contains("\x1b[32myes\x1b[0m"), "{}", report.text());
    }
}
