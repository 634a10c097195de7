//! The registry of backends: a new one is a file beside [`threads`] and a line in [`BACKENDS`].

use crate::{Error, ProcessGroup, mpi, threads};

/// The ranks of a group that live in this process, in order.
pub type Ranks = Vec<Box<dyn ProcessGroup>>;

/// A way to connect ranks.
pub struct Backend {
    /// As the user names it.
    pub name: &'static str,
    /// Whether it connects the ranks of this process: its launcher started it, or it needs none.
    pub is_here: fn() -> bool,
    /// Opens a group of that world size and gives the ranks that live in this process.
    pub open: fn(world_size: usize) -> Result<Ranks, Error>,
}

/// Every backend. The first that [is here](Backend::is_here) connects the ranks.
pub static BACKENDS: &[Backend] = &[
    Backend { name: "mpi", is_here: || mpi::launched().is_some(), open: open_mpi },
    Backend { name: "threads", is_here: || true, open: open_threads },
];

/// Opens a group of `world_size` ranks and gives those that live in this process: the one that this process is if a
/// launcher started it, else all of them, for a thread each.
///
/// # Errors
/// [`Error::WorldSize`] if a launcher started another number of ranks; what the backend's `open` says.
pub fn open(world_size: usize) -> Result<Ranks, Error> {
    let backend = BACKENDS.iter().find(|backend| (backend.is_here)()).expect("threads always are");
    (backend.open)(world_size)
}

fn open_threads(world_size: usize) -> Result<Ranks, Error> {
    Ok(threads::group(world_size).into_iter().map(|rank| Box::new(rank) as Box<dyn ProcessGroup>).collect())
}

fn open_mpi(wanted: usize) -> Result<Ranks, Error> {
    let groups: Vec<_> = mpi::connect()?.into_iter().collect();
    match groups.iter().map(|group| group.world_size()).find(|launched| *launched != wanted) {
        Some(launched) => Err(Error::WorldSize { launched, wanted }),
        None => Ok(groups),
    }
}
