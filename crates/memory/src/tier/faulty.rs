//! A storage that fails on purpose, to learn whether what is built on storages survives it.

use super::Storage;
use crate::{Error, Kind};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};

/// What goes wrong, and when. Writes and operations are counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The disk is full once this many bytes were written: the write that crosses the limit stops there, and it and
    /// all later ones fail.
    FullAfter {
        /// Bytes that still fit.
        bytes: u64,
    },
    /// This write loses its tail and says it went well: what a power cut does to bytes that were not flushed.
    ShortWrite {
        /// Which write.
        write: u64,
    },
    /// This write turns one bit over and says it went well.
    FlippedBit {
        /// Which write.
        write: u64,
    },
    /// This read, write, sync, creation or removal fails with an I/O error and does nothing.
    Failing {
        /// Which operation.
        operation: u64,
    },
}

/// Passes everything on to another storage, except where a [`Fault`] strikes. The same seed and the same calls meet
/// the same faults.
pub struct Faulty<S> {
    inner: S,
    seed: u64,
    faults: Vec<Fault>,
    operations: AtomicU64,
    writes: AtomicU64,
    written: AtomicU64,
}

impl<S: Storage> Faulty<S> {
    /// With these faults; `seed` decides which bit is flipped and where a short write ends.
    pub fn new(inner: S, seed: u64, faults: Vec<Fault>) -> Self {
        let (operations, writes, written) = Default::default();
        Self { inner, seed, faults, operations, writes, written }
    }

    /// The storage behind it.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Operations asked of it so far: where a test that fails each in turn may stop.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::SeqCst)
    }

    fn begin(&self, action: &'static str, key: &str, offset: u64, len: usize) -> Result<(), Error> {
        let operation = self.operations.fetch_add(1, Ordering::SeqCst);
        if self.faults.contains(&Fault::Failing { operation }) {
            return Err(failure(action, key, offset, len, ErrorKind::Other, "input/output error (injected)"));
        }
        Ok(())
    }

    /// Bytes of this write that still fit on the disk.
    fn room(&self, len: usize) -> usize {
        let before = self.written.fetch_add(len as u64, Ordering::SeqCst);
        let limits = self.faults.iter().filter_map(|fault| match fault {
            Fault::FullAfter { bytes } => Some(bytes.saturating_sub(before)),
            _ => None,
        });
        limits.min().map_or(len, |left| left.min(len as u64) as usize)
    }

    /// A number below `end` that depends on nothing but the seed and `salt`.
    fn choose(&self, salt: u64, end: usize) -> usize {
        let mut z = self.seed.wrapping_add((salt + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

fn failure(action: &'static str, key: &str, offset: u64, len: usize, kind: ErrorKind, why: &str) -> Error {
    Error::Io { action, path: key.into(), offset, len: len as u64, kind, why: why.into() }
}

impl<S: Storage> Storage for Faulty<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capacity(&self) -> Option<u64> {
        self.inner.capacity()
    }

    fn create(&self, key: &str, kind: Kind, len: u64) -> Result<(), Error> {
        self.begin("creating", key, 0, len as usize)?;
        self.inner.create(key, kind, len)
    }

    fn read(&self, key: &str, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.begin("reading", key, offset, bytes.len())?;
        self.inner.read(key, offset, bytes)
    }

    fn write(&self, key: &str, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.begin("writing", key, offset, bytes.len())?;
        let write = self.writes.fetch_add(1, Ordering::SeqCst);
        let room = self.room(bytes.len());
        if room < bytes.len() {
            self.inner.write(key, offset, &bytes[..room])?;
            let why = "no space left on device (injected)";
            return Err(failure("writing", key, offset, bytes.len(), ErrorKind::StorageFull, why));
        }
        if bytes.is_empty() {
            return self.inner.write(key, offset, bytes);
        }
        if self.faults.contains(&Fault::ShortWrite { write }) {
            return self.inner.write(key, offset, &bytes[..self.choose(write, bytes.len())]);
        }
        if self.faults.contains(&Fault::FlippedBit { write }) {
            let (mut flipped, bit) = (bytes.to_vec(), self.choose(write, bytes.len() * 8));
            flipped[bit / 8] ^= 1 << (bit % 8);
            return self.inner.write(key, offset, &flipped);
        }
        self.inner.write(key, offset, bytes)
    }

    fn sync(&self, key: &str) -> Result<(), Error> {
        self.begin("flushing", key, 0, 0)?;
        self.inner.sync(key)
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        self.begin("deleting", key, 0, 0)?;
        self.inner.remove(key)
    }
}

impl Storage for Box<dyn Storage> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn capacity(&self) -> Option<u64> {
        (**self).capacity()
    }

    fn create(&self, key: &str, kind: Kind, len: u64) -> Result<(), Error> {
        (**self).create(key, kind, len)
    }

    fn read(&self, key: &str, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        (**self).read(key, offset, bytes)
    }

    fn write(&self, key: &str, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        (**self).write(key, offset, bytes)
    }

    fn sync(&self, key: &str) -> Result<(), Error> {
        (**self).sync(key)
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        (**self).remove(key)
    }
}
