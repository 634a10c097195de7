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

    /// Hands the system no more than `most` bytes at a time from now on (`usize::MAX`: all there is). A disk serves what it
    /// has been handed side by side, so that neighbours end together; held back, the first to be asked for ends first.
    fn hold(&mut self, most: usize);

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NvmeFile;

    #[test]
    fn transfers_held_back_end_in_the_order_they_were_asked_for() {
        const LEN: u64 = 3 << 20;
        for backend in BACKENDS.iter().filter(|backend| backend.name.starts_with("io_uring")) {
            let path = std::env::temp_dir().join(format!("hearth-hold-{}", std::process::id()));
            let file = NvmeFile::temporary(&path, 8 * LEN, None).expect("a temporary file");
            // Where the kernel has no io_uring there is nothing to hold back.
            let Ok(mut queue) = (backend.queue)() else { continue };
            queue.hold(1);
            for tag in [5, 0, 7, 1, 6, 2, 4, 3] {
                let mut buffer = AlignedBuffer::new(LEN as usize);
                buffer.set_len(LEN as usize);
                let (direction, file) = (Direction::Read, file.handles().clone());
                queue.submit(Transfer { tag, direction, file, offset: tag as u64 * LEN, buffer });
            }
            let mut ended: Vec<usize> = (0..4).map(|_| queue.wait().expect("four are left").tag).collect();
            assert_eq!(ended, [5, 0, 7, 1], "{backend:?}");
            queue.hold(usize::MAX);
            ended.extend(std::iter::from_fn(|| queue.wait()).map(|done| done.tag));
            ended.sort_unstable();
            assert_eq!(ended, [0, 1, 2, 3, 4, 5, 6, 7], "{backend:?}");
        }
    }
}
