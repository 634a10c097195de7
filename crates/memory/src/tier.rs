//! Where bytes lie, and the storages that hold them by key.
//!
//! A new storage is one file here that implements [`Storage`], and one line in [`STORAGES`]; the conformance suite in
//! `tests/storage` loops over that list.

mod faulty;
mod host;
mod nvme;

pub use faulty::{Fault, Faulty};
pub use host::HostStorage;
pub use nvme::NvmeStorage;

use crate::{Error, Kind, Ledger};
use std::fmt;
use std::path::Path;

/// Where bytes lie. On a machine without a GPU the device is the processor, and its memory the device tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Memory the arithmetic reads.
    Device,
    /// Main memory beside the device.
    Host,
    /// A fast disk.
    Nvme,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Nvme];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Nvme => "nvme",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes kept by key, each entry of a length fixed when it is made. Calls from several threads may interleave; those
/// that write bytes which others use at the same time leave either's bytes.
pub trait Storage: Send + Sync {
    /// As in reports: `host`, `nvme`.
    fn name(&self) -> &str;

    /// Bytes it may hold in all, `None` when nobody set a limit.
    fn capacity(&self) -> Option<u64>;

    /// Makes an entry of `len` zero bytes, in place of the one that had this key.
    ///
    /// # Errors
    /// [`Error::OverBudget`] or [`Error::DiskFull`] when it does not fit beside the old one, which then stays;
    /// [`Error::Key`] when the key is no name.
    fn create(&self, key: &str, kind: Kind, len: u64) -> Result<(), Error>;

    /// Fills `bytes` from `offset` of the entry.
    ///
    /// # Errors
    /// [`Error::NoEntry`], [`Error::Range`], or [`Error::Io`].
    fn read(&self, key: &str, offset: u64, bytes: &mut [u8]) -> Result<(), Error>;

    /// Writes `bytes` at `offset` of the entry.
    ///
    /// # Errors
    /// [`Error::NoEntry`], [`Error::Range`], or [`Error::Io`].
    fn write(&self, key: &str, offset: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Returns when what was written to the entry is as safe as this storage can make it.
    ///
    /// # Errors
    /// [`Error::NoEntry`], or [`Error::File`].
    fn sync(&self, key: &str) -> Result<(), Error>;

    /// Forgets the entry and gives its bytes back. Nothing happens when there is none.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be deleted.
    fn remove(&self, key: &str) -> Result<(), Error>;
}

/// A kind of storage, by name.
pub struct StorageEntry {
    /// As users write it.
    pub name: &'static str,
    /// Opens one that charges this ledger; those that need a directory use this one.
    pub open: OpenStorage,
}

/// Opens a storage.
pub type OpenStorage = fn(&Path, &Ledger) -> Result<Box<dyn Storage>, Error>;

/// Every kind of storage.
pub static STORAGES: [StorageEntry; 2] = [
    StorageEntry { name: "host", open: |_, ledger| Ok(Box::new(HostStorage::new(ledger))) },
    StorageEntry {
        name: "nvme",
        open: |directory, ledger| Ok(Box::new(NvmeStorage::new(directory, ledger)?)),
    },
];

/// Most bytes of a key: what file systems take as a name.
const LONGEST_KEY: usize = 200;

/// Keys become file names: nothing that leads out of the directory, or that some system reads differently.
fn check_key(key: &str) -> Result<(), Error> {
    let refuse = |why| Err(Error::Key { key: key.chars().take(LONGEST_KEY).collect(), why });
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match key {
        "" => refuse("it is empty"),
        _ if key.len() > LONGEST_KEY => refuse("it is longer than 200 bytes"),
        _ if key.starts_with('.') => refuse("it begins with a point"),
        _ if !key.chars().all(allowed) => {
            refuse("it has other characters than letters, digits, `.`, `_` and `-`")
        }
        _ => Ok(()),
    }
}
