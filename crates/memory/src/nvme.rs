//! Files whose bytes bypass the page cache and move while the caller computes.
//!
//! - [`NvmeFile`]: a file of fixed length; positioned reads and writes from any thread.
//! - [`BACKENDS`]: the ways to reach a disk: io_uring or positioned I/O, past or through the page cache.
//!
//! Overlapped transfers ([`crate::stream`]) are cut into requests of 1 MiB with up to 128 in flight.

mod direct;
mod plain;
mod queue;
mod segment;
#[cfg(target_os = "linux")]
mod uring;
#[cfg(not(target_os = "linux"))]
#[path = "nvme/no_uring.rs"]
mod uring;

use crate::{Charge, Error};
pub use direct::free_bytes;
pub use queue::{BACKENDS, Backend};
pub(crate) use queue::{Direction, Done, Queue, Transfer};
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A file of fixed length on a fast disk. Shared by reference between threads; ranges that threads write must not
/// overlap what others use.
#[derive(Debug)]
pub struct NvmeFile {
    handles: Arc<direct::Handles>,
    len: u64,
    backend: &'static Backend,
    fallback: Option<String>,
    _charge: Option<Charge>,
}

impl NvmeFile {
    /// Makes a file of `len` bytes, or empties the one that is there, and claims its bytes on the disk. Its content
    /// reads as zeros. `charge` is held as long as the file is open.
    ///
    /// # Errors
    /// [`Error::DiskFull`] when the disk does not hold it, [`Error::File`] when it cannot be made.
    pub fn create(path: &Path, len: u64, charge: impl Into<Option<Charge>>) -> Result<Self, Error> {
        Self::create_with(&BACKENDS, path, len, charge)
    }

    /// Like [`NvmeFile::create`], for a file that no name leads to: the system frees its bytes when it is closed,
    /// even by a kill, so that nothing is left to tidy up.
    ///
    /// # Errors
    /// As [`NvmeFile::create`].
    pub fn temporary(path: &Path, len: u64, charge: impl Into<Option<Charge>>) -> Result<Self, Error> {
        let file = Self::create(path, len, charge)?;
        std::fs::remove_file(path).map_err(|error| Error::file("unlinking", path, &error))?;
        Ok(file)
    }

    /// Like [`NvmeFile::create`], with the first of these backends that works here.
    ///
    /// # Errors
    /// As [`NvmeFile::create`]; [`Error::File`] when none of them works.
    pub fn create_with(
        backends: &'static [Backend],
        path: &Path,
        len: u64,
        charge: impl Into<Option<Charge>>,
    ) -> Result<Self, Error> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.map_err(|error| Error::file("creating", path, &error))?;
        let made = direct::preallocate(&file, path, len)
            .and_then(|()| Self::choose(backends, file, path, len, true, charge.into()));
        if made.is_err() {
            // A file that could not be made whole must not keep the bytes it got; the first error is the news.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Opens a file that is there, to read it.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (len, file) = opened.map_err(|error| Error::file("opening", path, &error))?;
        Self::choose(&BACKENDS, file, path, len, false, None)
    }

    fn choose(
        backends: &'static [Backend],
        buffered: File,
        path: &Path,
        len: u64,
        writable: bool,
        charge: Option<Charge>,
    ) -> Result<Self, Error> {
        let mut direct = direct::open(path, writable).map_err(|error| format!("direct I/O: {error}"));
        let mut fallback = None;
        for backend in backends {
            let obstacle = match (backend.direct, &direct) {
                (true, Err(why)) => Some(why.clone()),
                _ => (backend.queue)().err().map(|error| format!("{}: {error}", backend.name)),
            };
            if let Some(why) = obstacle {
                fallback.get_or_insert(why);
                continue;
            }
            let direct =
                if backend.direct { std::mem::replace(&mut direct, Err(String::new())).ok() } else { None };
            let handles =
                Arc::new(direct::Handles { path: path.into(), buffered, direct, moved: Default::default() });
            return Ok(Self { handles, len, backend, fallback, _charge: charge });
        }
        let why = std::io::Error::other(fallback.unwrap_or_else(|| "no backend was offered".into()));
        Err(Error::file("opening", path, &why))
    }

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// [`Error::Range`] when the file does not hold them, [`Error::Io`] when they cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.check(offset, bytes.len() as u64)?;
        plain::read(&self.handles, offset, bytes)
    }

    /// Writes `bytes` at `offset`. They are on the disk after [`NvmeFile::sync`].
    ///
    /// # Errors
    /// [`Error::Range`] when the file does not hold them, [`Error::Io`] when they cannot be written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.check(offset, bytes.len() as u64)?;
        plain::write(&self.handles, offset, bytes)
    }

    /// Gives it another name on the same disk, in place of what had that name.
    pub(crate) fn renamed(mut self, path: &Path) -> Result<Self, Error> {
        std::fs::rename(self.path(), path).map_err(|error| Error::file("renaming", self.path(), &error))?;
        let handles = Arc::get_mut(&mut self.handles).expect("no transfer is under way on a new file");
        handles.path = path.into();
        Ok(self)
    }

    /// Returns when everything written survives a power cut.
    ///
    /// # Errors
    /// [`Error::File`] when the disk does not confirm it.
    pub fn sync(&self) -> Result<(), Error> {
        let file = &self.handles.buffered;
        file.sync_data().map_err(|error| Error::file("flushing", &self.handles.path, &error))
    }

    /// Bytes read from it and written to it so far.
    pub fn moved(&self) -> [u64; 2] {
        std::array::from_fn(|way| self.handles.moved[way].load(Ordering::Relaxed))
    }

    /// Bytes it holds.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lies, or lay when it was made.
    pub fn path(&self) -> &Path {
        &self.handles.path
    }

    /// Whether aligned transfers pass the page cache.
    pub fn direct(&self) -> bool {
        self.handles.direct.is_some()
    }

    /// How it reaches the disk.
    pub fn backend(&self) -> &'static Backend {
        self.backend
    }

    /// Why the best backend was not taken, as a notice for the user.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// A queue for overlapped transfers.
    pub(crate) fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        (self.backend.queue)().map_err(|error| Error::file("opening an I/O queue for", self.path(), &error))
    }

    pub(crate) fn handles(&self) -> &Arc<direct::Handles> {
        &self.handles
    }

    /// Refuses bytes outside the file.
    pub(crate) fn check(&self, offset: u64, len: u64) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::Range { path: self.path().into(), offset, len, size: self.len }),
        }
    }
}
