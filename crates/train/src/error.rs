//! What can go wrong while training.

use std::path::{Path, PathBuf};

/// An error of this crate: one sentence that names the thing, the value and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that contradicts itself, the model or the data.
    #[error("{0}")]
    Config(String),
    /// The model could not be put together.
    #[error(transparent)]
    Model(#[from] hearth_model::Error),
    /// The model's files could not be read.
    #[error(transparent)]
    Weights(#[from] hearth_weights::Error),
    /// The data could not be handed out.
    #[error(transparent)]
    Data(#[from] hearth_data::Error),
    /// A budget does not hold the run, or its tiers failed.
    #[error(transparent)]
    Memory(#[from] hearth_memory::Error),
    /// The ranks lost each other.
    #[error(transparent)]
    Collective(#[from] hearth_collective::Error),
    /// Another rank cannot go on, so none does.
    #[error("rank {rank}: {sentence}")]
    OtherRank {
        /// Who.
        rank: usize,
        /// What it said.
        sentence: String,
    },
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint could not be written; the ones before it are untouched.
    #[error("checkpoint {path} was not saved: {source}; earlier checkpoints are untouched")]
    NotSaved {
        /// The checkpoint that was being written.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint that is damaged or incomplete.
    #[error("checkpoint {path}: {why}")]
    Damaged {
        /// The checkpoint's directory.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// A checkpoint of another model or another adapter.
    #[error("checkpoint {path} belongs to another run: {why}")]
    Foreign {
        /// The checkpoint's directory.
        path: PathBuf,
        /// What differs.
        why: String,
    },
    /// There is nothing to resume from.
    #[error("{dir}: no complete checkpoint to resume from{skipped}")]
    NothingToResume {
        /// Directory searched.
        dir: PathBuf,
        /// Damaged ones found, as a clause; may be empty.
        skipped: String,
    },
    /// A new run would mix with an old one.
    #[error("{dir} already holds {found}; continue it with --resume, or choose another checkpoint.dir")]
    Occupied {
        /// The checkpoint directory.
        dir: PathBuf,
        /// Newest checkpoint in it.
        found: String,
    },
    /// What computes the steps does not.
    #[error(transparent)]
    Accelerator(Box<dyn std::error::Error + Send + Sync>),
    /// What computed the steps is gone, with what was on it; a new process may find it again.
    #[error("step {step}: {source}; {kept}")]
    Lost {
        /// The step, from 1.
        step: u64,
        /// What it was lost at.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// What is left of the run.
        kept: String,
    },
    /// A step whose loss or gradient is not a number; its update was not applied.
    #[error(
        "step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so the update was not applied; lower optim.lr, add \
         warm-up (sched.warmup) or clip (train.clip_norm)"
    )]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
    },
}

impl Error {
    /// Wraps an I/O error with its path, for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn damaged(path: &Path, why: impl Into<String>) -> Error {
        Error::Damaged { path: path.to_owned(), why: why.into() }
    }
}
