//! GGUF tensor names ⇄ canonical (Hugging Face) names: one table per architecture.
//!
//! GGUF files of the `llama` architecture store the rows of q and k so that RoPE pairs lie side by side
//! (`2j, 2j+1`); canonical order has them half a head apart (`j, j + head_dim/2`). The table says which
//! tensors that concerns.

/// Whether the rows of a tensor are interleaved per head in GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Same order on both sides.
    Same,
    /// Interleaved within each query head.
    QueryHeads,
    /// Interleaved within each key/value head.
    KeyHeads,
}

/// One GGUF architecture.
pub struct Architecture {
    /// `general.architecture`.
    pub gguf: &'static str,
    /// HF `model_type` it is read as.
    pub model_type: &'static str,
    /// Other model types written as this architecture.
    pub also_written: &'static [&'static str],
    /// `(GGUF, canonical, rows)` for tensors outside the transformer blocks.
    outer: &'static [(&'static str, &'static str, Rows)],
    /// The same for tensors of block `N`, without `blk.N.` and `model.layers.N.`; without `.weight` / `.bias`.
    block: &'static [(&'static str, &'static str, Rows)],
}

use Rows::{KeyHeads, QueryHeads, Same};

static OUTER: &[(&str, &str, Rows)] = &[
    ("token_embd", "model.embed_tokens", Same),
    ("output_norm", "model.norm", Same),
    ("output", "lm_head", Same),
];

static LLAMA_BLOCK: &[(&str, &str, Rows)] = &[
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

static QWEN_BLOCK: &[(&str, &str, Rows)] = &[
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

/// Every GGUF architecture hearth reads and writes.
pub static ARCHITECTURES: &[Architecture] = &[
    // llama.cpp has no architecture of its own for Mistral.
    Architecture {
        gguf: "llama",
        model_type: "llama",
        also_written: &["mistral"],
        outer: OUTER,
        block: LLAMA_BLOCK,
    },
    Architecture { gguf: "qwen2", model_type: "qwen2", also_written: &[], outer: OUTER, block: QWEN_BLOCK },
    Architecture { gguf: "qwen3", model_type: "qwen3", also_written: &[], outer: OUTER, block: QWEN_BLOCK },
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
    /// Canonical name and row order of a GGUF tensor; `None` for a name the table does not know.
    pub fn to_canonical(&self, gguf: &str) -> Option<(String, Rows)> {
        let (stem, kind) = gguf.rsplit_once('.')?;
        if let Some((_, name, rows)) = self.outer.iter().find(|(g, _, _)| *g == stem) {
            return Some((format!("{name}.{kind}"), *rows));
        }
        let (number, stem) = stem.strip_prefix("blk.")?.split_once('.')?;
        let (_, name, rows) = self.block.iter().find(|(g, _, _)| *g == stem)?;
        Some((format!("model.layers.{number}.{name}.{kind}"), *rows))
    }

    /// GGUF name and row order of a canonical tensor; `None` for a name the table does not know.
    pub fn to_gguf(&self, canonical: &str) -> Option<(String, Rows)> {
        let (stem, kind) = canonical.rsplit_once('.')?;
        if let Some((name, _, rows)) = self.outer.iter().find(|(_, c, _)| *c == stem) {
            return Some((format!("{name}.{kind}"), *rows));
        }
        let (number, stem) = stem.strip_prefix("model.layers.")?.split_once('.')?;
        let (name, _, rows) = self.block.iter().find(|(_, c, _)| *c == stem)?;
        Some((format!("blk.{number}.{name}.{kind}"), *rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_maps_there_and_back() {
        for architecture in ARCHITECTURES {
            for (gguf, _, rows) in architecture.outer {
                round_trip(architecture, &format!("{gguf}.weight"), *rows);
            }
            for (gguf, _, rows) in architecture.block {
                round_trip(architecture, &format!("blk.17.{gguf}.bias"), *rows);
            }
        }
    }

    fn round_trip(architecture: &Architecture, gguf: &str, rows: Rows) {
        let (canonical, found) = architecture.to_canonical(gguf).unwrap();
        assert_eq!(found, rows, "{gguf}");
        assert_eq!(architecture.to_gguf(&canonical), Some((gguf.to_owned(), rows)));
    }

    #[test]
    fn unknown_names_are_not_guessed() {
        let llama = by_gguf("llama").unwrap();
        assert_eq!(llama.to_canonical("blk.0.ffn_gate_inp.weight"), None);
        assert_eq!(llama.to_canonical("nonsense"), None);
        assert_eq!(llama.to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
    }
}
