//! How one transfer is cut into requests.

use crate::buffer::ALIGNMENT;

/// One request to the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// First byte in the file.
    pub offset: u64,
    /// First byte in the caller's memory.
    pub start: usize,
    /// Bytes.
    pub len: usize,
    /// Whether it goes past the page cache: offset, memory and length are all aligned.
    pub direct: bool,
}

impl Segment {
    /// What is left after the system moved `done` bytes. An odd remainder cannot go on directly.
    pub fn rest(self, done: usize) -> Self {
        let direct = self.direct && done.is_multiple_of(ALIGNMENT);
        Segment { offset: self.offset + done as u64, start: self.start + done, len: self.len - done, direct }
    }
}

/// Cuts `len` bytes at `offset` into requests of at most `most` bytes, in order.
///
/// With `direct`, whole pages go directly when the memory they lie in (`address`) is aligned like the file, and an
/// unaligned head or tail goes through the page cache, where the kernel keeps neighbours in one page apart. `most`
/// is a multiple of [`ALIGNMENT`].
pub(super) fn cut(offset: u64, address: usize, len: usize, direct: bool, most: usize) -> Vec<Segment> {
    let misalignment = (offset % ALIGNMENT as u64) as usize;
    let congruent = address % ALIGNMENT == misalignment;
    let head = if misalignment == 0 { 0 } else { len.min(ALIGNMENT - misalignment) };
    let body = if direct && congruent { (len - head) / ALIGNMENT * ALIGNMENT } else { 0 };
    let (head, tail) = if body == 0 { (len, 0) } else { (head, len - head - body) };

    let mut segments = Vec::with_capacity(len.div_ceil(most) + 2);
    let mut start = 0;
    for (part, direct) in [(head, false), (body, true), (tail, false)] {
        let end = start + part;
        while start < end {
            let len = (end - start).min(most);
            segments.push(Segment { offset: offset + start as u64, start, len, direct });
            start += len;
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = ALIGNMENT as u64;

    proptest! {
        #[test]
        fn requests_cover_every_byte_once_and_direct_ones_are_aligned(
            offset in 0..8 * PAGE, address in 0..2 * ALIGNMENT, len in 0..20 * ALIGNMENT,
            direct: bool, pages in 1..5usize,
        ) {
            let most = pages * ALIGNMENT;
            let mut next = 0;
            for segment in cut(offset, address, len, direct, most) {
                prop_assert_eq!((segment.start, segment.offset), (next, offset + next as u64));
                prop_assert!((1..=most).contains(&segment.len));
                let aligned = segment.offset % PAGE == 0
                    && (address + segment.start) % ALIGNMENT == 0
                    && segment.len % ALIGNMENT == 0;
                prop_assert!(!segment.direct || (direct && aligned));
                next += segment.len;
            }
            prop_assert_eq!(next, len);
        }

        #[test]
        fn congruent_memory_sends_all_but_the_ragged_ends_directly(
            offset in 0..8 * PAGE, len in 0..20 * ALIGNMENT,
        ) {
            let buffered = cut(offset, (offset % PAGE) as usize, len, true, ALIGNMENT);
            let ragged: usize = buffered.iter().filter(|s| !s.direct).map(|s| s.len).sum();
            prop_assert!(ragged < 2 * ALIGNMENT);
        }
    }

    #[test]
    fn an_odd_remainder_goes_on_through_the_page_cache() {
        let segment = Segment { offset: 0, start: 0, len: 8192, direct: true };
        assert!(segment.rest(4096).direct);
        assert_eq!(segment.rest(512), Segment { offset: 512, start: 512, len: 7680, direct: false });
    }
}
