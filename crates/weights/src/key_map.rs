//! GGUF tensor names ⇄ canonical (Hugging Face) names: one table per architecture.
//!
//! GGUF files of the `llama` architecture store the rows of q and k so that RoPE pairs lie side by side
//! (`2j, 2j+1`); canonical order has them half a head apart (`j, j + head_dim/2`). Those of `gemma` store the norms'
//! gains, which are one more than the canonical weights. The table says which tensors that concerns.

use crate::config::Activation;

/// How a tensor lies in GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As in canonical files.
    Same,
    /// Rows interleaved within each query head.
    QueryHeads,
    /// Rows interleaved within each key/value head.
    KeyHeads,
    /// Every value larger by one.
    PlusOne,
}

/// One GGUF architecture.
pub struct Architecture {
    /// `general.architecture`.
    pub gguf: &'static str,
    /// HF `model_type` it is read as.
    pub model_type: &'static str,
    /// Other model types written as this architecture.
    pub also_written: &'static [&'static str],
    /// What llama.cpp computes for it: the files do not say.
    pub activation: Activation,
    /// Key of the norms' epsilon.
    pub norm_eps: &'static str,
    /// Whether llama.cpp takes the embedding for the head, whatever the file holds.
    pub always_tied: bool,
    /// `(GGUF, canonical, form)` for tensors outside the transformer blocks.
    outer: &'static [(&'static str, &'static str, Form)],
    /// The same for tensors of block `N`, without `blk.N.` and `model.layers.N.`; without `.weight` / `.bias`.
    block: &'static [(&'static str, &'static str, Form)],
}

use Form::{KeyHeads, PlusOne, QueryHeads, Same};

static OUTER: &[(&str, &str, Form)] = &[
    ("token_embd", "model.embed_tokens", Same),
    ("output_norm", "model.norm", Same),
    ("output", "lm_head", Same),
];

static LLAMA_BLOCK: &[(&str, &str, Form)] = &[
    ("attn_norm", "input_layernorm", Same),
    ("attn_q", "self_attn.q_proj", QueryHeads),
    ("attn_k", "self_attn.k_proj", KeyHeads),
    ("attn_v", "self_attn.v_proj", Same),
    ("attn_output", "self_attn.o_proj", Same),
    ("ffn_norm", "post_attention_layernorm", Same),
    ("ffn_gate", "mlp.gate_proj", Same),
    ("ffn_up", "mlp.up_proj", Same),
    ("ffn_down", "mlp.down_proj", Same),
];

static QWEN_BLOCK: &[(&str, &str, Form)] = &[
    ("attn_norm", "input_layernorm", Same),
    ("attn_q", "self_attn.q_proj", Same),
    ("attn_k", "self_attn.k_proj", Same),
    ("attn_v", "self_attn.v_proj", Same),
    ("attn_output", "self_attn.o_proj", Same),
    ("attn_q_norm", "self_attn.q_norm", Same),
    ("attn_k_norm", "self_attn.k_norm", Same),
    ("ffn_norm", "post_attention_layernorm", Same),
    ("ffn_gate", "mlp.gate_proj", Same),
    ("ffn_up", "mlp.up_proj", Same),
    ("ffn_down", "mlp.down_proj", Same),
];

static GEMMA_OUTER: &[(&str, &str, Form)] =
    &[("token_embd", "model.embed_tokens", Same), ("output_norm", "model.norm", PlusOne)];

static GEMMA_BLOCK: &[(&str, &str, Form)] = &[
    ("attn_norm", "input_layernorm", PlusOne),
    ("attn_q", "self_attn.q_proj", Same),
    ("attn_k", "self_attn.k_proj", Same),
    ("attn_v", "self_attn.v_proj", Same),
    ("attn_output", "self_attn.o_proj", Same),
    ("ffn_norm", "post_attention_layernorm", PlusOne),
    ("ffn_gate", "mlp.gate_proj", Same),
    ("ffn_up", "mlp.up_proj", Same),
    ("ffn_down", "mlp.down_proj", Same),
];

static STARCODER2_BLOCK: &[(&str, &str, Form)] = &[
    ("attn_norm", "input_layernorm", Same),
    ("attn_q", "self_attn.q_proj", Same),
    ("attn_k", "self_attn.k_proj", Same),
    ("attn_v", "self_attn.v_proj", Same),
    ("attn_output", "self_attn.o_proj", Same),
    ("ffn_norm", "post_attention_layernorm", Same),
    ("ffn_up", "mlp.c_fc", Same),
    ("ffn_down", "mlp.c_proj", Same),
];

const RMS: &str = "attention.layer_norm_rms_epsilon";

const LLAMA: Architecture = Architecture {
    gguf: "llama",
    model_type: "llama",
    // llama.cpp has no architecture of its own for Mistral.
    also_written: &["mistral"],
    activation: Activation::Silu,
    norm_eps: RMS,
    always_tied: false,
    outer: OUTER,
    block: LLAMA_BLOCK,
};

const QWEN2: Architecture =
    Architecture { gguf: "qwen2", model_type: "qwen2", also_written: &[], block: QWEN_BLOCK, ..LLAMA };

/// Every GGUF architecture hearth reads and writes.
pub static ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    QWEN2,
    Architecture { gguf: "qwen3", model_type: "qwen3", ..QWEN2 },
    Architecture {
        gguf: "gemma",
        model_type: "gemma",
        also_written: &[],
        activation: Activation::GeluTanh,
        norm_eps: RMS,
        always_tied: true,
        outer: GEMMA_OUTER,
        block: GEMMA_BLOCK,
    },
    Architecture {
        gguf: "starcoder2",
        model_type: "starcoder2",
        also_written: &[],
        activation: Activation::GeluTanh,
        norm_eps: "attention.layer_norm_epsilon",
        always_tied: false,
        outer: OUTER,
        block: STARCODER2_BLOCK,
    },
];

/// The architecture a GGUF file names.
pub fn by_gguf(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|a| a.gguf == name)
}

/// The architecture a model type is written as.
pub fn by_model_type(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|a| a.model_type == name || a.also_written.contains(&name))
}

impl Architecture {
    /// Canonical name and form of a GGUF tensor; `None` for a name the table does not know.
    pub fn to_canonical(&self, gguf: &str) -> Option<(String, Form)> {
        let (stem, kind) = gguf.rsplit_once('.')?;
        if let Some((_, name, form)) = self.outer.iter().find(|(g, _, _)| *g == stem) {
            return Some((format!("{name}.{kind}"), *form));
        }
        let (number, stem) = stem.strip_prefix("blk.")?.split_once('.')?;
        let (_, name, form) = self.block.iter().find(|(g, _, _)| *g == stem)?;
        Some((format!("model.layers.{number}.{name}.{kind}"), *form))
    }

    /// GGUF name and form of a canonical tensor; `None` for a name the table does not know.
    pub fn to_gguf(&self, canonical: &str) -> Option<(String, Form)> {
        let (stem, kind) = canonical.rsplit_once('.')?;
        if let Some((name, _, form)) = self.outer.iter().find(|(_, c, _)| *c == stem) {
            return Some((format!("{name}.{kind}"), *form));
        }
        let (number, stem) = stem.strip_prefix("model.layers.")?.split_once('.')?;
        let (name, _, form) = self.block.iter().find(|(_, c, _)| *c == stem)?;
        Some((format!("blk.{number}.{name}.{kind}"), *form))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_maps_there_and_back() {
        for architecture in ARCHITECTURES {
            for (gguf, _, form) in architecture.outer {
                round_trip(architecture, &format!("{gguf}.weight"), *form);
            }
            for (gguf, _, form) in architecture.block {
                round_trip(architecture, &format!("blk.17.{gguf}.bias"), *form);
            }
        }
    }

    fn round_trip(architecture: &Architecture, gguf: &str, form: Form) {
        let (canonical, found) = architecture.to_canonical(gguf).unwrap();
        assert_eq!(found, form, "{gguf}");
        assert_eq!(architecture.to_gguf(&canonical), Some((gguf.to_owned(), form)));
    }

    #[test]
    fn unknown_names_are_not_guessed() {
        let llama = by_gguf("llama").unwrap();
        assert_eq!(llama.to_canonical("blk.0.ffn_gate_inp.weight"), None);
        assert_eq!(llama.to_canonical("nonsense"), None);
        assert_eq!(llama.to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
    }
}
