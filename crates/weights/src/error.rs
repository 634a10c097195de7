//! What can go wrong with a model on disk, one sentence each.

use std::io;
use std::path::{Path, PathBuf};

/// Why a model could not be read or written. Every message names the file, the thing in it and the value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file contradicts itself: truncated, overlapping, or not what its name says.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// One tensor cannot be read or written; the rest of the file may be fine.
    #[error("{path}: tensor {tensor}: {what}")]
    Tensor {
        /// The file or directory.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Why.
        what: String,
    },
    /// A tensor the model needs is not there.
    #[error("{path}: tensor {tensor} is missing{hint}")]
    MissingTensor {
        /// The file or directory.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Nearest present name, as a clause; may be empty.
        hint: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("{path}: tensor {tensor} has shape {found:?}, the configuration needs {expected:?}")]
    WrongShape {
        /// The file or directory.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape needed.
        expected: Vec<usize>,
    },
    /// The configuration is contradictory or asks for something hearth does not do.
    #[error("{origin}: {what}")]
    Config {
        /// File the configuration came from.
        origin: String,
        /// Key, value and limit.
        what: String,
    },
    /// A well-formed file of a kind hearth does not read.
    #[error("{path}: {what}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        what: String,
    },
    /// There is no model at this path.
    #[error("{path} is not a model: {what}")]
    NotAModel {
        /// What was given.
        path: PathBuf,
        /// Why, and what would be one.
        what: String,
    },
    /// No storage format of that name.
    #[error("unknown storage format {name:?}{hint}; known: {known}")]
    UnknownFormat {
        /// What was asked for.
        name: String,
        /// `, did you mean …?` or nothing.
        hint: String,
        /// Names of all formats.
        known: String,
    },
    /// The format can be read but not written.
    #[error("storage format {format} can be read but not written; use one of {writable}")]
    ReadOnlyFormat {
        /// The format.
        format: &'static str,
        /// Names of formats that can be written.
        writable: String,
    },
    /// The destination is already there; nothing is ever overwritten.
    #[error("{path} already exists; remove it or choose another destination")]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// A part of a bundle is not what was written.
    #[error(
        "{path}: sha256 of {part} is {found}, the manifest says {expected}; the bundle was altered or damaged"
    )]
    HashMismatch {
        /// The bundle directory.
        path: PathBuf,
        /// File inside it.
        part: String,
        /// Hash the manifest gives.
        expected: String,
        /// Hash of the bytes.
        found: String,
    },
    /// An adapter cannot be applied.
    #[error("{path}: {what}")]
    Adapter {
        /// The adapter directory.
        path: PathBuf,
        /// Why, and what to do.
        what: String,
    },
}

impl Error {
    /// Wraps an I/O error with the path it happened at, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Error {
        Error::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, what: impl Into<String>) -> Error {
        Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), what: what.into() }
    }

    pub(crate) fn config(what: impl Into<String>) -> Error {
        Error::Config { origin: "config.json".into(), what: what.into() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Error {
        Error::Unsupported { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn not_a_model(path: &Path, what: impl Into<String>) -> Error {
        Error::NotAModel { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn adapter(path: &Path, what: impl Into<String>) -> Error {
        Error::Adapter { path: path.to_owned(), what: what.into() }
    }

    /// The same configuration error, said of the file it really came from.
    pub(crate) fn in_file(self, path: &Path) -> Error {
        match self {
            Error::Config { what, .. } => Error::Config { origin: path.display().to_string(), what },
            other => other,
        }
    }
}
