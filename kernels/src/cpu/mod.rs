//! CPU kernels on plain slices. No tensors here.
pub mod gemm;
pub mod simd;
