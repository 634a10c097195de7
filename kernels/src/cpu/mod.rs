//! CPU kernels on plain slices. No tensors here.
pub mod adafactor;
pub mod adamw;
pub mod attention;
pub mod attention_backward;
pub mod attention_paged;
mod decoded;
pub mod gemm;
pub mod kv;
pub mod lion;
pub mod loss;
pub mod packed;
pub mod pages;
pub mod pointwise;
pub mod pool;
pub mod quant;
pub mod rope;
pub mod sgd;
pub mod simd;
pub mod stored;
pub mod update;

/// Rows per task, so that a task is worth the hand-over to another thread.
pub(crate) fn rows_per_task(rows: usize, width: usize) -> usize {
    const MIN_ELEMENTS: usize = 1 << 13;
    rows.div_ceil(4 * rayon::current_num_threads()).max(MIN_ELEMENTS.div_ceil(width.max(1))).max(1)
}
