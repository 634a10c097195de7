//! Large buffers on large pages.
//!
//! An optimizer step streams through five buffers at once; on 4 KiB pages address translation costs it a tenth and
//! more of the bandwidth.

/// An empty vector with room for `len` elements, on huge pages where the system grants them: an advice, which changes
/// nothing but speed. Small vectors and other systems than Linux get ordinary memory.
pub fn with_capacity_on_huge_pages<T: Copy>(len: usize) -> Vec<T> {
    let buffer = Vec::with_capacity(len);
    advise(buffer.as_ptr() as usize, buffer.capacity() * size_of::<T>());
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
}
