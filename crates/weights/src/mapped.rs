//! Read-only memory-mapped files: the one place that maps, and the one place with `unsafe`.
#![allow(unsafe_code)]

use crate::Error;
use memmap2::{Mmap, UncheckedAdvice};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A whole file, mapped read-only. Pages are read when touched.
pub(crate) struct Mapped {
    path: PathBuf,
    map: Mmap,
}

impl Mapped {
    /// Maps a regular, non-empty file.
    pub(crate) fn open(path: &Path) -> Result<Mapped, Error> {
        // Asked before opening: opening a pipe would block.
        let meta = std::fs::metadata(path).map_err(Error::io(path))?;
        if !meta.is_file() {
            return Err(Error::not_a_model(path, "it is not a regular file"));
        }
        if meta.len() == 0 {
            return Err(Error::damaged(path, "the file is empty"));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is private and read-only and every read of it is bounds-checked. As with every
        // memory-mapped reader, soundness rests on nobody shrinking or rewriting a model file while it is being
        // used; hearth itself never writes in place, it renames finished files.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Mapped { path: path.to_owned(), map })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets the system take the pages of this range out of the process; reading them again brings them back.
    pub(crate) fn release(&self, range: Range<usize>) {
        // SAFETY: "don't need" loses writes to private or anonymous memory; this map is of a file and never
        // written, so pages that are dropped, even under a live slice, come back with the same bytes.
        let dropped =
            unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        // Advice: a system that refuses it only holds on to clean pages for longer.
        drop(dropped);
    }
}

/// Reads a small text file (configuration, template, index), refusing one larger than `limit_bytes`.
pub(crate) fn read_text(path: &Path, limit_bytes: u64) -> Result<String, Error> {
    let meta = std::fs::metadata(path).map_err(Error::io(path))?;
    if !meta.is_file() {
        return Err(Error::damaged(path, "it is not a regular file"));
    }
    if meta.len() > limit_bytes {
        return Err(Error::damaged(path, format!("it has {} bytes, the limit is {limit_bytes}", meta.len())));
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|e| Error::damaged(path, format!("it is not UTF-8: {e}")))
}

/// Reads a JSON object.
pub(crate) fn read_json(
    path: &Path,
    limit_bytes: u64,
) -> Result<serde_json::Map<String, serde_json::Value>, Error> {
    let text = read_text(path, limit_bytes)?;
    // Python writes a byte-order mark on some systems; JSON has none.
    serde_json::from_str(text.trim_start_matches('\u{feff}'))
        .map_err(|e| Error::damaged(path, format!("it is not a JSON object: {e}")))
}
