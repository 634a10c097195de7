//! Messages, in memory that the library may touch until they are complete.
//!
//! [`Transfer`] is safe to use because it owns every buffer that the library may read or write. If it is dropped while
//! the library still may, its buffers stay allocated for ever.

use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Library;
use crate::{Buffer, Error};

/// The longest message. MPI counts are 32-bit; shorter ones keep several on their way.
const MESSAGE_BYTES: usize = 16 << 20;

/// How long an abandoned transfer may take to come to rest.
const GIVE_UP: Duration = Duration::from_millis(100);

/// Messages under way, with the memory that they read and write.
pub struct Transfer {
    library: Arc<Library>,
    requests: Vec<Request>,
    sources: Vec<Arc<Box<dyn Buffer>>>,
    target: Option<Box<dyn Buffer>>,
    /// Start and length of `target`, taken once: the library writes there while requests are open.
    memory: (*mut u8, usize),
    /// What the library may write to.
    received: Vec<Range<usize>>,
}

// SAFETY: the pointer is to memory that `target` owns, which is `Send`; it is not tied to a thread, and neither is the
// library.
unsafe impl Send for Transfer {}

struct Request {
    bits: u64,
    peer: usize,
    is_send: bool,
}

impl Transfer {
    /// Messages are received into `target`.
    pub fn new(library: &Arc<Library>, target: Option<Box<dyn Buffer>>) -> Self {
        let mut target = target;
        let memory = target.as_mut().map_or((std::ptr::null_mut(), 0), |target| {
            let bytes = target.bytes_mut();
            (bytes.as_mut_ptr(), bytes.len())
        });
        let (requests, sources, received) = (vec![], vec![], vec![]);
        Self { library: library.clone(), requests, sources, target, memory, received }
    }

    /// Sends bytes `range` of `source` to `peer`.
    pub fn send(
        &mut self,
        source: &Arc<Box<dyn Buffer>>,
        range: Range<usize>,
        peer: usize,
        tag: usize,
    ) -> Result<(), Error> {
        let bytes = &source.bytes()[range];
        self.sources.push(source.clone());
        let calls = self.library.calls();
        for message in bytes.chunks(MESSAGE_BYTES) {
            // SAFETY: `sources` keeps the memory until the request is complete or for ever, and shared, so that nobody
            // writes to it.
            let bits = unsafe { calls.send(message.as_ptr(), message.len(), peer, tag)? };
            self.requests.push(Request { bits, peer, is_send: true });
        }
        Ok(())
    }

    /// Receives bytes `range` of the target from `peer`.
    ///
    /// # Panics
    /// If the range leaves the target or meets another one.
    pub fn receive(&mut self, range: Range<usize>, peer: usize, tag: usize) -> Result<(), Error> {
        assert!(range.start <= range.end && range.end <= self.memory.1, "within the target");
        let apart = |other: &Range<usize>| other.end <= range.start || range.end <= other.start;
        assert!(self.received.iter().all(apart), "no byte is received twice");
        self.received.push(range.clone());
        let calls = self.library.calls();
        for start in range.clone().step_by(MESSAGE_BYTES) {
            let length = MESSAGE_BYTES.min(range.end - start);
            // SAFETY: the range lies in the target, which `self` owns until the request is complete or for ever, and
            // which nobody reads or writes before; no other request has a byte of it.
            let bits = unsafe { calls.receive(self.memory.0.add(start), length, peer, tag)? };
            self.requests.push(Request { bits, peer, is_send: false });
        }
        Ok(())
    }

    /// Lets the library work; whether all messages are complete.
    pub fn is_complete(&mut self) -> Result<bool, Error> {
        let calls = self.library.calls();
        let mut failure = None;
        self.requests.retain_mut(|request| match calls.test(&mut request.bits) {
            Ok(done) => !done,
            Err(error) => {
                failure = Some(error);
                true
            }
        });
        failure.map_or(Ok(self.requests.is_empty()), Err)
    }

    /// Who has yet to send or to take bytes.
    pub fn peers(&self) -> impl Iterator<Item = usize> {
        self.requests.iter().map(|request| request.peer)
    }

    /// Number of messages under way.
    pub fn open(&self) -> usize {
        self.requests.len()
    }

    /// The target, once all messages are complete.
    ///
    /// # Panics
    /// If they are not.
    pub fn finish(mut self) -> Option<Box<dyn Buffer>> {
        assert!(self.requests.is_empty(), "every message is complete");
        self.target.take()
    }
}

impl Transfer {
    /// Calls messages back that nobody has begun to send, and waits a moment for the others.
    fn give_up(&mut self) -> Result<bool, Error> {
        let receives = self.requests.iter().filter(|request| !request.is_send);
        receives.map(|request| request.bits).try_for_each(|bits| self.library.calls().cancel(bits))?;
        let deadline = Instant::now() + GIVE_UP;
        while !self.is_complete()? {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::yield_now();
        }
        Ok(true)
    }
}

impl Drop for Transfer {
    /// What the library may still touch stays for ever.
    fn drop(&mut self) {
        if !self.requests.is_empty() && !matches!(self.give_up(), Ok(true)) {
            self.library.abandon();
            std::mem::forget((std::mem::take(&mut self.sources), self.target.take()));
        }
    }
}
