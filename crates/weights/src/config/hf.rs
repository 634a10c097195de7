//! `config.json` ⇄ [`ModelConfig`], as transformers' configuration classes read it.

use super::classes::{ACTIVATIONS, Bias, CLASSES, Class, Window, activation_name, model_types};
use super::{Activation, ModelConfig, rope};
use crate::Error;
use serde_json::{Map, Value, json};

impl ModelConfig {
    /// Reads a `config.json` object: the dialect of transformers 4 (`rope_theta`, `rope_scaling`) or 5
    /// (`rope_parameters`). Keys left out take the defaults of transformers' configuration class.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, its value and what would be right.
    pub fn from_hf(json: &Map<String, Value>) -> Result<ModelConfig, Error> {
        let fields = Fields(json);
        let class = class_of(&fields)?;
        fields.refuse_unsupported()?;
        let activation = fields.activation(class)?;
        let num_layers = fields.size("num_hidden_layers", class.num_layers)?;
        let num_heads = fields.size("num_attention_heads", class.num_heads)?;
        let hidden_size = fields.size("hidden_size", class.hidden_size)?;
        let max_position_embeddings =
            fields.size("max_position_embeddings", class.max_position_embeddings)?;
        if num_layers > 1 << 14 {
            return Err(Error::config(format!(
                "num_hidden_layers is {num_layers}, the limit is {}",
                1 << 14
            )));
        }
        let config = ModelConfig {
            model_type: class.model_type.into(),
            vocab_size: fields.size("vocab_size", class.vocab_size)?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", class.intermediate_size)?,
            num_layers,
            num_heads,
            num_kv_heads: fields.kv_heads(class.num_kv_heads, num_heads)?,
            head_dim: fields.head_dim(class.head_dim, hidden_size, num_heads)?,
            max_position_embeddings,
            rms_norm_eps: fields.float(class.norm_eps.0)?.unwrap_or(class.norm_eps.1) as f32,
            tie_word_embeddings: fields.flag("tie_word_embeddings", class.tied)?,
            qkv_bias: fields.bias(&class.qkv_bias)?,
            attention_out_bias: fields.bias(&class.attention_out_bias)?,
            mlp_bias: fields.bias(&class.mlp_bias)?,
            activation,
            qk_norm: class.qk_norm,
            sliding_window: fields.windows(&class.window, num_layers)?,
            rope: rope::from_hf(&fields, max_position_embeddings)?,
            bos_token_id: fields.token("bos_token_id", class.bos)?,
            eos_token_ids: fields.tokens("eos_token_id", class.eos)?,
            pad_token_id: fields.token("pad_token_id", class.pad)?,
        };
        config.validate()?;
        Ok(config)
    }

    /// The `config.json` object transformers (4 and 5) reads as this configuration.
    pub fn to_hf(&self) -> Map<String, Value> {
        let class = CLASSES.iter().find(|c| c.model_type == self.model_type).unwrap_or(&CLASSES[0]);
        let mut json = object(json!({
            "architectures": [class.architecture],
            "model_type": class.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": activation_name(self.activation),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rope_theta": self.rope.theta,
            "rope_scaling": rope::to_hf(&self.rope.scaling, self.max_position_embeddings),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": one_or_many(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "torch_dtype": "float32",
        }));
        json.insert(class.norm_eps.0.into(), shortest(self.rms_norm_eps).into());
        if class.model_type == "gemma" {
            // What transformers 4 reads instead of `hidden_act`.
            json.insert("hidden_activation".into(), activation_name(self.activation).into());
        }
        if let Bias::Key(key, _) = class.qkv_bias {
            json.insert(key.into(), (self.qkv_bias || self.attention_out_bias).into());
        }
        if let Bias::Key(key, _) = class.mlp_bias {
            json.insert(key.into(), self.mlp_bias.into());
        }
        self.put_windows(&class.window, &mut json);
        json
    }

    fn put_windows(&self, kind: &Window, json: &mut Map<String, Value>) {
        let window = self.sliding_window.iter().flatten().next().copied();
        match kind {
            Window::None => {}
            Window::Every(_) => {
                json.insert("sliding_window".into(), json!(window));
            }
            Window::Upper { .. } => {
                let first = self.sliding_window.iter().position(Option::is_some);
                let types = self.sliding_window.iter().map(|w| match w {
                    Some(_) => "sliding_attention",
                    None => "full_attention",
                });
                json.insert("use_sliding_window".into(), window.is_some().into());
                json.insert("sliding_window".into(), json!(window));
                json.insert("max_window_layers".into(), first.unwrap_or(self.num_layers).into());
                json.insert("layer_types".into(), types.collect::<Vec<_>>().into());
            }
        }
    }
}

fn class_of(fields: &Fields<'_>) -> Result<&'static Class, Error> {
    let model_type = match fields.0.get("model_type") {
        Some(Value::String(s)) => s.as_str(),
        Some(other) => return Err(wrong("model_type", other, "a name")),
        None => {
            return Err(Error::config(format!(
                "model_type is missing; hearth reads {}",
                model_types().join(", ")
            )));
        }
    };
    CLASSES.iter().find(|c| c.model_type == model_type).ok_or_else(|| {
        Error::config(format!("model_type is {model_type:?}, hearth reads {}", model_types().join(", ")))
    })
}

/// A JSON object with typed, named access.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    /// The value, with `null` and absent alike.
    fn present(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        if let Some(method) = self.present("quantization_config") {
            let method = method.get("quant_method").and_then(Value::as_str).unwrap_or("another tool");
            return Err(Error::config(format!(
                "quantization_config says the weights were quantized by {method}; hearth reads f32, f16 and bf16 \
                 directories and quantized GGUF files: use the unquantized model"
            )));
        }
        match self.present("use_bidirectional_attention") {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(other) => Err(wrong("use_bidirectional_attention", other, "false: hearth attends causally")),
        }
    }

    fn activation(&self, class: &Class) -> Result<Activation, Error> {
        let key = match class.model_type {
            // Gemma's first files say `gelu` and mean the other; transformers 4 came to read this key instead.
            "gemma" if self.present("hidden_activation").is_some() => "hidden_activation",
            _ => "hidden_act",
        };
        let found = match self.present(key) {
            None => Some(class.activations[0]),
            Some(Value::String(name)) if class.model_type == "gemma" && name == "gelu" => {
                Some(Activation::GeluTanh)
            }
            Some(Value::String(name)) => ACTIVATIONS.iter().find(|(n, _)| n == name).map(|(_, a)| *a),
            Some(_) => None,
        };
        found.filter(|found| class.activations.contains(found)).ok_or_else(|| {
            let names: Vec<_> =
                class.activations.iter().map(|a| format!("{:?}", activation_name(*a))).collect();
            let wanted =
                format!("{}, which is what hearth computes for {}", names.join(" or "), class.model_type);
            wrong(key, &self.0[key], &wanted)
        })
    }

    /// A whole number; absent takes the default, and so does `null`.
    fn size(&self, key: &str, default: usize) -> Result<usize, Error> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.present(key) else { return Ok(None) };
        whole(value).map(Some).ok_or_else(|| wrong(key, value, "a whole number from 0 up"))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| wrong(key, value, "a number"))
    }

    pub(super) fn optional_flag(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| wrong(key, value, "true or false"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        Ok(self.optional_flag(key)?.unwrap_or(default))
    }

    fn bias(&self, bias: &Bias) -> Result<bool, Error> {
        match bias {
            Bias::Always => Ok(true),
            Bias::Never => Ok(false),
            Bias::Key(key, default) => self.flag(key, *default),
        }
    }

    /// Absent takes the class default; `null` means as many as query heads.
    fn kv_heads(&self, default: Option<usize>, num_heads: usize) -> Result<usize, Error> {
        match self.0.get("num_key_value_heads") {
            Some(Value::Null) => Ok(num_heads),
            _ => self.size("num_key_value_heads", default.unwrap_or(num_heads)),
        }
    }

    fn head_dim(&self, default: Option<usize>, hidden: usize, heads: usize) -> Result<usize, Error> {
        if let Some(explicit) = self.optional_size("head_dim")?.or(default) {
            return Ok(explicit);
        }
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(Error::config(format!(
                "hidden_size is {hidden}, it must be a multiple of num_attention_heads, which is {heads}, \
                 unless head_dim is given"
            )));
        }
        Ok(hidden / heads)
    }

    fn windows(&self, kind: &Window, num_layers: usize) -> Result<Vec<Option<usize>>, Error> {
        match *kind {
            Window::None => Ok(vec![None; num_layers]),
            Window::Every(default) => {
                let window = match self.0.get("sliding_window") {
                    Some(Value::Null) => None,
                    _ => self.optional_size("sliding_window")?.or(default),
                };
                Ok(vec![window; num_layers])
            }
            Window::Upper { .. } if !self.flag("use_sliding_window", false)? => Ok(vec![None; num_layers]),
            Window::Upper { window, first } => {
                let window = match self.0.get("sliding_window") {
                    Some(Value::Null) => None,
                    _ => Some(self.size("sliding_window", window)?),
                };
                let first = self.size("max_window_layers", first)?;
                let slides = self.sliding_blocks(first, num_layers)?;
                Ok(slides.into_iter().map(|s| window.filter(|_| s)).collect())
            }
        }
    }

    fn sliding_blocks(&self, first: usize, num_layers: usize) -> Result<Vec<bool>, Error> {
        let Some(types) = self.present("layer_types") else {
            return Ok((0..num_layers).map(|i| i >= first).collect());
        };
        let list = types.as_array().ok_or_else(|| wrong("layer_types", types, "a list"))?;
        if list.len() != num_layers {
            return Err(Error::config(format!(
                "layer_types has {} entries, num_hidden_layers is {num_layers}",
                list.len()
            )));
        }
        list.iter()
            .map(|t| match t.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(wrong("layer_types", t, "sliding_attention or full_attention")),
            })
            .collect()
    }

    /// A token id; absent takes the default; `null` and negative numbers mean none.
    fn token(&self, key: &str, default: Option<u32>) -> Result<Option<u32>, Error> {
        match self.0.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => token_id(key, value),
        }
    }

    /// A token id or a list of them.
    fn tokens(&self, key: &str, default: Option<u32>) -> Result<Vec<u32>, Error> {
        match self.0.get(key) {
            Some(Value::Array(ids)) => {
                let ids = ids.iter().map(|id| token_id(key, id)).collect::<Result<Vec<_>, _>>()?;
                Ok(ids.into_iter().flatten().collect())
            }
            _ => Ok(self.token(key, default)?.into_iter().collect()),
        }
    }
}

/// A token id of `config.json` or `generation_config.json`; a negative one means "none".
fn token_id(key: &str, value: &Value) -> Result<Option<u32>, Error> {
    match value.as_i64() {
        Some(id) if id < 0 => Ok(None),
        Some(id) if id <= i64::from(u32::MAX) => Ok(Some(id as u32)),
        _ => Err(wrong(key, value, "a token id or a list of token ids")),
    }
}

/// Adds the end tokens of a `generation_config.json`, which are what `generate` stops at.
pub(crate) fn add_generation_eos(config: &mut ModelConfig, json: &Map<String, Value>) -> Result<(), Error> {
    for id in Fields(json).tokens("eos_token_id", None)? {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    Ok(())
}

/// Whole numbers, also when written as `4096.0`.
fn whole(value: &Value) -> Option<usize> {
    if let Some(n) = value.as_u64() {
        return usize::try_from(n).ok();
    }
    let f = value.as_f64()?;
    (f >= 0.0 && f.fract() == 0.0 && f <= 9e15).then_some(f as usize)
}

pub(super) fn wrong(key: &str, value: &Value, wanted: &str) -> Error {
    let mut shown = value.to_string();
    if shown.len() > 80 {
        shown = shown.chars().take(80).collect::<String>() + "…";
    }
    Error::config(format!("{key} is {shown}, it must be {wanted}"))
}

/// One number when there is one, a list when there are several, `null` when there is none.
pub(crate) fn one_or_many(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => (*one).into(),
        many => many.into(),
    }
}

/// The f64 that prints as the f32 does: `1e-5`, not `9.999999747378752e-6`.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
