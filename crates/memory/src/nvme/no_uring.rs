//! Stands in for io_uring where the kernel is not Linux.

use super::queue::Queue;
use std::io;

pub(super) fn queue() -> io::Result<Box<dyn Queue>> {
    Err(io::ErrorKind::Unsupported.into())
}
