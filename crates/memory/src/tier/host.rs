//! Entries in main memory.

use super::{Storage, Tier, check_key};
use crate::{AlignedBuffer, Error, Kind, Ledger};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

type Entry = Arc<RwLock<AlignedBuffer>>;

/// Main memory, charged to the host tier.
#[derive(Debug)]
pub struct HostStorage {
    ledger: Ledger,
    entries: RwLock<HashMap<String, Entry>>,
}

impl HostStorage {
    /// Without entries.
    pub fn new(ledger: &Ledger) -> Self {
        Self { ledger: ledger.clone(), entries: RwLock::default() }
    }

    fn entry(&self, key: &str) -> Result<Entry, Error> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(key).cloned();
        entry.ok_or_else(|| Error::NoEntry { storage: self.name().into(), key: key.into() })
    }
}

/// Where `len` bytes at `offset` lie in an entry of `size`.
fn within(key: &str, offset: u64, len: usize, size: usize) -> Result<Range<usize>, Error> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= size as u64 => Ok(offset as usize..end as usize),
        _ => Err(Error::Range { path: key.into(), offset, len: len as u64, size: size as u64 }),
    }
}

impl Storage for HostStorage {
    fn name(&self) -> &str {
        "host"
    }

    fn capacity(&self) -> Option<u64> {
        self.ledger.budget().limit(Tier::Host)
    }

    fn create(&self, key: &str, kind: Kind, len: u64) -> Result<(), Error> {
        check_key(key)?;
        let len = usize::try_from(len).map_err(|_| Error::OutOfMemory { bytes: len })?;
        let buffer = AlignedBuffer::charged(&self.ledger, Tier::Host, kind, len)?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.insert(key.into(), Arc::new(RwLock::new(buffer)));
        Ok(())
    }

    fn read(&self, key: &str, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let entry = self.entry(key)?;
        let entry = entry.read().unwrap_or_else(PoisonError::into_inner);
        bytes.copy_from_slice(&entry[within(key, offset, bytes.len(), entry.len())?]);
        Ok(())
    }

    fn write(&self, key: &str, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let entry = self.entry(key)?;
        let mut entry = entry.write().unwrap_or_else(PoisonError::into_inner);
        let range = within(key, offset, bytes.len(), entry.len())?;
        entry[range].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self, key: &str) -> Result<(), Error> {
        self.entry(key).map(|_| ())
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(key);
        Ok(())
    }
}
