//! Micro-benchmarks, one question each, run with `cargo bench --package hearth-benches --bench NAME`.
//!
//! - `adam`: which share of the memory bandwidth does AdamW reach?
//! - `gemm`: how fast is the matrix product at training shapes, with f32, bf16 and f16 operands?
//! - `ops`: how long does each fused op take at the shapes of a training step?
//! - `packed`: how fast are products with packed and quantized matrices at decode and prefill row counts?
//!
//! Whole models are measured by `hearth bench train|prefill|decode`.
