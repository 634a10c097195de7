//! Large buffers on large pages.
//!
//! An optimizer step streams through five buffers at once; on 4 KiB pages address translation costs it a tenth and
//! more of the bandwidth, and a product with a quantized matrix nearly half of it.

use bytemuck::{Pod, Zeroable};
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An empty vector with room for `len` elements, on huge pages where the system grants them: an advice, which changes
/// nothing but speed. Small vectors and other systems than Linux get ordinary memory.
pub fn with_capacity_on_huge_pages<T: Copy>(len: usize) -> Vec<T> {
    let buffer = Vec::with_capacity(len);
    advise(buffer.as_ptr() as usize, buffer.capacity() * size_of::<T>());
    buffer
}

/// The same vector, its pages huge from their first use on. Fresh zeros take no memory where they are never touched.
pub fn on_huge_pages<T>(buffer: Vec<T>) -> Vec<T> {
    advise(buffer.as_ptr() as usize, size_of_val(buffer.as_slice()));
    buffer
}

#[cfg(target_os = "linux")]
fn advise(start: usize, bytes: usize) {
    const PAGE: usize = 4096;
    const HUGE: usize = 2 << 20;
    let (first, end) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
    if end.saturating_sub(first) >= 2 * HUGE {
        // SAFETY: whole pages inside one allocation; the advice leaves their contents alone. Where it is refused (no
        // huge pages in this kernel) ordinary pages serve.
        unsafe {
            libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: usize, _: usize) {}

/// A cache line: panels start on one, so that no register is loaded from two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

/// Bytes per [`Line`].
pub const LINE: usize = size_of::<Line>();

/// Zeroed memory on huge pages, handed out piece by piece: thousands of matrices share the pages that each alone is too
/// small for. It lives as long as any piece of it.
pub struct Arena {
    /// Start of a vector taken apart: of `len` lines, with room for `capacity`.
    base: *mut Line,
    len: usize,
    capacity: usize,
    taken: AtomicUsize,
}

// SAFETY: the lines are plain bytes, reached through pieces only, which do not overlap; the count is atomic.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the parts of the vector it was made of; no piece is left.
        drop(unsafe { Vec::from_raw_parts(self.base, self.len, self.capacity) });
    }
}

impl Arena {
    /// Room for `bytes`, in whole lines.
    pub fn new(bytes: usize) -> Arc<Self> {
        let len = bytes.div_ceil(LINE);
        let mut lines = ManuallyDrop::new(with_capacity_on_huge_pages(len));
        lines.resize(len, Line([0; LINE]));
        let (base, capacity) = (lines.as_mut_ptr(), lines.capacity());
        Arc::new(Self { base, len, capacity, taken: AtomicUsize::new(0) })
    }

    /// The next `bytes`, whole lines of zeros; `None` when fewer are left.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Piece> {
        let len = bytes.div_ceil(LINE);
        let first = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            taken.checked_add(len).filter(|end| *end <= self.len)
        });
        Some(Piece { arena: self.clone(), first: first.ok()?, len })
    }
}

/// A part of an [`Arena`] that belongs to its holder alone.
pub struct Piece {
    arena: Arc<Arena>,
    first: usize,
    len: usize,
}

impl Piece {
    /// Zeroed memory of its own.
    pub fn alone(bytes: usize) -> Self {
        Arena::new(bytes).take(bytes).expect("an arena of this size")
    }

    /// Bytes held, whole lines.
    pub fn bytes(&self) -> usize {
        self.len * LINE
    }

    /// Its lines.
    pub fn lines(&self) -> &[Line] {
        // SAFETY: `first..first + len` lies within the arena and was handed out once; `&self` allows reading only.
        unsafe { std::slice::from_raw_parts(self.arena.base.add(self.first), self.len) }
    }

    /// Its lines, to be written.
    pub fn lines_mut(&mut self) -> &mut [Line] {
        // SAFETY: as above, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.arena.base.add(self.first), self.len) }
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        bytemuck::cast_slice(self.lines())
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self.lines_mut())
    }
}

/// Where the panels of a matrix lie.
pub enum Image {
    /// In memory of their own.
    Own(Piece),
    /// In somebody else's.
    Lent(Loan),
}

impl Deref for Image {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Image::Own(piece) => piece,
            Image::Lent(loan) => loan,
        }
    }
}

/// A part of somebody else's memory, which stays there for as long as any loan of it lives: a buffer that a disk has
/// written to, computed with where it lies.
pub struct Loan {
    owner: Arc<dyn Deref<Target = [u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Loan {
    /// `None` if the owner has no such range.
    pub fn new(owner: Arc<dyn Deref<Target = [u8]> + Send + Sync>, range: Range<usize>) -> Option<Self> {
        owner.get(range.clone()).is_some().then_some(Self { owner, range })
    }
}

impl Deref for Loan {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_any_size_hold_what_is_put_in() {
        for len in [0, 1, 1000, 3 << 20] {
            let mut buffer = with_capacity_on_huge_pages::<f32>(len);
            assert!(buffer.is_empty() && buffer.capacity() >= len);
            buffer.extend((0..len).map(|i| i as f32));
            assert!(buffer.iter().enumerate().all(|(i, v)| *v == i as f32));
        }
    }

    #[test]
    fn pieces_of_an_arena_are_aligned_zeroed_and_apart() {
        let arena = Arena::new(10 * LINE);
        let mut pieces: Vec<Piece> = [LINE, 3 * LINE - 5, 0, 64].map(|b| arena.take(b).unwrap()).into();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.iter().all(|b| *b == 0) && (piece.as_ptr() as usize).is_multiple_of(LINE));
            piece.fill(i as u8 + 1);
        }
        assert!(pieces.iter().enumerate().all(|(i, p)| p.iter().all(|b| *b == i as u8 + 1)));
        assert!(arena.take(6 * LINE).is_none());
        drop(arena);
        assert_eq!(pieces[1].bytes(), 3 * LINE);
    }
}
