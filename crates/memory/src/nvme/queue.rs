//! Transfers that run while the caller computes.

use super::direct::Handles;
use super::{plain, uring};
use crate::{AlignedBuffer, Error};
use std::io;
use std::sync::Arc;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

impl Direction {
    pub fn action(self) -> &'static str {
        match self {
            Direction::Read => "reading",
            Direction::Write => "writing",
        }
    }
}

/// Moves the shown bytes of a buffer. The queue owns the buffer until the transfer is [`Done`], so that memory the
/// kernel may still touch is never freed or read.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// The caller's name for it.
    pub tag: usize,
    pub direction: Direction,
    pub file: Arc<Handles>,
    pub offset: u64,
    pub buffer: AlignedBuffer,
}

impl Transfer {
    pub fn error(&self, error: &io::Error) -> Error {
        io_error(self.direction, &self.file, self.offset, self.buffer.len(), error)
    }

    pub fn finish(self, result: Result<(), Error>) -> Done {
        Done { tag: self.tag, direction: self.direction, buffer: self.buffer, result }
    }
}

pub(super) fn io_error(way: Direction, file: &Handles, offset: u64, len: usize, error: &io::Error) -> Error {
    Error::Io {
        action: way.action(),
        path: file.path.clone(),
        offset,
        len: len as u64,
        kind: error.kind(),
        why: error.to_string(),
    }
}

/// A transfer that is over, well or not.
#[derive(Debug)]
pub(crate) struct Done {
    pub tag: usize,
    pub direction: Direction,
    pub buffer: AlignedBuffer,
    pub result: Result<(), Error>,
}

/// Runs transfers beside the caller, in any order. Dropping it waits for those that have begun.
pub(crate) trait Queue: Send {
    /// Begins a transfer; returns at once.
    fn submit(&mut self, transfer: Transfer);

    /// A transfer that is over; waits for one; `None` when none was left to wait for.
    fn wait(&mut self) -> Option<Done>;

    /// A transfer that is over, if there is one now. Also hands on requests that did not fit earlier.
    fn poll(&mut self) -> Option<Done>;
}

/// A way to reach a disk.
pub struct Backend {
    /// As in reports.
    pub name: &'static str,
    /// Whether it passes the page cache where the disk can.
    pub direct: bool,
    pub(crate) queue: fn() -> io::Result<Box<dyn Queue>>,
}

/// Every backend, the best first. The first whose queue opens and whose disk agrees is used.
pub static BACKENDS: [Backend; 4] = [
    Backend { name: "io_uring direct", direct: true, queue: uring::queue },
    Backend { name: "positioned direct", direct: true, queue: plain::queue },
    Backend { name: "io_uring buffered", direct: false, queue: uring::queue },
    Backend { name: "positioned buffered", direct: false, queue: plain::queue },
];

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}
