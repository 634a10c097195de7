//! A rank's files on the nvme tier: nameless once open, so that nothing is left behind, whatever ends the run.

use crate::Error;
use crate::sizes::Sizes;
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
