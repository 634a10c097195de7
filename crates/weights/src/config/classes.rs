//! Transformers' configuration classes: what a `config.json` means where it says nothing.

use super::Activation;

/// Where a projection's bias comes from.
pub(super) enum Bias {
    Always,
    Never,
    /// The named key decides; the flag is what absent means.
    Key(&'static str, bool),
}

/// Which transformer blocks have a sliding window.
pub(super) enum Window {
    None,
    /// `sliding_window` holds for every block; the number is the class default.
    Every(Option<usize>),
    /// Only with `use_sliding_window`, for blocks named in `layer_types` or from `max_window_layers` on.
    Upper {
        window: usize,
        first: usize,
    },
}

/// Defaults of one configuration class, for keys `config.json` leaves out.
pub(super) struct Class {
    pub model_type: &'static str,
    pub architecture: &'static str,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub max_position_embeddings: usize,
    pub num_kv_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// The norms' epsilon: its key and its default.
    pub norm_eps: (&'static str, f64),
    /// What hearth computes for this class, the default first.
    pub activations: &'static [Activation],
    pub qkv_bias: Bias,
    pub attention_out_bias: Bias,
    pub mlp_bias: Bias,
    pub qk_norm: bool,
    pub window: Window,
}

/// One row per model type. Values are those of transformers' `configuration_<type>.py`.
pub(super) static CLASSES: &[Class] = &[
    Class {
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        vocab_size: 32000,
        hidden_size: 4096,
        intermediate_size: 11008,
        num_layers: 32,
        num_heads: 32,
        max_position_embeddings: 2048,
        num_kv_heads: None,
        head_dim: None,
        bos: Some(1),
        eos: Some(2),
        pad: None,
        tied: false,
        norm_eps: ("rms_norm_eps", 1e-6),
        activations: &[Activation::Silu],
        qkv_bias: Bias::Key("attention_bias", false),
        attention_out_bias: Bias::Key("attention_bias", false),
        mlp_bias: Bias::Key("mlp_bias", false),
        qk_norm: false,
        window: Window::None,
    },
    Class {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        vocab_size: 32000,
        hidden_size: 4096,
        intermediate_size: 14336,
        num_layers: 32,
        num_heads: 32,
        max_position_embeddings: 4096 * 32,
        num_kv_heads: Some(8),
        head_dim: None,
        bos: Some(1),
        eos: Some(2),
        pad: None,
        tied: false,
        norm_eps: ("rms_norm_eps", 1e-6),
        activations: &[Activation::Silu],
        qkv_bias: Bias::Never,
        attention_out_bias: Bias::Never,
        mlp_bias: Bias::Never,
        qk_norm: false,
        window: Window::Every(Some(4096)),
    },
    Class {
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        vocab_size: 151936,
        hidden_size: 4096,
        intermediate_size: 22016,
        num_layers: 32,
        num_heads: 32,
        max_position_embeddings: 32768,
        num_kv_heads: Some(32),
        head_dim: None,
        bos: None,
        eos: None,
        pad: None,
        tied: false,
        norm_eps: ("rms_norm_eps", 1e-6),
        activations: &[Activation::Silu],
        qkv_bias: Bias::Always,
        attention_out_bias: Bias::Never,
        mlp_bias: Bias::Never,
        qk_norm: false,
        window: Window::Upper { window: 4096, first: 28 },
    },
    Class {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        vocab_size: 151936,
        hidden_size: 4096,
        intermediate_size: 22016,
        num_layers: 32,
        num_heads: 32,
        max_position_embeddings: 32768,
        num_kv_heads: Some(32),
        head_dim: Some(128),
        bos: None,
        eos: None,
        pad: None,
        tied: false,
        norm_eps: ("rms_norm_eps", 1e-6),
        activations: &[Activation::Silu],
        qkv_bias: Bias::Key("attention_bias", false),
        attention_out_bias: Bias::Key("attention_bias", false),
        mlp_bias: Bias::Never,
        qk_norm: true,
        window: Window::Upper { window: 4096, first: 28 },
    },
    Class {
        model_type: "gemma",
        architecture: "GemmaForCausalLM",
        vocab_size: 256000,
        hidden_size: 3072,
        intermediate_size: 24576,
        num_layers: 28,
        num_heads: 16,
        max_position_embeddings: 8192,
        num_kv_heads: Some(16),
        head_dim: Some(256),
        bos: Some(2),
        eos: Some(1),
        pad: Some(0),
        tied: true,
        norm_eps: ("rms_norm_eps", 1e-6),
        activations: &[Activation::GeluTanh],
        qkv_bias: Bias::Key("attention_bias", false),
        attention_out_bias: Bias::Key("attention_bias", false),
        mlp_bias: Bias::Never,
        qk_norm: false,
        window: Window::None,
    },
    Class {
        model_type: "starcoder2",
        architecture: "Starcoder2ForCausalLM",
        vocab_size: 49152,
        hidden_size: 3072,
        intermediate_size: 12288,
        num_layers: 30,
        num_heads: 24,
        max_position_embeddings: 4096,
        num_kv_heads: Some(2),
        head_dim: None,
        bos: Some(50256),
        eos: Some(50256),
        pad: None,
        tied: true,
        norm_eps: ("norm_epsilon", 1e-5),
        activations: &[Activation::GeluTanh, Activation::Gelu],
        qkv_bias: Bias::Key("use_bias", true),
        attention_out_bias: Bias::Key("use_bias", true),
        mlp_bias: Bias::Key("use_bias", true),
        qk_norm: false,
        window: Window::Every(None),
    },
];

/// Every `model_type` there is a class for.
pub(super) fn model_types() -> Vec<&'static str> {
    CLASSES.iter().map(|class| class.model_type).collect()
}

/// What transformers calls the activations; the first name of each is written.
pub(super) static ACTIVATIONS: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
];

pub(super) fn activation_name(activation: Activation) -> &'static str {
    ACTIVATIONS.iter().find(|(_, a)| *a == activation).map_or("silu", |(name, _)| name)
}

/// The key that a model type's norm epsilon stands under.
pub(super) fn norm_key(model_type: &str) -> &'static str {
    CLASSES.iter().find(|c| c.model_type == model_type).unwrap_or(&CLASSES[0]).norm_eps.0
}
