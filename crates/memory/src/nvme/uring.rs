//! Transfers through the kernel's shared rings: no thread, no copy, one call for many requests.
#![allow(unsafe_code)] // The kernel reads and writes memory that the compiler cannot see it use.

use super::queue::{Direction, Done, Queue, Transfer};
use super::segment::{Segment, cut};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

/// Bytes per request: the most that the kernel takes as one piece from memory of 4 KiB pages. It hands on a longer one
/// while the submitting thread waits, which that thread should spend computing (measured: 2 MiB cost it up to 29% of a
/// pass, 1 MiB 9 to 14%, and 3% from huge pages).
const REQUEST_BYTES: usize = 1 << 20;

/// Requests the kernel holds at once.
const DEPTH: u32 = 128;

/// Where a transfer's bytes lie. Taken once, before the kernel gets the first request, since no reference to the bytes
/// may be made while the kernel holds one.
#[derive(Clone, Copy)]
struct Memory(*mut u8);

// SAFETY: it points into a buffer that moves between threads together with it.
unsafe impl Send for Memory {}

/// A transfer of which some requests are not over.
struct Active {
    transfer: Transfer,
    memory: Memory,
    requests_left: usize,
    error: Option<io::Error>,
}

/// One request, waiting or in the kernel.
#[derive(Clone, Copy)]
struct Request {
    /// Index of its transfer.
    active: usize,
    segment: Segment,
}

struct UringQueue {
    ring: IoUring,
    /// Transfers by index; a free index is `None`.
    active: Vec<Option<Active>>,
    /// Requests that the kernel holds, by the number it knows them by.
    running: Vec<Option<Request>>,
    /// Requests that wait for a free number.
    waiting: VecDeque<Request>,
    /// Bytes of requests that the kernel holds, and the most that it is handed.
    held_bytes: usize,
    most_bytes: usize,
    done: VecDeque<Done>,
}

pub(super) fn queue() -> io::Result<Box<dyn Queue>> {
    let ring = IoUring::new(DEPTH)?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
        return Err(ErrorKind::Unsupported.into());
    }
    Ok(Box::new(UringQueue {
        ring,
        active: Vec::new(),
        running: vec![None; DEPTH as usize],
        waiting: VecDeque::new(),
        held_bytes: 0,
        most_bytes: usize::MAX,
        done: VecDeque::new(),
    }))
}

impl UringQueue {
    /// Hands waiting requests to the kernel while it has room.
    fn feed(&mut self) -> io::Result<()> {
        while self.held_bytes < self.most_bytes
            && let Some(number) = self.running.iter().position(Option::is_none)
        {
            let Some(request) = self.waiting.pop_front() else { break };
            let Some(active) = &self.active[request.active] else { continue };
            let entry = active.entry(request.segment).user_data(number as u64);
            // SAFETY: the descriptor and the memory of the entry belong to `active`, which is given back only when
            // all its requests are over, and leaked when that cannot be learned.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_err() {
                self.waiting.push_front(request);
                break;
            }
            self.running[number] = Some(request);
            self.held_bytes += request.segment.len;
        }
        accept(self.ring.submit())
    }

    /// Takes what the kernel has answered.
    fn reap(&mut self) {
        let answers: Vec<cqueue::Entry> = self.ring.completion().collect();
        for answer in answers {
            let Some(request) = self.running[answer.user_data() as usize].take() else { continue };
            self.held_bytes -= request.segment.len;
            self.answer(request, answer.result());
        }
    }

    fn answer(&mut self, request: Request, result: i32) {
        let Some(active) = &mut self.active[request.active] else { return };
        match outcome(result, active.transfer.direction) {
            Ok(moved) => {
                active.transfer.file.count(active.transfer.direction, moved);
                let segment = request.segment.rest(moved);
                if segment.len > 0 && active.error.is_none() {
                    return self.waiting.push_front(Request { segment, ..request });
                }
            }
            Err(error) => active.error = active.error.take().or(Some(error)),
        }
        active.requests_left -= 1;
        if active.requests_left == 0 {
            self.retire(request.active);
        }
    }

    fn retire(&mut self, index: usize) {
        let Some(Active { transfer, error, .. }) = self.active[index].take() else { return };
        let result = error.map_or(Ok(()), |error| Err(transfer.error(&error)));
        self.done.push_back(transfer.finish(result));
    }

    fn is_idle(&self) -> bool {
        self.active.iter().all(Option::is_none)
    }

    /// The kernel no longer answers: every transfer fails, and its memory is leaked, since the kernel may still
    /// write to it.
    fn give_up(&mut self, error: &io::Error) {
        self.waiting.clear();
        self.running.fill(None);
        self.held_bytes = 0;
        for Active { mut transfer, .. } in self.active.iter_mut().filter_map(Option::take) {
            let failure = transfer.error(error);
            std::mem::forget(std::mem::take(&mut transfer.buffer));
            self.done.push_back(transfer.finish(Err(failure)));
        }
    }
}

/// The kernel's words for "call again" are not errors.
fn accept(submitted: io::Result<usize>) -> io::Result<()> {
    match submitted {
        Ok(_) => Ok(()),
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::ResourceBusy
            ) =>
        {
            Ok(())
        }
        Err(e) => Err(e),
    }
}

/// Bytes moved by a request; 0 = ask again.
fn outcome(result: i32, direction: Direction) -> io::Result<usize> {
    match (result, direction) {
        (0, Direction::Read) => Err(ErrorKind::UnexpectedEof.into()),
        (0, Direction::Write) => Err(ErrorKind::WriteZero.into()),
        (moved @ 1.., _) => Ok(moved as usize),
        (code, _) => {
            let error = io::Error::from_raw_os_error(-code);
            // A thread that ends takes back what it submitted; whoever waits asks again.
            const CANCELED: i32 = 125;
            match error.kind() {
                ErrorKind::Interrupted | ErrorKind::WouldBlock => Ok(0),
                _ if -code == CANCELED => Ok(0),
                _ => Err(error),
            }
        }
    }
}

impl Active {
    fn entry(&self, segment: Segment) -> squeue::Entry {
        let file = types::Fd(self.transfer.file.file(segment.direct).as_raw_fd());
        let (address, len) = (self.memory.0.wrapping_add(segment.start), segment.len as u32);
        let entry = match self.transfer.direction {
            Direction::Read => opcode::Read::new(file, address, len).offset(segment.offset).build(),
            Direction::Write => opcode::Write::new(file, address, len).offset(segment.offset).build(),
        };
        // Copying to and from the page cache is for the kernel's threads, not for the one that computes.
        if segment.direct { entry } else { entry.flags(squeue::Flags::ASYNC) }
    }
}

impl Queue for UringQueue {
    fn submit(&mut self, mut transfer: Transfer) {
        let memory = Memory(transfer.buffer.as_mut_ptr());
        let len = transfer.buffer.len();
        let segments =
            cut(transfer.offset, memory.0 as usize, len, transfer.file.direct.is_some(), REQUEST_BYTES);
        if segments.is_empty() {
            return self.done.push_back(transfer.finish(Ok(())));
        }
        let index = self.active.iter().position(Option::is_none).unwrap_or_else(|| {
            self.active.push(None);
            self.active.len() - 1
        });
        self.active[index] = Some(Active { transfer, memory, requests_left: segments.len(), error: None });
        self.waiting.extend(segments.into_iter().map(|segment| Request { active: index, segment }));
        if let Err(error) = self.feed() {
            self.give_up(&error);
        }
    }

    fn hold(&mut self, most: usize) {
        self.most_bytes = most.max(1);
        if let Err(error) = self.feed() {
            self.give_up(&error);
        }
    }

    fn wait(&mut self) -> Option<Done> {
        loop {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            if self.is_idle() {
                return None;
            }
            if let Err(error) = accept(self.ring.submit_and_wait(1)) {
                self.give_up(&error);
            }
        }
    }

    fn poll(&mut self) -> Option<Done> {
        self.reap();
        if let Err(error) = self.feed() {
            self.give_up(&error);
        }
        self.done.pop_front()
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        self.waiting.clear();
        // Requests that never reached the kernel are not waited for.
        for active in self.active.iter_mut().flatten() {
            active.requests_left = 0;
        }
        for request in self.running.iter().flatten() {
            if let Some(active) = &mut self.active[request.active] {
                active.requests_left += 1;
                active.error.get_or_insert_with(|| ErrorKind::Interrupted.into());
            }
        }
        for index in 0..self.active.len() {
            if self.active[index].as_ref().is_some_and(|active| active.requests_left == 0) {
                self.retire(index);
            }
        }
        while self.wait().is_some() {}
    }
}
