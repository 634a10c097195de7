//! Opening files past the page cache, and claiming their bytes on the disk.

use super::Direction;
use crate::Error;
use crate::buffer::{ALIGNMENT, AlignedBuffer};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// An open file, once through the page cache and, where the disk can, once past it.
#[derive(Debug)]
pub(crate) struct Handles {
    pub path: PathBuf,
    pub buffered: File,
    pub direct: Option<File>,
    /// Bytes read and written so far.
    pub moved: [AtomicU64; 2],
}

impl Handles {
    /// Counts bytes that were read or written.
    pub fn count(&self, way: Direction, bytes: usize) {
        self.moved[way as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The descriptor that a request goes to.
    pub fn file(&self, direct: bool) -> &File {
        match &self.direct {
            Some(file) if direct => file,
            _ => &self.buffered,
        }
    }
}

/// Opens the file a second time, past the page cache; an error says why this disk cannot.
#[cfg(target_os = "linux")]
pub(super) fn open(path: &Path, writable: bool) -> io::Result<File> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path)?;
    // Some file systems accept the flag and refuse the first request.
    file.read_at(&mut AlignedBuffer::new(ALIGNMENT), 0)?;
    Ok(file)
}

/// Elsewhere the page cache cannot be passed with a flag.
#[cfg(not(target_os = "linux"))]
pub(super) fn open(_: &Path, _: bool) -> io::Result<File> {
    let _ = (ALIGNMENT, AlignedBuffer::capacity_for, OpenOptions::new);
    Err(io::ErrorKind::Unsupported.into())
}

/// Claims `len` bytes on the disk now, so that a full disk shows here and not in the middle of a step.
pub(super) fn preallocate(file: &File, path: &Path, len: u64) -> Result<(), Error> {
    let free = free_bytes(path)?;
    let full = || Error::DiskFull { path: path.into(), needed: len, free };
    if len > free {
        return Err(full());
    }
    match allocate(file, len) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Err(full()),
        Err(error) => Err(Error::file("reserving the bytes of", path, &error)),
    }
}

#[cfg(target_os = "linux")]
fn allocate(file: &File, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
        // A file system that cannot promise bytes still has room for them now.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(len),
        other => Ok(other?),
    }
}

#[cfg(not(target_os = "linux"))]
fn allocate(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)
}

/// Bytes that the file system of `path` still gives to us.
///
/// # Errors
/// [`Error::File`] when it cannot be asked.
pub fn free_bytes(path: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|error| Error::file("asking for the free bytes of", path, &error.into()))?;
    // A memory file system without a limit reports no blocks at all.
    Ok(if stat.f_blocks == 0 { u64::MAX } else { stat.f_bavail.saturating_mul(stat.f_frsize) })
}
