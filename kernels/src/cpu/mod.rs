//! CPU kernels on plain slices. No tensors here.
pub mod activation;
pub mod adafactor;
pub mod adamw;
pub mod attention;
pub mod attention_backward;
pub mod attention_paged;
pub mod block;
mod decoded;
pub mod eight_bits;
mod few_rows;
mod foresight;
pub mod gemm;
pub mod halves;
pub mod kv;
mod lanes;
pub mod layer_norm;
pub mod lion;
pub mod loss;
pub mod packed;
pub mod pages;
pub mod pointwise;
pub mod pool;
pub mod quant;
pub mod rope;
pub mod sgd;
mod shared;
pub mod simd;
pub mod stored;
pub mod update;

use std::mem::MaybeUninit;

/// A new vector of `len` elements. A step makes gigabytes of results: zeroing them first would cost it some percent.
///
/// # Safety
/// `write` writes every element.
pub(crate) unsafe fn written(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut result = Vec::with_capacity(len);
    write(&mut result.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is there; written by the caller's promise.
    unsafe { result.set_len(len) };
    result
}

/// The same memory, for kernels that write a result without reading it.
///
/// # Safety
/// Whoever gets it writes values, and never leaves a place less initialised than it was.
pub(crate) unsafe fn to_be_written(y: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the same layout; the rest is the caller's promise.
    unsafe { &mut *(std::ptr::from_mut(y) as *mut [MaybeUninit<f32>]) }
}

/// To exactly `len` elements of whatever value, with no more memory than for the most that were ever asked for.
pub fn resize<T: Clone + Default>(x: &mut Vec<T>, len: usize) {
    if len > x.capacity() {
        // Before the new memory is taken, so that both are never there at once.
        *x = Vec::new();
        x.reserve_exact(len);
    }
    x.resize(len, T::default());
}

/// Rows per task, so that a task is worth the hand-over to another thread.
pub(crate) fn rows_per_task(rows: usize, width: usize) -> usize {
    const MIN_ELEMENTS: usize = 1 << 13;
    rows.div_ceil(4 * rayon::current_num_threads()).max(MIN_ELEMENTS.div_ceil(width.max(1))).max(1)
}
