use crate::Tier;
use std::io;
use std::path::{Path, PathBuf};

/// Why bytes were refused or did not arrive, or a size was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The tier's budget does not hold that many more bytes.
    #[error("{tier} tier: needs {needed} bytes, {free} free of {limit}")]
    OverBudget {
        /// Where.
        tier: Tier,
        /// Bytes asked for.
        needed: u64,
        /// Bytes left.
        free: u64,
        /// Bytes the tier may hold; `u64::MAX` when the user set no limit.
        limit: u64,
    },
    /// The machine has no memory left.
    #[error("allocating {bytes} bytes: the machine has no memory left")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The disk does not hold the file.
    #[error("{}: needs {needed} bytes, the disk has {free} free", path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
        /// Bytes it was to hold.
        needed: u64,
        /// Bytes the file system has left for us.
        free: u64,
    },
    /// A file could not be made, opened or flushed.
    #[error("{action} {}: {why}", path.display())]
    File {
        /// What was tried: "opening", "creating", ….
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// For those who act differently.
        kind: io::ErrorKind,
        /// In the system's words.
        why: String,
    },
    /// Bytes could not be read or written.
    #[error("{action} {len} bytes at offset {offset} of {}: {why}", path.display())]
    Io {
        /// "reading" or "writing".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// How many bytes from there.
        len: u64,
        /// For those who act differently.
        kind: io::ErrorKind,
        /// In the system's words.
        why: String,
    },
    /// Bytes outside a file were asked for.
    #[error("{}: bytes {offset}..{} were asked for, it holds {size}", path.display(), offset.saturating_add(*len))]
    Range {
        /// The file.
        path: PathBuf,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes there are.
        size: u64,
    },
    /// A storage has no such entry.
    #[error("{storage} storage: there is no entry `{key}`")]
    NoEntry {
        /// Its name.
        storage: String,
        /// The entry asked for.
        key: String,
    },
    /// Not a name for an entry.
    #[error("storage key `{key}`: {why}")]
    Key {
        /// As it was given, at most 200 characters.
        key: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A ring of buffers does not fit what passes through it.
    #[error("buffer ring: {why}")]
    Ring {
        /// What does not fit.
        why: String,
    },
    /// Not a size.
    #[error("size `{text}`: {why}; write bytes, or a number with KiB, MiB, GiB or TiB, as in `600MiB`")]
    Size {
        /// As the user wrote it.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Not a budget.
    #[error("memory budget `{text}`: {why}; write `2GiB` or `device=600MiB,host=1GiB`")]
    Budget {
        /// As the user wrote it.
        text: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    pub(crate) fn file(action: &'static str, path: &Path, error: &io::Error) -> Self {
        Error::File { action, path: path.into(), kind: error.kind(), why: error.to_string() }
    }
}
