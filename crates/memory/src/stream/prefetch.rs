//! Reading ahead of a scripted use.

use crate::nvme::{Direction, NvmeFile, Queue, Transfer};
use crate::{AlignedBuffer, Error, Kind, Ledger, Tier};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Bytes under way while the caller waits: as many as keep a disk busy, and so few that the range it waits for does not
/// share the disk with the next one (measured: two ranges of 45 MB handed over together came together, after which the
/// disk had nothing to do while the first was computed with).
const WAITING_BYTES: usize = 32 << 20;

/// How far a [`Prefetcher`] reads ahead, and how many leases its user holds at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// Ranges read ahead of the one in use: 3 or 4 hide a disk, 2 the link to a device.
    pub look_ahead: usize,
    /// Leases held at once without costing look-ahead.
    pub leases: usize,
}

impl Default for Ahead {
    fn default() -> Self {
        Ahead { look_ahead: 3, leases: 1 }
    }
}

impl Ahead {
    /// Buffers it takes.
    pub fn buffers(self) -> usize {
        self.look_ahead.max(1) + self.leases.max(1)
    }

    /// Bytes that a ring for these ranges is charged for.
    pub fn ring_bytes(self, sequence: &[Range<u64>]) -> u64 {
        (self.buffers() * AlignedBuffer::capacity_for(longest(sequence))) as u64
    }
}

fn longest(sequence: &[Range<u64>]) -> usize {
    sequence.iter().map(len).max().unwrap_or(0)
}

fn len(range: &Range<u64>) -> usize {
    range.end.saturating_sub(range.start) as usize
}

/// Hands out the ranges of a sequence in order, each read before it is asked for. Its buffers are made and charged
/// once.
///
/// What is written to the file after [`Prefetcher::restart`] may be missed by reads already begun: write first, then
/// restart.
pub struct Prefetcher {
    file: Arc<NvmeFile>,
    sequence: Vec<Range<u64>>,
    ahead: Ahead,
    buffer_len: usize,
    queue: Box<dyn Queue>,
    free: Arc<FreeList>,
    /// Ranges read and not yet handed out, or the error that met them, by place in the sequence.
    ready: BTreeMap<usize, Result<AlignedBuffer, (AlignedBuffer, Error)>>,
    in_flight: usize,
    next_read: usize,
    next_lease: usize,
}

#[derive(Default)]
struct FreeList(Mutex<Vec<AlignedBuffer>>);

impl FreeList {
    fn lock(&self) -> MutexGuard<'_, Vec<AlignedBuffer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A failed queue may have kept the memory and given an empty buffer instead: the ring has one fewer then.
    fn give(&self, buffer: AlignedBuffer) {
        if buffer.capacity() > 0 {
            self.lock().push(buffer);
        }
    }
}

impl Prefetcher {
    /// Makes the ring, charged to `tier` as staging, and begins to read.
    ///
    /// # Errors
    /// [`Error::Range`] when the file does not hold a range, [`Error::OverBudget`] when the tier does not hold the ring.
    pub fn new(
        file: Arc<NvmeFile>,
        sequence: Vec<Range<u64>>,
        ahead: Ahead,
        ledger: &Ledger,
        tier: Tier,
    ) -> Result<Self, Error> {
        let buffer_len = longest(&sequence);
        let buffer = |_| AlignedBuffer::charged(ledger, tier, Kind::Staging, buffer_len);
        let buffers = (0..ahead.buffers()).map(buffer).collect::<Result<Vec<_>, _>>()?;
        let queue = file.queue()?;
        let mut prefetcher = Self {
            file,
            sequence: Vec::new(),
            ahead,
            buffer_len,
            queue,
            free: Arc::new(FreeList(Mutex::new(buffers))),
            ready: BTreeMap::new(),
            in_flight: 0,
            next_read: 0,
            next_lease: 0,
        };
        prefetcher.restart_with(sequence)?;
        Ok(prefetcher)
    }

    /// The next range of the sequence, once it is read; `None` after the last.
    ///
    /// # Errors
    /// [`Error::Io`] when the range could not be read: the next call gives the range after it. [`Error::Ring`] when
    /// every buffer is leased, so that waiting would never end; the same range comes next.
    #[allow(clippy::should_implement_trait)] // It fails, and its items are lent.
    pub fn next(&mut self) -> Result<Option<Lease>, Error> {
        if self.next_lease == self.sequence.len() {
            return Ok(None);
        }
        self.queue.hold(WAITING_BYTES);
        self.read_ahead();
        while !self.ready.contains_key(&self.next_lease) {
            if self.in_flight == 0 {
                let why = format!("all {} buffers are leased; drop one first", self.ahead.buffers());
                return Err(Error::Ring { why });
            }
            self.settle_one();
        }
        // Nobody looks while the caller computes: the disk gets all there is to read.
        self.queue.hold(usize::MAX);
        let read = self.ready.remove(&self.next_lease).expect("the loop above found it");
        self.next_lease += 1;
        match read {
            Ok(buffer) => Ok(Some(Lease { buffer, free: Arc::downgrade(&self.free) })),
            Err((buffer, error)) => {
                self.free.give(buffer);
                Err(error)
            }
        }
    }

    /// Begins the sequence anew, with the bytes that the file holds now.
    pub fn restart(&mut self) {
        self.discard();
        self.next_read = 0;
        self.next_lease = 0;
        self.read_ahead();
    }

    /// Begins another sequence in the same ring.
    ///
    /// # Errors
    /// [`Error::Range`] when the file does not hold a range, [`Error::Ring`] when a range exceeds the buffers; the old
    /// sequence goes on.
    pub fn restart_with(&mut self, sequence: Vec<Range<u64>>) -> Result<(), Error> {
        for range in &sequence {
            self.file.check(range.start, len(range) as u64)?;
            if len(range) > self.buffer_len {
                let why = format!("a range of {} bytes exceeds a buffer of {}", len(range), self.buffer_len);
                return Err(Error::Ring { why });
            }
        }
        self.sequence = sequence;
        self.restart();
        Ok(())
    }

    /// Ranges in the sequence.
    pub fn len(&self) -> usize {
        self.sequence.len()
    }

    /// Whether the sequence has no range.
    pub fn is_empty(&self) -> bool {
        self.sequence.is_empty()
    }

    /// Reads into buffers that came back since. [`Prefetcher::next`] does so too; a caller that is away for longer calls
    /// this first.
    pub fn read_ahead(&mut self) {
        while let Some(done) = self.queue.poll() {
            self.settle(done);
        }
        // Every buffer that is not leased reads, so that the disk has the next range while it ends the one before.
        while self.next_read < self.sequence.len() {
            let Some(mut buffer) = self.free.lock().pop() else { return };
            let range = &self.sequence[self.next_read];
            buffer.set_len(len(range));
            let (file, offset) = (self.file.handles().clone(), range.start);
            let direction = Direction::Read;
            self.queue.submit(Transfer { tag: self.next_read, direction, file, offset, buffer });
            self.in_flight += 1;
            self.next_read += 1;
        }
    }

    fn settle_one(&mut self) {
        match self.queue.wait() {
            Some(done) => self.settle(done),
            None => self.in_flight = 0,
        }
    }

    fn settle(&mut self, done: crate::nvme::Done) {
        self.in_flight -= 1;
        let read = match done.result {
            Ok(()) => Ok(done.buffer),
            Err(error) => Err((done.buffer, error)),
        };
        self.ready.insert(done.tag, read);
    }

    /// Waits for what is in flight and gives its buffers back unread.
    fn discard(&mut self) {
        while self.in_flight > 0 {
            self.settle_one();
        }
        for read in std::mem::take(&mut self.ready).into_values() {
            self.free.give(read.unwrap_or_else(|(buffer, _)| buffer));
        }
    }
}

/// The bytes of one range. Dropping it gives the buffer back to the ring, or frees it when the ring is gone.
pub struct Lease {
    buffer: AlignedBuffer,
    free: Weak<FreeList>,
}

impl Lease {
    /// The buffer itself, for its typed views.
    pub fn buffer(&self) -> &AlignedBuffer {
        &self.buffer
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(free) = self.free.upgrade() {
            free.give(std::mem::take(&mut self.buffer));
        }
    }
}
