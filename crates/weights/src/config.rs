//! The one model configuration, whatever file it came from.

/// A decoder-only transformer's shape and constants. Dimensions are element counts.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// HF `model_type`: `llama`, `mistral`, `qwen2`, `qwen3`, …
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream (`d_model`).
    pub hidden_size: usize,
    /// Inner width of the gated MLP.
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
    /// RMSNorm epsilon.
    pub rms_norm_eps: f32,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub attention_out_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
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
