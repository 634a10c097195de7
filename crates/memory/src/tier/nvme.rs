//! Entries as files of one directory.

use super::{Storage, Tier, check_key};
use crate::{Error, Kind, Ledger, NvmeFile};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Prefix of a file that does not have its entry's place yet. No key begins with a point.
const UNFINISHED: &str = ".new-";

/// A directory in which each entry is a file named by its key, charged to the nvme tier. Entries outlive the process;
/// those of an earlier one can be read.
#[derive(Debug)]
pub struct NvmeStorage {
    directory: PathBuf,
    ledger: Ledger,
    files: Mutex<HashMap<String, Arc<NvmeFile>>>,
}

impl NvmeStorage {
    /// Uses the directory, and makes it when it is not there.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be made.
    pub fn new(directory: &Path, ledger: &Ledger) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(|error| Error::file("creating", directory, &error))?;
        Ok(Self { directory: directory.into(), ledger: ledger.clone(), files: Mutex::default() })
    }

    /// The file behind an entry, for [`crate::stream`].
    ///
    /// # Errors
    /// [`Error::NoEntry`], or [`Error::File`] when it cannot be opened.
    pub fn file(&self, key: &str) -> Result<Arc<NvmeFile>, Error> {
        check_key(key)?;
        if let Some(file) = self.lock().get(key) {
            return Ok(file.clone());
        }
        match NvmeFile::open(&self.directory.join(key)) {
            Ok(file) => {
                let file = Arc::new(file);
                Ok(self.lock().entry(key.into()).or_insert(file).clone())
            }
            Err(Error::File { kind: ErrorKind::NotFound, .. }) => {
                Err(Error::NoEntry { storage: self.name().into(), key: key.into() })
            }
            Err(error) => Err(error),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<NvmeFile>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for NvmeStorage {
    fn name(&self) -> &str {
        "nvme"
    }

    fn capacity(&self) -> Option<u64> {
        self.ledger.budget().limit(Tier::Nvme)
    }

    fn create(&self, key: &str, kind: Kind, len: u64) -> Result<(), Error> {
        check_key(key)?;
        let charge = self.ledger.charge(Tier::Nvme, kind, len)?;
        let (unfinished, path) =
            (self.directory.join(format!("{UNFINISHED}{key}")), self.directory.join(key));
        let file = NvmeFile::create(&unfinished, len, charge)?;
        let file = file.renamed(&path).inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
        self.lock().insert(key.into(), Arc::new(file));
        Ok(())
    }

    fn read(&self, key: &str, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.file(key)?.read_at(offset, bytes)
    }

    fn write(&self, key: &str, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file(key)?.write_at(offset, bytes)
    }

    /// The directory is flushed with the file, or a power cut could take the name.
    fn sync(&self, key: &str) -> Result<(), Error> {
        self.file(key)?.sync()?;
        let flushed = File::open(&self.directory).and_then(|directory| directory.sync_all());
        flushed.map_err(|error| Error::file("flushing", &self.directory, &error))
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        check_key(key)?;
        self.lock().remove(key);
        let path = self.directory.join(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::file("deleting", &path, &error)),
            _ => Ok(()),
        }
    }
}
