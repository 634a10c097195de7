//! A rank's files on the nvme tier: nameless once open, so that nothing is left behind, whatever ends the run.

use crate::Error;
use crate::sizes::{ALIGN, BOUNCE, Sizes};
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::nvme::NvmeFile;
use hearth_memory::{Kind, Ledger, Tier};

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

/// Writes bytes that lie anywhere past the page cache, by way of an aligned buffer of at most [`BOUNCE`]. `offset` is
/// aligned, and so is the room that the file has for them: the last page is filled up with zeros.
pub(crate) fn write(file: &NvmeFile, offset: u64, bytes: &[u8]) -> Result<(), hearth_memory::Error> {
    let mut buffer = AlignedBuffer::new(bytes.len().min(BOUNCE).next_multiple_of(ALIGN as usize));
    for (at, part) in bytes.chunks(BOUNCE).enumerate() {
        let whole = part.len().next_multiple_of(ALIGN as usize);
        buffer[..part.len()].copy_from_slice(part);
        buffer[part.len()..whole].fill(0);
        file.write_at(offset + (at * BOUNCE) as u64, &buffer[..whole])?;
    }
    Ok(())
}
