//! The registry of backends: a new one is a file beside [`threads`] and a line in [`BACKENDS`].

use crate::{ProcessGroup, threads};

/// A way to connect ranks.
pub struct Backend {
    /// As the user names it.
    pub name: &'static str,
    /// Opens a group of that world size and gives the ranks that live in this process, in order.
    pub open: fn(world_size: usize) -> Vec<Box<dyn ProcessGroup>>,
}

/// Every backend.
pub static BACKENDS: &[Backend] = &[Backend { name: "threads", open: boxed_threads }];

fn boxed_threads(world_size: usize) -> Vec<Box<dyn ProcessGroup>> {
    threads::group(world_size).into_iter().map(|rank| Box::new(rank) as Box<dyn ProcessGroup>).collect()
}
