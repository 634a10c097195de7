//! Writing behind the caller.

use crate::nvme::{Direction, Done, NvmeFile, Queue, Transfer};
use crate::{AlignedBuffer, Error, Kind, Ledger, Tier};
use std::sync::Arc;
use std::time::Instant;

/// Writes buffers to a file while the caller fills the next one. Its buffers are made and charged once.
pub struct WriteBehind {
    file: Arc<NvmeFile>,
    queue: Box<dyn Queue>,
    free: Vec<AlignedBuffer>,
    buffer_len: usize,
    failure: Option<Error>,
    waited_s: f64,
}

impl WriteBehind {
    /// `buffers` buffers of `buffer_len` bytes, charged to `tier` as staging.
    ///
    /// # Errors
    /// [`Error::OverBudget`] when the tier does not hold them, [`Error::File`] when the disk gives no queue.
    pub fn new(
        file: Arc<NvmeFile>,
        buffers: usize,
        buffer_len: usize,
        ledger: &Ledger,
        tier: Tier,
    ) -> Result<Self, Error> {
        let buffer = |_| AlignedBuffer::charged(ledger, tier, Kind::Staging, buffer_len);
        let free = (0..buffers.max(1)).map(buffer).collect::<Result<Vec<_>, _>>()?;
        let queue = file.queue()?;
        Ok(Self { file, queue, free, buffer_len, failure: None, waited_s: 0.0 })
    }

    /// A buffer that shows `len` bytes of any content, for [`WriteBehind::write`]. Waits for a write to end if none is
    /// free.
    ///
    /// # Errors
    /// [`Error::Io`] when an earlier write failed; [`Error::Ring`] when `len` exceeds the buffers, or the caller has
    /// them all.
    pub fn buffer(&mut self, len: usize) -> Result<AlignedBuffer, Error> {
        if len > self.buffer_len {
            let why = format!("a write of {len} bytes exceeds a buffer of {}", self.buffer_len);
            return Err(Error::Ring { why });
        }
        while let Some(done) = self.queue.poll() {
            self.settle(done);
        }
        while self.free.is_empty() && self.wait() {}
        self.failure.take().map_or(Ok(()), Err)?;
        let none = || Error::Ring { why: "every buffer is filled by the caller; write one first".into() };
        let mut buffer = self.free.pop().ok_or_else(none)?;
        buffer.set_len(len);
        Ok(buffer)
    }

    /// Begins to write a buffer's bytes at `offset`.
    ///
    /// # Errors
    /// [`Error::Range`] when the file does not hold them.
    pub fn write(&mut self, offset: u64, buffer: AlignedBuffer) -> Result<(), Error> {
        if let Err(error) = self.file.check(offset, buffer.len() as u64) {
            self.free.push(buffer);
            return Err(error);
        }
        let file = self.file.handles().clone();
        self.queue.submit(Transfer { tag: 0, direction: Direction::Write, file, offset, buffer });
        Ok(())
    }

    /// Returns when everything is written.
    ///
    /// # Errors
    /// [`Error::Io`] when a write failed.
    pub fn finish(&mut self) -> Result<(), Error> {
        while self.wait() {}
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Seconds in which the caller waited for a write to end.
    pub fn waited_s(&self) -> f64 {
        self.waited_s
    }

    /// Waits for a write; `false` when none is under way.
    fn wait(&mut self) -> bool {
        let begun = Instant::now();
        let done = self.queue.wait();
        self.waited_s += begun.elapsed().as_secs_f64();
        let any = done.is_some();
        done.into_iter().for_each(|done| self.settle(done));
        any
    }

    /// Takes a buffer back; keeps the first error. A failed queue may have kept the memory.
    fn settle(&mut self, done: Done) {
        if done.buffer.capacity() > 0 {
            self.free.push(done.buffer);
        }
        if let Err(error) = done.result {
            self.failure.get_or_insert(error);
        }
    }
}

impl Drop for WriteBehind {
    /// No write outlives it.
    fn drop(&mut self) {
        while self.wait() {}
    }
}
