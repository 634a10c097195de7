//! `hearth data inspect`: what the trainer will see.

use crate::open::Model;
use crate::recipe::Recipe;
use crate::resolve;
use crate::ui::{Report, Ui, table};
use hearth_data::inspect::{self, Piece};
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
    /// Training examples.
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
    /// The first examples, in pieces that are trained or not.
    pub sample: Vec<Vec<Piece>>,
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
    Ok(InspectReport {
        examples: data.stats.train.examples,
        tokens: data.stats.train.tokens,
        trained_tokens: data.stats.train.trained_tokens,
        val_examples: data.stats.val.examples,
        truncated: data.stats.truncated,
        dropped: data.stats.dropped,
        sample: inspect::sample(&data.train, model.tokenizer.as_ref(), args.show)?,
        colour: std::io::stdout().is_terminal(),
    })
}

impl Report for InspectReport {
    fn text(&self) -> String {
        let mut text = String::new();
        for (i, pieces) in self.sample.iter().enumerate() {
            text.push_str(&format!(
                "example {i} ({}):\n",
                if self.colour { "trained in green" } else { "trained in ⟦ ⟧" }
            ));
            text.extend(pieces.iter().map(|piece| painted(piece, self.colour)));
            text.push_str("\n\n");
        }
        text + &table([
            ("examples", self.examples.to_string()),
            ("tokens", self.tokens.to_string()),
            ("trained tokens", self.trained_tokens.to_string()),
            ("held-out examples", self.val_examples.to_string()),
            ("cut at max_seq_len", self.truncated.to_string()),
            ("left out, nothing trained", self.dropped.to_string()),
        ])
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
