//! Memory that the threads of a parallel loop write at disjoint places.

use std::marker::PhantomData;

/// Floats borrowed for writing by several threads at once.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: parts are taken by units of work that do not share them, see the calls.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(floats: &'a mut [f32]) -> Self {
        Self { start: floats.as_mut_ptr(), len: floats.len(), borrowed: PhantomData }
    }

    /// # Safety
    /// Nobody else uses the part while the result is in use.
    ///
    /// # Panics
    /// If the part does not lie within the memory.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, from: usize, len: usize) -> &'a mut [f32] {
        self.check(from, len);
        // SAFETY: within the memory, which is borrowed for `'a`; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }

    /// # Safety
    /// Nobody writes the part while the result is in use.
    ///
    /// # Panics
    /// If the part does not lie within the memory.
    pub unsafe fn read(&self, from: usize, len: usize) -> &'a [f32] {
        self.check(from, len);
        // SAFETY: within the memory, which is borrowed for `'a`; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.add(from), len) }
    }

    fn check(&self, from: usize, len: usize) {
        assert!(
            from <= self.len && len <= self.len - from,
            "a part of {len} floats at {from} of {}",
            self.len
        );
    }
}
