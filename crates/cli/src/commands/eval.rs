//! `hearth eval`: how surprised a model is by a text.

use crate::exit::usage;
use crate::running::ModelArgs;
use crate::ui::{Report, Ui, table};
use anyhow::Context;
use hearth_engine::Activations;
use serde::Serialize;
use std::path::PathBuf;

/// Measures a model on a text.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct EvalArgs {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text file, UTF-8
    #[arg(long, value_name = "FILE")]
    pub perplexity: PathBuf,
    /// Tokens per window [default: what the model was made for, 2048 at most]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Only the first N tokens of the text
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
}

/// Perplexity.
#[derive(Clone, Debug, Serialize)]
pub struct EvalReport {
    /// e to the mean negative log-likelihood over all predictions.
    pub perplexity: f64,
    /// Tokens that were read.
    pub tokens: usize,
    /// Predictions the mean is over: every token of a window but its first.
    pub predictions: usize,
}

/// Largest window unless one is asked for.
const DEFAULT_CONTEXT: usize = 2048;

/// Reads the text in windows, one after another, none seeing the ones before. BOS stands at the beginning of the
/// text only if the tokenizer puts it there.
///
/// # Errors
/// A model without tokenizer, a text that cannot be read or is too short.
pub fn run(args: &EvalArgs, ui: &Ui) -> anyhow::Result<EvalReport> {
    let path = &args.perplexity;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the text {}", path.display()))?;
    let model = args.model.open(ui)?;
    let mut tokens = model.need_tokenizer("perplexity of a text needs one")?.encode(&text, true)?;
    tokens.truncate(args.tokens.unwrap_or(usize::MAX));
    let longest = model.files.config.max_position_embeddings.min(DEFAULT_CONTEXT);
    let context = args.context.unwrap_or(longest);
    if context < 2 {
        return Err(usage(format!(
            "--context is {context}, it must be at least 2: a prediction needs a token before it"
        )));
    }
    if tokens.len() < 2 {
        return Err(usage(format!("{} has {} tokens, at least 2 are needed", path.display(), tokens.len())));
    }
    let mut scorer = args.model.scorer(&model, Activations::F32, context.min(tokens.len()), ui)?;
    let (mut sum, mut predictions) = (0.0, 0);
    let windows = tokens.chunks(context);
    let progress = ui.bar(windows.len() as u64);
    for (done, window) in windows.enumerate() {
        let losses = scorer.negative_log_likelihoods(window)?;
        sum += losses.iter().sum::<f64>();
        predictions += losses.len();
        progress.at(done as u64 + 1, "windows");
    }
    progress.finish();
    Ok(EvalReport { perplexity: (sum / predictions as f64).exp(), tokens: tokens.len(), predictions })
}

impl Report for EvalReport {
    fn text(&self) -> String {
        table([
            ("perplexity", format!("{:.4}", self.perplexity)),
            ("tokens", self.tokens.to_string()),
            ("predictions", self.predictions.to_string()),
        ])
    }
}
