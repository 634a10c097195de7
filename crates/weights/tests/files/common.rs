//! Fixtures and small models shared by the tests.

use hearth_weights::config::Activation::{GeluTanh, Silu};
use hearth_weights::quant;
use hearth_weights::{ModelConfig, RopeConfig, RopeScaling, TensorMeta};
use std::path::{Path, PathBuf};

/// A file or directory made by `fixtures/generate.py`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A tiny configuration to vary.
pub fn tiny_config(model_type: &str) -> ModelConfig {
    ModelConfig {
        model_type: model_type.into(),
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 64,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        qkv_bias: model_type == "qwen2",
        attention_out_bias: false,
        mlp_bias: false,
        activation: if matches!(model_type, "gemma" | "starcoder2") { GeluTanh } else { Silu },
        qk_norm: model_type == "qwen3",
        sliding_window: vec![None; 2],
        rope: RopeConfig { theta: 10000.0, scaling: RopeScaling::None },
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        pad_token_id: None,
    }
}

/// An f32 tensor's table entry.
pub fn f32_meta(name: &str, shape: &[usize]) -> TensorMeta {
    TensorMeta { name: name.into(), shape: shape.to_vec(), format: quant::F32 }
}

/// Deterministic values between −1 and 1.
pub fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747796405).wrapping_add(2891336453);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Little-endian bytes of f32 values.
pub fn le(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
