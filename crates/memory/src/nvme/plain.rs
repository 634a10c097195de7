//! Positioned reads and writes: by the caller, and by a few threads where the kernel has no io_uring.

use super::direct::Handles;
use super::queue::{Direction, Done, Queue, Transfer, io_error};
use super::segment::cut;
use crate::Error;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Bytes per system call. The kernel cuts a long direct request itself and keeps all its parts in flight at once, so
/// one call per thread fills the disk's queue.
const REQUEST_BYTES: usize = 32 << 20;

/// Reads or writes `bytes` in the caller's thread.
pub(super) fn read(file: &Handles, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
    for part in cut(offset, bytes.as_ptr() as usize, bytes.len(), file.direct.is_some(), REQUEST_BYTES) {
        let mut rest = part;
        while rest.len > 0 {
            let memory = &mut bytes[rest.start..rest.start + rest.len];
            let moved = file.file(rest.direct).read_at(memory, rest.offset);
            let moved = progress(moved, ErrorKind::UnexpectedEof);
            let moved = moved.map_err(|e| io_error(Direction::Read, file, rest.offset, rest.len, &e))?;
            file.count(Direction::Read, moved);
            rest = rest.rest(moved);
        }
    }
    Ok(())
}

/// Writes `bytes` in the caller's thread.
pub(super) fn write(file: &Handles, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    for part in cut(offset, bytes.as_ptr() as usize, bytes.len(), file.direct.is_some(), REQUEST_BYTES) {
        let mut rest = part;
        while rest.len > 0 {
            let memory = &bytes[rest.start..rest.start + rest.len];
            let moved = progress(file.file(rest.direct).write_at(memory, rest.offset), ErrorKind::WriteZero);
            let moved = moved.map_err(|e| io_error(Direction::Write, file, rest.offset, rest.len, &e))?;
            file.count(Direction::Write, moved);
            rest = rest.rest(moved);
        }
    }
    Ok(())
}

/// Bytes moved by one call; a call that moved none would never end.
fn progress(moved: io::Result<usize>, none: ErrorKind) -> io::Result<usize> {
    match moved {
        Ok(0) => Err(none.into()),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
        other => other,
    }
}

/// Transfers in flight at once: one read ahead, one being written back, and one more of each.
const THREADS: usize = 4;

/// Threads that each take one transfer at a time.
struct PlainQueue {
    /// `None` once the threads are told to end.
    submit: Option<Sender<Transfer>>,
    done: Receiver<Done>,
    in_flight: usize,
    threads: Vec<JoinHandle<()>>,
}

pub(super) fn queue() -> io::Result<Box<dyn Queue>> {
    let (submit, transfers) = channel();
    let (finished, done) = channel();
    let mut queue = PlainQueue { submit: Some(submit), done, in_flight: 0, threads: Vec::new() };
    let transfers = Arc::new(Mutex::new(transfers));
    for _ in 0..THREADS {
        let (transfers, finished) = (transfers.clone(), finished.clone());
        let thread = std::thread::Builder::new().name("hearth-io".into());
        queue.threads.push(thread.spawn(move || run(&transfers, &finished))?);
    }
    Ok(Box::new(queue))
}

fn run(transfers: &Mutex<Receiver<Transfer>>, finished: &Sender<Done>) {
    loop {
        let next = transfers.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut transfer) = next else { return };
        let result = match transfer.direction {
            Direction::Read => read(&transfer.file, transfer.offset, &mut transfer.buffer),
            Direction::Write => write(&transfer.file, transfer.offset, &transfer.buffer),
        };
        if finished.send(transfer.finish(result)).is_err() {
            return;
        }
    }
}

impl Queue for PlainQueue {
    fn submit(&mut self, transfer: Transfer) {
        let sender = self.submit.as_ref().expect("the sender lives until the queue is dropped");
        sender.send(transfer).expect("the threads outlive the sender");
        self.in_flight += 1;
    }

    fn hold(&mut self, _most: usize) {
        // Each thread reads one transfer, the first of those that wait.
    }

    fn wait(&mut self) -> Option<Done> {
        if self.in_flight == 0 {
            return None;
        }
        let done = self.done.recv().expect("every transfer is answered");
        self.in_flight -= 1;
        Some(done)
    }

    fn poll(&mut self) -> Option<Done> {
        let done = self.done.try_recv().ok()?;
        self.in_flight -= 1;
        Some(done)
    }
}

impl Drop for PlainQueue {
    fn drop(&mut self) {
        self.submit = None;
        for thread in self.threads.drain(..) {
            // Its panic has been printed; a second one here would abort.
            let _ = thread.join();
        }
    }
}
