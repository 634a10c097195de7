//! Memory of the card, and of the host where the card reaches it directly.

use super::{Context, Event, Stream};
use crate::runtime::Error;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// An allocation on the card.
pub(crate) struct Memory {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Allocates; the contents are whatever was there. Zero bytes are one.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        context.enter()?;
        let mut address = 0;
        // SAFETY: a number to write, within a current context.
        let code = unsafe { (context.api.memory_alloc)(&mut address, bytes.max(1)) };
        if code == OUT_OF_MEMORY {
            let free = context.memory().map_or(0, |m| m.free);
            return Err(Error::OutOfMemory { needed: bytes as u64, free });
        }
        context.check("cuMemAlloc", code)?;
        Ok(Self { context: context.clone(), address, bytes })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Copies ordinary memory to `offset`; it has been read when this returns.
    pub fn write(&self, offset: usize, from: &[u8], stream: &Stream) -> Result<(), Error> {
        let to = self.at(offset, from.len());
        stream.must_not_capture("a copy from the host")?;
        self.context.enter()?;
        // SAFETY: `from` holds that many bytes, the allocation has room for them; the synchronization ends the copy
        // within the borrow, also when the call failed.
        let code =
            unsafe { (self.context.api.copy_to_card)(to, from.as_ptr().cast(), from.len(), stream.handle()) };
        let waited = stream.synchronize();
        self.context.check("cuMemcpyHtoDAsync", code).and(waited)
    }

    /// Copies from `offset` into ordinary memory.
    pub fn read(&self, offset: usize, to: &mut [u8], stream: &Stream) -> Result<(), Error> {
        let from = self.at(offset, to.len());
        stream.must_not_capture("a copy to the host")?;
        self.context.enter()?;
        // SAFETY: as in `write`, the other way round.
        let code = unsafe {
            (self.context.api.copy_to_host)(to.as_mut_ptr().cast(), from, to.len(), stream.handle())
        };
        let waited = stream.synchronize();
        self.context.check("cuMemcpyDtoHAsync", code).and(waited)
    }

    /// Sets `bytes` bytes from `offset`, in the stream's order.
    pub fn fill(&self, offset: usize, bytes: usize, value: u8, stream: &Stream) -> Result<(), Error> {
        let to = self.at(offset, bytes);
        self.context.enter()?;
        // SAFETY: a range of this allocation, which waits for the card before it is freed.
        self.context
            .check("cuMemsetD8Async", unsafe { (self.context.api.fill)(to, value, bytes, stream.handle()) })
    }

    /// Copies `bytes` bytes of the card's memory, in the stream's order.
    pub fn copy(
        &self,
        offset: usize,
        from: &Memory,
        at: usize,
        bytes: usize,
        stream: &Stream,
    ) -> Result<(), Error> {
        let (to, from) = (self.at(offset, bytes), from.at(at, bytes));
        self.context.enter()?;
        // SAFETY: ranges of two allocations, each of which waits for the card before it is freed.
        let code = unsafe { (self.context.api.copy_within)(to, from, bytes, stream.handle()) };
        self.context.check("cuMemcpyDtoDAsync", code)
    }

    /// The address of `offset`, where `bytes` bytes lie within the allocation.
    fn at(&self, offset: usize, bytes: usize) -> u64 {
        let end = offset.checked_add(bytes).expect("an offset within memory");
        assert!(end <= self.bytes, "bytes {offset}..{end} of an allocation of {}", self.bytes);
        self.address + offset as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Kernels and copies in flight may still reach it. What a lost card answers changes nothing.
        let _ = self.context.synchronize();
        // SAFETY: allocated by this driver, freed once, and nothing in flight uses it.
        unsafe { (self.context.api.memory_free)(self.address) };
    }
}

/// Host memory that copies run from and to: pinned, or ordinary memory where the system refuses to pin.
///
/// A copy records `done`; the bytes are lent out only after that.
pub(crate) struct HostMemory {
    bytes: Bytes,
    done: Event,
    context: Arc<Context>,
}

enum Bytes {
    Pinned(NonNull<u8>, usize),
    /// Whole words, so that it begins where any number may; and how many bytes of them count.
    Plain(Vec<u64>, usize),
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for HostMemory {}

impl HostMemory {
    /// Pins new memory, which is zeros.
    pub fn pinned(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let done = Event::new(context, false)?;
        context.enter()?;
        let mut at: *mut c_void = std::ptr::null_mut();
        // SAFETY: a pointer to write, within a current context; flags 0: cached memory, which the CPU reads fast.
        let code = unsafe { (context.api.host_alloc)(&mut at, bytes.max(1), 0) };
        context.check("cuMemHostAlloc", code)?;
        let at = NonNull::new(at.cast::<u8>()).ok_or(Error::OutOfMemory { needed: bytes as u64, free: 0 })?;
        // SAFETY: as many bytes as were allocated.
        unsafe { at.as_ptr().write_bytes(0, bytes) };
        Ok(Self { bytes: Bytes::Pinned(at, bytes), done, context: context.clone() })
    }

    /// Ordinary memory: copies pass through a buffer of the driver's and hold the caller up.
    pub fn plain(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let done = Event::new(context, false)?;
        Ok(Self { bytes: Bytes::Plain(vec![0; bytes.div_ceil(8)], bytes), done, context: context.clone() })
    }

    /// Bytes there are.
    pub fn len(&self) -> usize {
        match &self.bytes {
            Bytes::Pinned(_, len) => *len,
            Bytes::Plain(_, len) => *len,
        }
    }

    /// The bytes, once no copy uses them any more.
    pub fn bytes(&mut self) -> Result<&mut [u8], Error> {
        self.done.synchronize()?;
        Ok(match &mut self.bytes {
            // SAFETY: as many initialised bytes, ours alone: the last copy's event has passed.
            Bytes::Pinned(at, len) => unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), *len) },
            Bytes::Plain(words, len) => &mut bytemuck::cast_slice_mut(words)[..*len],
        })
    }

    /// Sends these bytes to the card, in the stream's order.
    pub fn send(
        &mut self,
        range: Range<usize>,
        to: &Memory,
        offset: usize,
        stream: &Stream,
    ) -> Result<(), Error> {
        let (from, bytes) = (self.at(&range), range.len());
        let to = to.at(offset, bytes);
        stream.must_not_capture("a copy from the host")?;
        self.context.enter()?;
        // SAFETY: that many bytes, which nobody borrows before `done` has passed, to a range of an allocation that waits
        // for the card before it is freed. Ordinary memory has been read when the call returns.
        let code = unsafe { (self.context.api.copy_to_card)(to, from.cast(), bytes, stream.handle()) };
        self.finish("cuMemcpyHtoDAsync", code, stream)
    }

    /// Fetches these bytes from the card, in the stream's order.
    pub fn fetch(
        &mut self,
        range: Range<usize>,
        from: &Memory,
        offset: usize,
        stream: &Stream,
    ) -> Result<(), Error> {
        let (to, bytes) = (self.at(&range), range.len());
        let from = from.at(offset, bytes);
        stream.must_not_capture("a copy to the host")?;
        self.context.enter()?;
        // SAFETY: as in `send`, the other way round. Ordinary memory has been written when the call returns.
        let code = unsafe { (self.context.api.copy_to_host)(to.cast(), from, bytes, stream.handle()) };
        self.finish("cuMemcpyDtoHAsync", code, stream)
    }

    /// What a copy that was just sent ends with.
    pub fn done(&self) -> &Event {
        &self.done
    }

    fn finish(&mut self, call: &'static str, code: i32, stream: &Stream) -> Result<(), Error> {
        let recorded = self.done.record(stream);
        if recorded.is_err() {
            // Without an event the copy is waited for.
            stream.synchronize()?;
        }
        self.context.check(call, code).and(recorded)
    }

    /// Where a range begins that lies within it.
    fn at(&mut self, range: &Range<usize>) -> *mut u8 {
        let len = self.len();
        assert!(range.start <= range.end && range.end <= len, "bytes {range:?} of a host buffer of {len}");
        let start: *mut u8 = match &mut self.bytes {
            Bytes::Pinned(at, _) => at.as_ptr(),
            Bytes::Plain(words, _) => words.as_mut_ptr().cast(),
        };
        start.wrapping_add(range.start)
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let Bytes::Pinned(at, _) = self.bytes else { return };
        let _ = self.context.synchronize();
        // SAFETY: pinned by this driver, freed once, and nothing in flight uses it.
        unsafe { (self.context.api.host_free)(at.as_ptr().cast()) };
    }
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: i32 = 2;
