//! Memory that a disk can write into directly.
#![allow(unsafe_code)] // One call, in `prefer_huge_pages`.

use crate::{Charge, Error, Kind, Ledger, Tier};
use bytemuck::{Pod, Zeroable};
use std::fmt;
use std::ops::{Deref, DerefMut};

/// Alignment of buffers, offsets and lengths that direct I/O asks for: at least the block size of every disk
/// in use, and the size of a page.
pub const ALIGNMENT: usize = 4096;

/// One page. A vector of them is aligned memory by its type alone.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; ALIGNMENT]);

/// Asks for huge pages before the first touch. The kernel pins every page of a transfer, and a page of 2 MiB costs as
/// much to pin as one of 4 KiB: 17 ms instead of 100 per GiB moved, and half again the throughput when a tiled update
/// computes meanwhile.
#[cfg(target_os = "linux")]
fn prefer_huge_pages(pages: &mut Vec<Page>) {
    const HUGE_PAGE: usize = 2 << 20;
    let bytes = pages.capacity() * ALIGNMENT;
    if bytes >= HUGE_PAGE {
        // SAFETY: the range is the vector's own, and the advice changes how fast its memory is, not what it holds.
        // Where the kernel has no huge pages it says so, and nothing is lost.
        let _ = unsafe {
            rustix::mm::madvise(pages.as_mut_ptr().cast(), bytes, rustix::mm::Advice::LinuxHugepage)
        };
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages(_: &mut Vec<Page>) {}

/// Zeroed bytes that start at a multiple of [`ALIGNMENT`] and own whole pages up to their capacity.
///
/// Its pages are touched once, when it is made; keep it and reuse it rather than making another. The default
/// is empty and owns nothing.
#[derive(Default)]
pub struct AlignedBuffer {
    pages: Vec<Page>,
    len: usize,
    charge: Option<Charge>,
}

impl AlignedBuffer {
    /// A buffer of `len` zero bytes that no ledger knows.
    ///
    /// # Panics
    /// When the machine has not that much memory.
    pub fn new(len: usize) -> Self {
        Self::allocate(len).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A buffer of `len` zero bytes whose capacity is charged for as long as it lives.
    ///
    /// # Errors
    /// [`Error::OverBudget`] when the tier does not hold that many more bytes, [`Error::OutOfMemory`] when the
    /// machine does not.
    pub fn charged(ledger: &Ledger, tier: Tier, kind: Kind, len: usize) -> Result<Self, Error> {
        let charge = ledger.charge(tier, kind, Self::capacity_for(len) as u64)?;
        Ok(Self { charge: Some(charge), ..Self::allocate(len)? })
    }

    /// A buffer of `len` zero bytes for a charge that was made before, of at least its capacity.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the machine has not that much memory.
    ///
    /// # Panics
    /// When the charge is smaller than the buffer.
    pub fn under(charge: Charge, len: usize) -> Result<Self, Error> {
        assert!(charge.bytes() >= Self::capacity_for(len) as u64, "a buffer is charged whole");
        Ok(Self { charge: Some(charge), ..Self::allocate(len)? })
    }

    fn allocate(len: usize) -> Result<Self, Error> {
        let count = len.div_ceil(ALIGNMENT);
        let mut pages = Vec::new();
        pages.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { bytes: len as u64 })?;
        prefer_huge_pages(&mut pages);
        pages.resize(count, Page::zeroed());
        Ok(Self { pages, len, charge: None })
    }

    /// Bytes that a buffer of `len` occupies, and is charged for: `len` in whole pages.
    pub fn capacity_for(len: usize) -> usize {
        len.div_ceil(ALIGNMENT) * ALIGNMENT
    }

    /// Bytes it occupies.
    pub fn capacity(&self) -> usize {
        self.pages.len() * ALIGNMENT
    }

    /// Shows the first `len` bytes of the capacity, whatever they hold.
    ///
    /// # Panics
    /// When `len` exceeds the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "a buffer of {} bytes cannot show {len}", self.capacity());
        self.len = len;
    }

    /// The bytes as numbers.
    ///
    /// # Panics
    /// When the length is not a multiple of the size of `T`.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self)
    }

    /// The bytes as numbers to change.
    ///
    /// # Panics
    /// When the length is not a multiple of the size of `T`.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self)
    }

    /// What it is charged as, if it is.
    pub fn charge(&self) -> Option<&Charge> {
        self.charge.as_ref()
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.pages)[..self.len]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.pages)[..self.len]
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} of {} bytes)", self.len, self.capacity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Budget;

    #[test]
    fn a_buffer_is_aligned_zeroed_and_exactly_as_long_as_asked() {
        for len in [0, 1, 4095, 4096, 4097, 100_000] {
            let buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!((buffer.len(), buffer.capacity()), (len, AlignedBuffer::capacity_for(len)));
            assert!(buffer.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn numbers_written_are_the_bytes_read() {
        let mut buffer = AlignedBuffer::new(12);
        buffer.as_mut_slice::<f32>().copy_from_slice(&[1.0, -2.0, 3.5]);
        assert_eq!(buffer[8..], 3.5f32.to_ne_bytes());
        assert_eq!(buffer.as_slice::<f32>(), [1.0, -2.0, 3.5]);
        buffer.set_len(4);
        assert_eq!(buffer.as_slice::<f32>(), [1.0]);
    }

    #[test]
    fn a_charged_buffer_holds_its_whole_pages_while_it_lives() {
        let ledger = Ledger::new(Budget::device(8192));
        let charged = |len| AlignedBuffer::charged(&ledger, Tier::Device, Kind::Staging, len);
        let buffer = charged(4097).expect("two pages fit");
        assert_eq!(ledger.used(Tier::Device), 8192);
        let error = charged(1).expect_err("no page is free").to_string();
        assert!(error.contains("needs 4096 bytes, 0 free of 8192"), "{error}");
        drop(buffer);
        assert_eq!(ledger.used(Tier::Device), 0);
    }

    #[test]
    #[should_panic(expected = "cannot show 4097")]
    fn a_buffer_never_shows_more_than_it_owns() {
        AlignedBuffer::new(10).set_len(4097);
    }
}
