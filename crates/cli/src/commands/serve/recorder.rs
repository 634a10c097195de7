//! Writes every sequence with all that its tokens depend on, for `hearth replay`. The file holds what users said.

use anyhow::Context;
use hearth_server::record::{Content, Observer, Record};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The `id` of the answer.
    pub id: String,
    /// The client's `x-request-id`, or the server's.
    pub request_id: String,
    /// Number of the sequence in its request.
    pub sequence: usize,
    /// Fingerprint of the weights, adapter laid over.
    pub weights: String,
    /// How it ended: `stop`, `length`, `cancelled` or `failed`.
    pub end: String,
    /// What the engine was given and what it gave.
    #[serde(flatten)]
    pub content: Recorded,
}

/// Kept apart so that unknown keys in it are refused: a parameter that is not understood would change the tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// What the engine was given and what it gave.
    pub content: Content,
}

/// Appends to a file.
pub struct Recorder {
    file: Mutex<File>,
    weights: String,
}

impl Recorder {
    /// Appends to `path`; `weights` is the model's fingerprint.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn new(path: &Path, weights: String) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            options.mode(0o600); // it holds what users said
        }
        let file = options.open(path).with_context(|| format!("cannot record into {}", path.display()))?;
        Ok(Self { file: Mutex::new(file), weights })
    }
}

impl Observer for Recorder {
    fn ended(&self, record: &Record) {
        let Some(content) = record.content.clone() else { return };
        let line = Line {
            id: record.about.response_id.clone(),
            request_id: record.about.request_id.clone(),
            sequence: record.sequence,
            weights: self.weights.clone(),
            end: record.end.to_owned(),
            content: Recorded { content },
        };
        let Ok(mut text) = serde_json::to_string(&line) else { return };
        text.push('\n');
        // A full disk must not end requests; replaying says that the last line is cut.
        let _ = self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(text.as_bytes());
    }

    fn wants_content(&self) -> bool {
        true
    }
}
