//! What this machine does in a second: measured once, kept, and asked for again with `--measure`.
//!
//! Disk, memory and exchange are properties of the machine and are kept in `speeds/` of the cache directory, one file per
//! machine, folder of the nvme tier and number of ranks. Arithmetic is not: its speed depends on the model's shapes, and
//! is timed for each plan on one transformer block, the head and the embedding (see `hearth_train::Pace`).

use crate::machine;
use crate::ui::Ui;
use anyhow::Context;
use hearth_collective::{DEFAULT_TIMEOUT, Operation, Ordered, Rate, Watchdog, measure, threads};
use hearth_memory::probe;
use hearth_train::optim::{StateDtype, adam_bandwidth};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of the file that the disk is measured with.
const DISK_BYTES: u64 = 128 << 20;
/// Parameters that the update is measured with: 120 MB, more than caches hold.
const PARAMETERS: usize = 1 << 22;
/// Bytes of each rank's buffer.
const LINK_BYTES: usize = 16 << 20;

/// Bytes per second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Which machine: its name, processor and threads.
    pub machine: String,
    /// Folder of the nvme tier, if the recipe has one.
    pub directory: Option<PathBuf>,
    /// Ranks on the machine.
    pub ranks: usize,
    /// What the optimizer reads and writes in memory.
    pub memory: f64,
    /// The disk of the nvme tier.
    pub disk: Option<Disk>,
    /// What all ranks together receive, as threads of one process; nothing of a single one.
    pub link: Option<f64>,
}

/// The disk, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// Reading alone.
    pub read: f64,
    /// Writing alone.
    pub write: f64,
    /// Both at once, together.
    pub both: f64,
}

impl Measured {
    /// What is kept of an earlier measurement, or a new one with `again` or where there is none.
    ///
    /// # Errors
    /// A disk that cannot be written.
    pub fn of(directory: Option<&Path>, ranks: usize, again: bool, ui: &Ui) -> anyhow::Result<Self> {
        let directory = directory.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        let machine = machine_name();
        let file = kept_in(&machine, directory.as_deref(), ranks);
        let kept = file.as_ref().filter(|_| !again).and_then(|file| read(file));
        if let Some(kept) = kept.filter(|kept| (kept.ranks, &kept.directory) == (ranks, &directory)) {
            return Ok(kept);
        }
        ui.note("measuring this machine's memory, disk and exchange, once …");
        let measured = Self {
            disk: directory.as_deref().map(disk).transpose()?,
            memory: adam_bandwidth(PARAMETERS, StateDtype::F32, true).gb_s * 1e9,
            link: (ranks > 1).then(|| link(ranks)).transpose()?,
            machine,
            directory,
            ranks,
        };
        if let Some(file) = file
            && let Err(error) = measured.keep(&file)
        {
            ui.note(format!("{}: not kept, the next plan measures again: {error}", file.display()));
        }
        Ok(measured)
    }

    fn keep(&self, file: &Path) -> anyhow::Result<()> {
        let folder = file.parent().expect("a file in a folder");
        fs::create_dir_all(folder)?;
        let mut whole = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut whole, self)?;
        whole.persist(file)?;
        Ok(())
    }
}

/// A file that is damaged counts as none.
fn read(file: &Path) -> Option<Measured> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

fn machine_name() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{} ({}, {} threads)", host.trim(), machine::cpu_name(), machine::threads())
}

fn kept_in(machine: &str, directory: Option<&Path>, ranks: usize) -> Option<PathBuf> {
    let key = format!("{machine}\n{}\n{ranks}", directory.unwrap_or(Path::new("")).display());
    let name: String = Sha256::digest(key)[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Some(machine::cache_dir()?.join("speeds").join(format!("{name}.json")))
}

/// The disk under the nearest folder that is there already: planning makes none.
fn disk(directory: &Path) -> anyhow::Result<Disk> {
    let there = directory.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let speed = probe::disk(there, DISK_BYTES)
        .with_context(|| format!("measuring the disk under {}", there.display()))?;
    Ok(Disk { read: speed.read_gb_s * 1e9, write: speed.write_gb_s * 1e9, both: speed.mixed_gb_s * 1e9 })
}

/// What `ranks` threads together receive in a second of reduce-scatter and all-gather, the exchange of every stage.
fn link(ranks: usize) -> anyhow::Result<f64> {
    let group = threads::group(ranks).into_iter();
    let members: Vec<Ordered> =
        group.map(|rank| Ordered::start(Box::new(rank), Watchdog::new(DEFAULT_TIMEOUT))).collect();
    let rates = std::thread::scope(|scope| {
        let work = |rank: Ordered| scope.spawn(move || measure(&rank, LINK_BYTES));
        let all: Vec<_> = members.into_iter().map(work).collect();
        let mut all = all.into_iter().map(|rank| rank.join().expect("measuring does not panic"));
        let first = all.next().expect("at least two ranks");
        all.try_for_each(|other| other.map(drop)).and(first)
    })?;
    let used = [Operation::ReduceScatter, Operation::AllGather];
    let used: Vec<&Rate> = rates.iter().filter(|rate| used.contains(&rate.operation)).collect();
    // Each rank receives all but its own part.
    let received: usize = used.iter().map(|rate| rate.bytes * (ranks - 1)).sum();
    Ok(received as f64 / used.iter().map(|rate| rate.seconds).sum::<f64>())
}
