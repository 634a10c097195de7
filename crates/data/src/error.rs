//! What can go wrong between a file of text and a batch of ids.

use std::path::{Path, PathBuf};

/// An error of this crate. Every message names the thing, the value and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `tokenizer.json` is damaged or of an unsupported kind.
    #[error("{path}: not a usable tokenizer.json: {reason}")]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The vocabulary inside a GGUF file cannot be turned into a tokenizer.
    #[error("GGUF vocabulary: {0}")]
    GgufVocabulary(String),
    /// The tokenizer refused a text.
    #[error("cannot tokenize {excerpt:?}: {reason}")]
    Encode {
        /// Start of the text.
        excerpt: String,
        /// Why.
        reason: String,
    },
    /// The tokenizer could not turn ids back into text.
    #[error("cannot turn {count} token ids into text: {reason}")]
    Decode {
        /// How many ids there were.
        count: usize,
        /// Why.
        reason: String,
    },
    /// The chat template does not parse.
    #[error("chat template: {0}")]
    TemplateSyntax(String),
    /// The chat template failed on a conversation, often with a message of its own.
    #[error("chat template refuses the conversation: {0}")]
    TemplateRender(String),
    /// The template renders a turn so that the assistant's part cannot be told from the prompt.
    #[error(
        "chat template: the prompt before assistant turn {turn} is not how the conversation with that turn begins, so the assistant's tokens cannot be found; use train_on = \"all\" or a template with {{% generation %}} blocks"
    )]
    TemplatePrefix {
        /// Index of the message.
        turn: usize,
    },
    /// A row of a dataset is malformed.
    #[error("{path}:{line}: {reason}")]
    Row {
        /// The file.
        path: PathBuf,
        /// 1-based line on which the row begins.
        line: usize,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// No dataset format of this name.
    #[error("unknown dataset format {name:?}{}; known formats: {known}", nearest.as_ref().map(|n| format!(" (did you mean {n:?}?)")).unwrap_or_default())]
    UnknownFormat {
        /// What was asked for.
        name: String,
        /// The most similar known name.
        nearest: Option<String>,
        /// All known names.
        known: String,
    },
    /// A dataset path that leads to no file.
    #[error("{path}: {reason}")]
    NoFiles {
        /// The path or pattern.
        path: PathBuf,
        /// Why nothing was found.
        reason: String,
    },
    /// Nothing to train on.
    #[error("the dataset is empty: {0}")]
    Empty(String),
    /// The model has no tokenizer but the data is text.
    #[error(
        "format {format:?} holds text, but the model has no tokenizer; give pre-tokenized data (format = \"tokens\") or a model with a tokenizer"
    )]
    NoTokenizer {
        /// The dataset format.
        format: String,
    },
    /// The model has no chat template but the data is conversations.
    #[error(
        "format {format:?} holds conversations, but the model has no chat template; use format \"alpaca\" or \"text\", or a model with a chat template"
    )]
    NoTemplate {
        /// The dataset format.
        format: String,
    },
    /// A token id the model has no embedding for.
    #[error("{origin}: token id {id} at position {position} is out of range: the vocabulary has {vocab_size} entries (0 to {})", vocab_size.saturating_sub(1))]
    TokenOutOfRange {
        /// Where the id comes from.
        origin: String,
        /// The id.
        id: u32,
        /// Its position.
        position: usize,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A setting that contradicts the data or itself.
    #[error("{0}")]
    Setting(String),
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    /// An [`Error::Row`] at `path:line`.
    pub(crate) fn row(path: &Path, line: usize, reason: impl Into<String>) -> Self {
        Self::Row { path: path.to_path_buf(), line, reason: reason.into() }
    }
}

/// The start of `text`, short enough for a message.
pub(crate) fn excerpt(text: &str) -> String {
    const LIMIT: usize = 60;
    let mut out: String = text.chars().take(LIMIT).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}
