//! Micro-benchmarks, one question each, run with `cargo bench --package hearth-benches --bench NAME`.
//!
//! - `gemm`: how fast is the f32 matrix product at training shapes?
//! - `packed`: how fast are products with packed and quantized matrices at decode and prefill row counts?
//!
//! Whole models are measured by `hearth bench train|prefill|decode`.
