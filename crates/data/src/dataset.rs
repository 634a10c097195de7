//! From a recipe's list of files to sequences for training and validation.

use crate::error::Error;
use crate::example::{Encoded, Encoder, TrainOn};
use crate::format::{self, Format};
use crate::inspect::{Counts, counts};
use crate::rng::permutation;
use crate::source::{self, SourceRow};
use crate::template::ChatTemplate;
use crate::tokenizer::{Tokenizer, check_range};
use crate::{Example, Sequence, pack};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Which data, and how it is prepared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatasetConfig {
    /// The files.
    pub files: Vec<DataFile>,
    /// Which tokens of conversations count towards the loss.
    pub train_on: TrainOn,
    /// Whether several examples may share a sequence.
    pub packing: bool,
    /// Longest sequence in tokens.
    pub max_seq_len: usize,
    /// Part of the training rows that is set aside for validation, 0 ≤ f < 1.
    pub val_fraction: f64,
    /// Decides which rows are set aside.
    pub seed: u64,
    /// Entries of the model's embedding, if known: token ids are checked against it.
    pub vocab_size: Option<usize>,
}

/// One entry of the list of files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// File, folder or glob pattern.
    pub path: PathBuf,
    /// Name of a [`Format`].
    pub format: String,
    /// What the rows are for.
    #[serde(default)]
    pub split: Split,
}

/// What rows are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Training.
    #[default]
    Train,
    /// Validation.
    #[serde(alias = "validation", alias = "eval", alias = "test")]
    Val,
}

impl Default for DatasetConfig {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            train_on: TrainOn::Assistant,
            packing: false,
            max_seq_len: 512,
            val_fraction: 0.0,
            seed: 0,
            vocab_size: None,
        }
    }
}

/// Sequences ready for training and validation.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// For training.
    pub train: Vec<Sequence>,
    /// For validation; may be empty.
    pub val: Vec<Sequence>,
    /// What became of the rows.
    pub stats: Stats,
}

/// What became of the rows of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Rows read.
    pub rows: usize,
    /// What is there for training.
    pub train: Counts,
    /// What is there for validation.
    pub val: Counts,
    /// Examples, or preference pairs, that lost their end to `max_seq_len`.
    pub truncated: usize,
    /// Examples left out because no token of them is trained; pairs, because none of one reply is.
    pub dropped: usize,
    /// Preference pairs left out because both replies are the same tokens.
    pub identical: usize,
    /// Conversations that became one example for each assistant turn.
    pub split_by_turn: usize,
    /// What the user should know, one sentence each.
    pub warnings: Vec<String>,
}

/// What is only told in warnings.
#[derive(Default)]
struct Oddities {
    prompt_differs: usize,
    reply_rewritten: usize,
}

/// The examples of one row: they stay on one side of the validation split.
type Group = Vec<Example>;

/// Reads, tokenizes, splits and packs the files of `config`. Data of format `tokens` needs neither tokenizer nor
/// template.
///
/// # Errors
/// When a setting contradicts itself, nothing is found, or a row is malformed: the message names file and line.
pub fn load(
    config: &DatasetConfig,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
) -> Result<Dataset, Error> {
    check(config)?;
    let encoder = Encoder { tokenizer, template, train_on: config.train_on, max_seq_len: config.max_seq_len };
    let mut stats = Stats::default();
    let mut oddities = Oddities::default();
    let (mut train, mut val): (Vec<Group>, Vec<Group>) = Default::default();
    for file in &config.files {
        let format = format::find(&file.format)?;
        for encoded in encode_file(config, file, format, &encoder)? {
            stats.rows += 1;
            stats.truncated += encoded.truncated;
            stats.dropped += encoded.dropped;
            stats.split_by_turn += usize::from(encoded.split_by_turn);
            stats.identical += usize::from(encoded.identical);
            oddities.prompt_differs += usize::from(encoded.prompt_differs);
            oddities.reply_rewritten += usize::from(encoded.reply_rewritten);
            let side = if file.split == Split::Train { &mut train } else { &mut val };
            side.extend(groups(encoded, format));
        }
    }
    require_rows(config, &stats, &train)?;
    set_aside(config, &mut train, &mut val)?;
    let dataset_side = |groups: Vec<Group>| {
        let examples: Vec<Example> = groups.into_iter().flatten().collect();
        let mut sequences =
            if config.packing { pack::pack(examples, config.max_seq_len) } else { pack::unpacked(examples) };
        pack::number(&mut sequences);
        sequences
    };
    let (train, val) = (dataset_side(train), dataset_side(val));
    (stats.train, stats.val) = (counts(&train), counts(&val));
    stats.warnings = warnings(config, &stats, &oddities);
    Ok(Dataset { train, val, stats })
}

fn check(config: &DatasetConfig) -> Result<(), Error> {
    let setting = |reason: String| Err(Error::Setting(reason));
    if config.files.is_empty() {
        return Err(Error::Empty("no [[data]] file is given".into()));
    }
    if config.max_seq_len < 2 {
        return setting(format!(
            "max_seq_len = {}; a sequence needs at least 2 tokens to train one",
            config.max_seq_len
        ));
    }
    if !(0.0..1.0).contains(&config.val_fraction) {
        return setting(format!(
            "val_fraction = {}; it must be at least 0 and less than 1",
            config.val_fraction
        ));
    }
    check_pairs(config)
}

/// Pairs are compared half with half: they share no sequence, and no dataset, with anything else.
fn check_pairs(config: &DatasetConfig) -> Result<(), Error> {
    let formats =
        config.files.iter().map(|file| format::find(&file.format)).collect::<Result<Vec<_>, _>>()?;
    let Some(paired) = formats.iter().find(|format| format.pairs) else { return Ok(()) };
    if let Some(other) = formats.iter().find(|format| !format.pairs) {
        return Err(Error::Setting(format!(
            "format {:?} holds preference pairs and format {:?} does not; train on one or the other",
            paired.name, other.name
        )));
    }
    if config.packing {
        return Err(Error::Setting(format!(
            "packing = true does not go with format {:?}: the two halves of a pair are sequences of their own; set \
             packing = false",
            paired.name
        )));
    }
    Ok(())
}

/// The rows of one entry, tokenized on all cores, in order.
fn encode_file(
    config: &DatasetConfig,
    file: &DataFile,
    format: &Format,
    encoder: &Encoder,
) -> Result<Vec<Encoded>, Error> {
    source::read(&file.path, format)?
        .par_iter()
        .map(|source| {
            let encoded = encoder.encode(&source.row, format.name).map_err(|error| at(source, error))?;
            check_ids(config, source, &encoded)?;
            Ok(encoded)
        })
        .collect()
}

/// Names the row an error is about, unless the error is about the whole file.
fn at(source: &SourceRow, error: Error) -> Error {
    match error {
        Error::NoTokenizer { .. } | Error::NoTemplate { .. } => error,
        other => Error::row(&source.path, source.line, other.to_string()),
    }
}

fn check_ids(config: &DatasetConfig, source: &SourceRow, encoded: &Encoded) -> Result<(), Error> {
    let Some(vocab_size) = config.vocab_size else { return Ok(()) };
    let origin = |what: &str| format!("{}:{}: {what}", source.path.display(), source.line);
    for example in &encoded.examples {
        check_range(&origin("input_ids"), &example.ids, vocab_size)?;
        // Labels that are not trained become a valid id, so that positions stay right.
        let labels: Vec<u32> =
            example.labels.iter().map(|&label| u32::try_from(label).unwrap_or(0)).collect();
        check_range(&origin("labels"), &labels, vocab_size)?;
    }
    Ok(())
}

/// A row's examples belong together, except the pieces of a long text, which are as good as texts of their own.
fn groups(encoded: Encoded, format: &Format) -> Vec<Group> {
    match format.plain_files {
        true => encoded.examples.into_iter().map(|example| vec![example]).collect(),
        false if encoded.examples.is_empty() => Vec::new(),
        false => vec![encoded.examples],
    }
}

fn require_rows(config: &DatasetConfig, stats: &Stats, train: &[Group]) -> Result<(), Error> {
    if !train.is_empty() {
        return Ok(());
    }
    let paths: Vec<String> = config.files.iter().map(|f| f.path.display().to_string()).collect();
    let paths = paths.join(", ");
    Err(Error::Empty(match stats.rows {
        0 => format!("no row in {paths}"),
        rows if stats.identical > 0 => format!(
            "none of the {rows} pairs in {paths} is left: in {} both replies are the same tokens within max_seq_len \
             = {}, in {} one has no trained token",
            stats.identical, config.max_seq_len, stats.dropped
        ),
        rows if stats.dropped > 0 => format!(
            "none of the {rows} rows in {paths} has a trained token within max_seq_len = {}; raise it, or check \
             that the rows have assistant turns or set train_on = \"all\"",
            config.max_seq_len
        ),
        _ => format!("no row in {paths} is for training (split = \"train\")"),
    }))
}

/// Moves `val_fraction` of the training rows to validation: at least one, and never all. Both keep their order.
fn set_aside(config: &DatasetConfig, train: &mut Vec<Group>, val: &mut Vec<Group>) -> Result<(), Error> {
    if config.val_fraction == 0.0 {
        return Ok(());
    }
    let total = train.len();
    if total < 2 {
        return Err(Error::Setting(format!(
            "val_fraction = {} needs at least 2 examples to split, there is {total}",
            config.val_fraction
        )));
    }
    let count = ((total as f64 * config.val_fraction).round() as usize).clamp(1, total - 1);
    // Epochs count up from 0; the last stream is theirs never.
    let mut chosen = vec![false; total];
    for index in permutation(total, config.seed, u64::MAX).into_iter().take(count) {
        chosen[index] = true;
    }
    for (group, chosen) in std::mem::take(train).into_iter().zip(chosen) {
        if chosen { val.push(group) } else { train.push(group) }
    }
    Ok(())
}

fn warnings(config: &DatasetConfig, stats: &Stats, oddities: &Oddities) -> Vec<String> {
    let mut out = Vec::new();
    let pairs = config.files.iter().any(|file| format::find(&file.format).is_ok_and(|f| f.pairs));
    let examples = if pairs { "pairs" } else { "examples" };
    if stats.truncated > 0 {
        out.push(format!(
            "{} {examples} are longer than max_seq_len = {} and lost their end",
            stats.truncated, config.max_seq_len
        ));
    }
    if stats.dropped > 0 {
        let which = if pairs { "pairs have a reply without a" } else { "examples have no" };
        out.push(format!("{} {which} trained token and were left out", stats.dropped));
    }
    if stats.identical > 0 {
        out.push(format!(
            "{} pairs were left out because both replies are the same tokens within max_seq_len = {}",
            stats.identical, config.max_seq_len
        ));
    }
    if stats.split_by_turn > 0 {
        out.push(format!(
            "the chat template rewrites earlier turns, so {} conversations became one example for each assistant turn",
            stats.split_by_turn
        ));
    }
    if oddities.reply_rewritten > 0 {
        out.push(format!(
            "the chat template rewrites earlier turns, so of the replies with several turns in {} pairs only the last \
             is trained",
            oddities.reply_rewritten
        ));
    }
    if oddities.prompt_differs > 0 {
        out.push(format!(
            "the chat template's generation prompt is not how the assistant's turns begin in {} \
             conversations (an opened <think> block, say); they are trained from where the two part",
            oddities.prompt_differs
        ));
    }
    out
}
