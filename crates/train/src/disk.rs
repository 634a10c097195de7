//! A rank's files on the nvme tier: nameless once open, so that nothing is left behind, whatever ends the run.

use crate::Error;
use crate::sizes::{ALIGN, BOUNCE, Sizes};
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::nvme::NvmeFile;
use hearth_memory::{Kind, Ledger, Tier};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A charged file of `bytes` in the configured directory.
pub(crate) fn file(
    sizes: &Sizes<'_>,
    what: &str,
    bytes: u64,
    kind: Kind,
    ledger: &Ledger,
) -> Result<NvmeFile, Error> {
    let Some(dir) = &sizes.config.offload.nvme_dir else {
        return Err(Error::Config(format!(
            "[offload] puts the {what} on nvme; say in which directory with offload.nvme_path"
        )));
    };
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let charge = ledger.charge(Tier::Nvme, kind, bytes)?;
    let name = format!("hearth-{}-{}-{what}", std::process::id(), sizes.layout.rank());
    Ok(NvmeFile::temporary(&dir.join(name), bytes, charge)?)
}

/// Time that somebody waited for a disk.
#[derive(Debug, Default)]
pub(crate) struct Waited(AtomicU64);

impl Waited {
    /// Counts the time that `work` takes.
    pub(crate) fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let done = work();
        self.0.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
        done
    }

    /// Seconds since this was last asked.
    pub(crate) fn take_s(&self) -> f64 {
        self.0.swap(0, Ordering::Relaxed) as f64 / 1e9
    }
}

/// Writes bytes that lie anywhere past the page cache: from where they are if they are aligned, else by way of an
/// aligned buffer of at most [`BOUNCE`]. `offset` is aligned, and so is the room that the file has for them: the last
/// page is filled up with zeros.
pub(crate) fn write(file: &NvmeFile, offset: u64, bytes: &[u8]) -> Result<(), hearth_memory::Error> {
    let aligned = (bytes.as_ptr() as usize).is_multiple_of(ALIGN as usize);
    let (direct, rest) = bytes.split_at(if aligned { bytes.len() - bytes.len() % ALIGN as usize } else { 0 });
    file.write_at(offset, direct)?;
    let offset = offset + direct.len() as u64;
    let mut buffer = AlignedBuffer::new(rest.len().min(BOUNCE).next_multiple_of(ALIGN as usize));
    for (at, part) in rest.chunks(BOUNCE).enumerate() {
        let whole = part.len().next_multiple_of(ALIGN as usize);
        buffer[..part.len()].copy_from_slice(part);
        buffer[part.len()..whole].fill(0);
        file.write_at(offset + (at * BOUNCE) as u64, &buffer[..whole])?;
    }
    Ok(())
}
