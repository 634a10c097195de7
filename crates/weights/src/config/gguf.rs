//! GGUF metadata ⇄ [`ModelConfig`].
//!
//! Keys are `<architecture>.<name>`, as llama.cpp's `convert_hf_to_gguf.py` writes them.

use super::rope::magnitude;
use super::{ModelConfig, RopeConfig, RopeScaling};
use crate::Error;
use crate::gguf::{Gguf, WriteValue};
use crate::key_map::{self, Architecture};

/// llama.cpp's default when a file gives no base frequency.
const DEFAULT_THETA: f64 = 10_000.0;
/// Explicit RoPE divisors, `head_dim / 2` of them: how llama3 scaling is stored.
pub(crate) const ROPE_DIVISORS: &str = "rope_freqs.weight";

impl ModelConfig {
    /// Reads the configuration out of a GGUF file's metadata and tensor table.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Damaged`] naming the key, its value and what would be right;
    /// [`Error::Unsupported`] for another architecture.
    pub fn from_gguf(file: &Gguf) -> Result<ModelConfig, Error> {
        let architecture = architecture(file)?;
        let keys = Keys { file, prefix: architecture.gguf };
        let has = |name: &str| file.tensors().iter().any(|t| t.name == name);
        let num_layers = keys.required("block_count")?;
        if num_layers > 1 << 14 {
            let what = format!("block_count is {num_layers}, the limit is {}", 1 << 14);
            return Err(Error::config(what).in_file(file.path()));
        }
        let hidden_size = keys.required("embedding_length")?;
        let num_heads = keys.required("attention.head_count")?;
        let head_dim = keys.head_dim(hidden_size, num_heads)?;
        let window = keys.size("attention.sliding_window")?.filter(|w| *w > 0);
        let config = ModelConfig {
            // llama.cpp has no Mistral; a window in a llama file can only be one.
            model_type: match window {
                Some(_) if architecture.gguf == "llama" => "mistral".into(),
                _ => architecture.model_type.into(),
            },
            vocab_size: keys.vocab_size()?,
            hidden_size,
            intermediate_size: keys.required("feed_forward_length")?,
            num_layers,
            num_heads,
            num_kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(num_heads),
            head_dim,
            max_position_embeddings: keys.required("context_length")?,
            rms_norm_eps: keys.float(architecture.norm_eps)?.unwrap_or(1e-5) as f32,
            tie_word_embeddings: architecture.always_tied || !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            attention_out_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_down.bias"),
            activation: architecture.activation,
            qk_norm: has("blk.0.attn_q_norm.weight"),
            sliding_window: vec![window; num_layers],
            rope: keys.rope()?,
            bos_token_id: token(file, "tokenizer.ggml.bos_token_id")?,
            eos_token_ids: end_tokens(file)?,
            pad_token_id: token(file, "tokenizer.ggml.padding_token_id")?,
        };
        config.validate().map_err(|e| e.in_file(file.path()))?;
        Ok(config)
    }

    /// The keys a GGUF file of this configuration carries, `general.*` and `tokenizer.*` apart.
    pub(crate) fn to_gguf(&self, architecture: &Architecture) -> Vec<(String, WriteValue)> {
        let size = |n: usize| WriteValue::U32(n as u32);
        let mut keys = vec![
            ("block_count", size(self.num_layers)),
            ("context_length", size(self.max_position_embeddings)),
            ("embedding_length", size(self.hidden_size)),
            ("feed_forward_length", size(self.intermediate_size)),
            ("attention.head_count", size(self.num_heads)),
            ("attention.head_count_kv", size(self.num_kv_heads)),
            ("attention.key_length", size(self.head_dim)),
            ("attention.value_length", size(self.head_dim)),
            (architecture.norm_eps, WriteValue::F32(self.rms_norm_eps)),
            ("rope.dimension_count", size(self.head_dim)),
            ("rope.freq_base", WriteValue::F32(self.rope.theta as f32)),
            ("vocab_size", size(self.vocab_size)),
        ];
        if let Some(window) = self.sliding_window.iter().flatten().next() {
            keys.push(("attention.sliding_window", size(*window)));
        }
        keys.extend(scaling_keys(&self.rope.scaling));
        keys.into_iter().map(|(k, v)| (format!("{}.{k}", architecture.gguf), v)).collect()
    }

    /// Why this configuration cannot be said in GGUF metadata, if it cannot.
    pub(crate) fn refuse_for_gguf(&self, architecture: &Architecture) -> Result<(), Error> {
        if self.activation != architecture.activation {
            return Err(Error::config(format!(
                "the activation is {:?}, GGUF files of {} mean {:?}; convert to a bundle or safetensors",
                self.activation, architecture.gguf, architecture.activation
            )));
        }
        if architecture.always_tied && !self.tie_word_embeddings {
            return Err(Error::config(format!(
                "tie_word_embeddings is false, in GGUF files of {} the head is the embedding; convert to a bundle or \
                 safetensors",
                architecture.gguf
            )));
        }
        if matches!(self.rope.scaling, RopeScaling::Dynamic { .. }) {
            return Err(Error::config(
                "rope_type is \"dynamic\", which GGUF files cannot express; convert to a bundle or safetensors",
            ));
        }
        if let RopeScaling::Yarn { truncate: false, .. } = self.rope.scaling {
            return Err(Error::config(
                "yarn with truncate = false is something GGUF files cannot express; convert to a bundle or \
                 safetensors",
            ));
        }
        let mut windows = self.sliding_window.iter();
        if windows.any(|w| *w != self.sliding_window[0]) {
            return Err(Error::config(
                "sliding windows differ between transformer blocks, which GGUF files of this architecture cannot \
                 express; convert to a bundle or safetensors",
            ));
        }
        Ok(())
    }
}

/// The architecture the file names.
pub(crate) fn architecture(file: &Gguf) -> Result<&'static Architecture, Error> {
    let name = file
        .string("general.architecture")?
        .ok_or_else(|| Error::damaged(file.path(), "it has no general.architecture"))?;
    key_map::by_gguf(name).ok_or_else(|| {
        let known: Vec<_> = key_map::ARCHITECTURES.iter().map(|a| a.gguf).collect();
        let what = format!("its architecture is {name:?}, hearth reads {}", known.join(", "));
        Error::unsupported(file.path(), what)
    })
}

fn scaling_keys(scaling: &RopeScaling) -> Vec<(&'static str, WriteValue)> {
    match scaling {
        RopeScaling::Linear { factor } => vec![
            ("rope.scaling.type", WriteValue::String("linear".into())),
            ("rope.scaling.factor", WriteValue::F32(*factor as f32)),
        ],
        RopeScaling::Yarn {
            factor, original_max_position, beta_fast, beta_slow, attention_factor, ..
        } => {
            vec![
                ("rope.scaling.type", WriteValue::String("yarn".into())),
                ("rope.scaling.factor", WriteValue::F32(*factor as f32)),
                ("rope.scaling.original_context_length", WriteValue::U32(*original_max_position as u32)),
                ("rope.scaling.yarn_beta_fast", WriteValue::F32(*beta_fast as f32)),
                ("rope.scaling.yarn_beta_slow", WriteValue::F32(*beta_slow as f32)),
                // llama.cpp multiplies its own 0.1·ln(factor)+1 by this.
                (
                    "rope.scaling.attn_factor",
                    WriteValue::F32((attention_factor / magnitude(*factor, 1.0)) as f32),
                ),
            ]
        }
        // Stored as a tensor of divisors, or refused before.
        RopeScaling::None
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Llama3 { .. }
        | RopeScaling::Divisors(_) => vec![],
    }
}

impl RopeConfig {
    /// Per-frequency divisors for scalings that are nothing but divisors.
    pub fn divisors(&self, head_dim: usize) -> Option<Vec<f32>> {
        match &self.scaling {
            RopeScaling::Divisors(divisors) => Some(divisors.clone()),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let original = *original_max_position as f64;
                let divisor = |i: usize| {
                    let frequency = self.theta.powf(-((2 * i) as f64) / head_dim as f64);
                    let wavelength = 2.0 * std::f64::consts::PI / frequency;
                    if wavelength < original / high_freq_factor {
                        return 1.0;
                    }
                    if wavelength > original / low_freq_factor {
                        return *factor as f32;
                    }
                    let smooth =
                        (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                };
                Some((0..head_dim / 2).map(divisor).collect())
            }
            _ => None,
        }
    }
}

struct Keys<'a> {
    file: &'a Gguf,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn size(&self, name: &str) -> Result<Option<usize>, Error> {
        self.file.size(&self.key(name))
    }

    fn float(&self, name: &str) -> Result<Option<f64>, Error> {
        self.file.float(&self.key(name))
    }

    fn required(&self, name: &str) -> Result<usize, Error> {
        self.size(name)?
            .ok_or_else(|| Error::damaged(self.file.path(), format!("it has no {}", self.key(name))))
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, Error> {
        let head_dim = match self.size("attention.key_length")? {
            Some(explicit) => explicit,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let what = format!("embedding_length {hidden} is not a multiple of head_count {heads}");
                return Err(Error::damaged(self.file.path(), what));
            }
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = self.size(name)?.filter(|n| *n != head_dim) {
                let what = format!("{} is {other}, hearth needs the head width, {head_dim}", self.key(name));
                return Err(Error::unsupported(self.file.path(), what));
            }
        }
        Ok(head_dim)
    }

    /// Rows of the embedding, which is what the model really has.
    fn vocab_size(&self) -> Result<usize, Error> {
        match self.file.tensors().iter().find(|t| t.name == "token_embd.weight") {
            Some(tensor) => Ok(tensor.shape[0]),
            None => self.required("vocab_size"),
        }
    }

    fn rope(&self) -> Result<RopeConfig, Error> {
        let theta = self.float("rope.freq_base")?.unwrap_or(DEFAULT_THETA);
        if let Some(tensor) = self.file.tensors().iter().find(|t| t.name == ROPE_DIVISORS) {
            let format = tensor.format.ok_or_else(|| {
                Error::tensor(self.file.path(), ROPE_DIVISORS, "it is stored in an unknown format")
            })?;
            let divisors = crate::source::decode(format, self.file.raw(tensor));
            return Ok(RopeConfig { theta, scaling: RopeScaling::Divisors(divisors) });
        }
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            // The key of files from before scaling types.
            None => self.float("rope.scale_linear")?,
        };
        let kind = self.file.string(&self.key("rope.scaling.type"))?;
        let scaling = match (kind, factor) {
            (Some("none"), _) | (None, None) => RopeScaling::None,
            (Some("linear") | None, Some(1.0)) => RopeScaling::None,
            (Some("linear") | None, Some(factor)) => RopeScaling::Linear { factor },
            (Some("linear"), None) => RopeScaling::None,
            (Some("yarn"), factor) => self.yarn(factor)?,
            (Some(other), _) => {
                let what = format!("rope scaling {other:?}, hearth reads linear and yarn");
                return Err(Error::unsupported(self.file.path(), what));
            }
        };
        Ok(RopeConfig { theta, scaling })
    }

    fn yarn(&self, factor: Option<f64>) -> Result<RopeScaling, Error> {
        let factor = factor.unwrap_or(1.0);
        let original = match self.size("rope.scaling.original_context_length")? {
            Some(n) => n,
            None => self.required("context_length")?,
        };
        let scale = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position: original,
            beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            attention_factor: scale * magnitude(factor, 1.0),
            truncate: true,
        })
    }
}

fn token(file: &Gguf, key: &str) -> Result<Option<u32>, Error> {
    // Some writers put −1 or 2³²−1 for "none".
    Ok(file.int(key)?.and_then(|n| u32::try_from(n).ok()).filter(|id| *id != u32::MAX))
}

fn end_tokens(file: &Gguf) -> Result<Vec<u32>, Error> {
    let mut ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        if let Some(id) =
            token(file, &format!("tokenizer.ggml.{name}_token_id"))?.filter(|i| !ids.contains(i))
        {
            ids.push(id);
        }
    }
    Ok(ids)
}
