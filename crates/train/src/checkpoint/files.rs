//! The file operations a checkpoint is made of, so that tests can let each of them fail.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

/// Where checkpoints are written: the disk, or in tests a disk that fills up or dies.
pub trait Files: Send + Sync {
    /// Creates a directory and its missing parents.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Creates or empties a file for writing.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Write>>;
    /// Creates or empties a file and gives it `bytes` bytes; a disk that has not that much room says so here.
    fn allocate(&self, path: &Path, bytes: u64) -> io::Result<()>;
    /// Opens a file that is there for writing at positions. Several processes may hold one each.
    fn open(&self, path: &Path) -> io::Result<Box<dyn WriteAt>>;
    /// Makes a file's data, or a directory's entries, survive a power cut.
    fn sync(&self, path: &Path) -> io::Result<()>;
    /// Renames a file or directory atomically.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a directory and everything in it.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// A file open for writing at positions.
pub trait WriteAt: Send {
    /// Writes some of `bytes` at `offset` and says how many.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize>;
    /// Makes what was written survive a power cut.
    fn sync(&mut self) -> io::Result<()>;
}

/// Writes all of `bytes` at `offset`, in as many writes as the file wants.
pub(super) fn write_all_at(file: &mut dyn WriteAt, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write_at(offset, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                bytes = &bytes[written..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The real disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl Files for Disk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Write>> {
        Ok(Box::new(File::create(path)?))
    }

    fn allocate(&self, path: &Path, bytes: u64) -> io::Result<()> {
        reserve(&File::create(path)?, bytes)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn WriteAt>> {
        Ok(Box::new(fs::OpenOptions::new().write(true).open(path)?))
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}

impl WriteAt for File {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        // The handle is ours alone, so that moving its position disturbs nobody.
        self.seek(SeekFrom::Start(offset))?;
        self.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Gives a new file its length, and its blocks where the filesystem can promise them.
#[cfg(target_os = "linux")]
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    match bytes {
        0 => return Ok(()),
        _ => match fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        },
    }
    file.set_len(bytes)
}

/// Gives a new file its length.
#[cfg(not(target_os = "linux"))]
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)
}
