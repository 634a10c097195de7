//! Outputs that are complete or invisible: written beside their destination, made durable, then renamed.

use crate::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A file being written under a temporary name; removed unless committed.
pub(crate) struct StagedFile(Staged);

/// A directory being filled under a temporary name; removed unless committed.
pub(crate) struct StagedDir(Staged);

impl StagedFile {
    pub(crate) fn create(destination: &Path) -> Result<StagedFile, Error> {
        Staged::new(destination).map(StagedFile)
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.0.temporary
    }

    pub(crate) fn commit(self) -> Result<(), Error> {
        self.0.commit()
    }
}

impl StagedDir {
    pub(crate) fn create(destination: &Path) -> Result<StagedDir, Error> {
        let staged = Staged::new(destination)?;
        fs::create_dir(&staged.temporary).map_err(Error::io(&staged.temporary))?;
        Ok(StagedDir(staged))
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.0.temporary
    }

    /// The name it will get.
    pub(crate) fn destination(&self) -> &Path {
        &self.0.destination
    }

    /// Writes a whole small file and makes it durable.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path().join(name);
        fs::write(&path, bytes).map_err(Error::io(&path))?;
        sync(&path)
    }

    pub(crate) fn commit(self) -> Result<(), Error> {
        sync(&self.0.temporary)?;
        self.0.commit()
    }
}

struct Staged {
    destination: PathBuf,
    temporary: PathBuf,
    committed: bool,
}

/// Tells apart outputs of one process that are staged at the same time.
static NEXT: AtomicU32 = AtomicU32::new(0);

impl Staged {
    fn new(destination: &Path) -> Result<Staged, Error> {
        refuse_existing(destination)?;
        let name = destination.file_name().ok_or_else(|| {
            Error::unsupported(
                destination,
                "it is not a name for an output: give a file or directory to create",
            )
        })?;
        let parent = parent_of(destination);
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary =
            parent.join(format!(".{}.partial-{}-{number}", name.to_string_lossy(), std::process::id()));
        // A crashed process that had the same id may have left one behind.
        remove(&temporary);
        Ok(Staged { destination: destination.to_owned(), temporary, committed: false })
    }

    fn commit(mut self) -> Result<(), Error> {
        refuse_existing(&self.destination)?;
        fs::rename(&self.temporary, &self.destination).map_err(Error::io(&self.destination))?;
        self.committed = true;
        sync(parent_of(&self.destination))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed {
            remove(&self.temporary);
        }
    }
}

fn refuse_existing(destination: &Path) -> Result<(), Error> {
    match fs::symlink_metadata(destination) {
        Ok(_) => Err(Error::Exists { path: destination.to_owned() }),
        Err(_) => Ok(()),
    }
}

fn remove(path: &Path) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    // Best effort: the output never became visible, so a leftover harms nobody.
    let _ = if meta.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Flushes a file or directory to the disk.
fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|f| f.sync_all()).map_err(Error::io(path))
}
