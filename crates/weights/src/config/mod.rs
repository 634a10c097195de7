//! The one model configuration, whatever file it came from.
//!
//! # Layout
//! - here: [`ModelConfig`] and what makes one valid;
//! - `hf`: to and from `config.json`; `classes`: the defaults of transformers' configuration classes;
//! - `rope`: the `rope_scaling` / `rope_parameters` object;
//! - `gguf`: to and from GGUF metadata.

mod classes;
mod gguf;
mod hf;
mod rope;

use crate::Error;

pub(crate) use gguf::{ROPE_DIVISORS, architecture};
pub(crate) use hf::{add_generation_eos, one_or_many};

/// A decoder-only transformer's shape and constants. Dimensions are element counts.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// HF `model_type`: `llama`, `mistral`, `gemma`, `starcoder2`, …
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream (`d_model`).
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; even. Not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Longest position the model was trained for.
    pub max_position_embeddings: usize,
    /// The norms' epsilon: added to the mean square (RMSNorm) or to the variance (LayerNorm).
    pub rms_norm_eps: f32,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub attention_out_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// What the MLP's gate goes through, or its inner values where it has no gate.
    pub activation: Activation,
    /// RMSNorm on each head of q and k before RoPE (Qwen3).
    pub qk_norm: bool,
    /// Window in tokens (a query sees itself and `window − 1` before it) for each block; `None` = full.
    /// Length `num_layers`.
    pub sliding_window: Vec<Option<usize>>,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
}

/// Activation of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^−x)`; HF `silu`, `swish`.
    Silu,
    /// `x · Φ(x)`; HF `gelu`.
    Gelu,
    /// Its approximation by `tanh`; HF `gelu_pytorch_tanh`, `gelu_new`, `gelu_fast`.
    GeluTanh,
}

/// Rotary position embedding: base and scaling.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric frequencies.
    pub theta: f64,
    /// How frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// RoPE scaling variants in use (HF `modeling_rope_utils`).
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// NTK-aware base change once the sequence exceeds the original length.
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Length up to which nothing changes (`max_position_embeddings` when the file does not say).
        original_max_position: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Training length before stretching.
        original_max_position: usize,
        /// Correction range, fast end (32).
        beta_fast: f64,
        /// Correction range, slow end (1).
        beta_slow: f64,
        /// Multiplies cos and sin. Resolved when parsing: explicit `attention_factor`, or from
        /// `mscale`/`mscale_all_dim`, or `0.1·ln(factor)+1`.
        attention_factor: f64,
        /// Whether correction bounds are rounded to whole dimensions (HF `truncate`, default true).
        truncate: bool,
    },
    /// Llama 3 frequency-band scaling.
    Llama3 {
        /// Stretch of low frequencies.
        factor: f64,
        /// Low-frequency bound.
        low_freq_factor: f64,
        /// High-frequency bound.
        high_freq_factor: f64,
        /// Training length before stretching.
        original_max_position: usize,
    },
    /// Explicit per-frequency divisors (GGUF `rope_freqs.weight`), `head_dim / 2` of them.
    Divisors(Vec<f32>),
}

impl ModelConfig {
    /// Checks every number against the others and against sane limits.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first key that does not fit, its value and the limit.
    pub fn validate(&self) -> Result<(), Error> {
        self.check_sizes()?;
        self.check_heads()?;
        if !(self.rms_norm_eps.is_finite() && (0.0..1.0).contains(&self.rms_norm_eps)) {
            let (key, eps) = (classes::norm_key(&self.model_type), self.rms_norm_eps);
            return Err(Error::config(format!("{key} is {eps}, it must be at least 0 and below 1")));
        }
        if self.sliding_window.len() != self.num_layers {
            return Err(Error::config(format!(
                "sliding windows are given for {} blocks, num_hidden_layers is {}",
                self.sliding_window.len(),
                self.num_layers
            )));
        }
        if self.sliding_window.contains(&Some(0)) {
            return Err(Error::config("sliding_window is 0, it must be at least 1 or null"));
        }
        rope::validate(&self.rope, self.head_dim)
    }

    fn check_sizes(&self) -> Result<(), Error> {
        // Far above any model made, far below what overflows a product of two of them.
        let limits = [
            ("vocab_size", self.vocab_size, 1 << 28),
            ("hidden_size", self.hidden_size, 1 << 22),
            ("intermediate_size", self.intermediate_size, 1 << 24),
            ("num_hidden_layers", self.num_layers, 1 << 14),
            ("num_attention_heads", self.num_heads, 1 << 16),
            ("num_key_value_heads", self.num_kv_heads, 1 << 16),
            ("head_dim", self.head_dim, 1 << 16),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 32),
        ];
        for (key, value, limit) in limits {
            if value == 0 || value > limit {
                return Err(Error::config(format!("{key} is {value}, it must be from 1 to {limit}")));
            }
        }
        Ok(())
    }

    fn check_heads(&self) -> Result<(), Error> {
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(Error::config(format!(
                "num_attention_heads is {}, it must be a multiple of num_key_value_heads, which is {}",
                self.num_heads, self.num_kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::config(format!(
                "head_dim is {}, rotary embedding needs an even one",
                self.head_dim
            )));
        }
        Ok(())
    }
}
