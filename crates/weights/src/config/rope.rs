//! `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5) ⇄ [`RopeConfig`].
//!
//! Defaults and precedence are those of transformers' `modeling_rope_utils`.

use super::hf::{Fields, wrong};
use super::{RopeConfig, RopeScaling};
use crate::Error;
use serde_json::{Map, Value, json};

/// Base frequency when the file gives none.
const DEFAULT_THETA: f64 = 10_000.0;

pub(super) fn from_hf(fields: &Fields<'_>, max_position: usize) -> Result<RopeConfig, Error> {
    let empty = Map::new();
    let given = scaling_object(fields)?.unwrap_or(&empty);
    let rope = Fields(given);
    refuse_partial(fields)?;
    refuse_partial(&rope)?;
    let theta = match rope.float("rope_theta")? {
        Some(theta) => theta,
        None => fields.float("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    // A top-level value wins, as in transformers.
    let original = match fields.optional_size("original_max_position_embeddings")? {
        Some(n) => n,
        None => rope.optional_size("original_max_position_embeddings")?.unwrap_or(max_position),
    };
    let scaling = match kind(given)? {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: required(&rope, "factor")? },
        // transformers stretches from max_position_embeddings, whatever the scaling object says.
        "dynamic" => {
            RopeScaling::Dynamic { factor: required(&rope, "factor")?, original_max_position: max_position }
        }
        "yarn" => yarn(&rope, max_position, original)?,
        "llama3" => RopeScaling::Llama3 {
            factor: required(&rope, "factor")?,
            low_freq_factor: required(&rope, "low_freq_factor")?,
            high_freq_factor: required(&rope, "high_freq_factor")?,
            original_max_position: original,
        },
        "longrope" | "su" => divisors(&rope)?,
        other => {
            return Err(Error::config(format!(
                "rope_type is {other:?}, hearth computes default, linear, dynamic, yarn and llama3"
            )));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

/// `rope_scaling` if it says anything, else `rope_parameters`.
fn scaling_object<'a>(fields: &Fields<'a>) -> Result<Option<&'a Map<String, Value>>, Error> {
    for key in ["rope_scaling", "rope_parameters"] {
        match fields.0.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::Object(map)) if map.is_empty() => {}
            Some(Value::Object(map)) if map.values().any(Value::is_object) => {
                return Err(Error::config(format!(
                    "{key} gives one rotary embedding per layer type, hearth computes one for the whole model"
                )));
            }
            Some(Value::Object(map)) => return Ok(Some(map)),
            Some(other) => return Err(wrong(key, other, "an object or null")),
        }
    }
    Ok(None)
}

fn kind(rope: &Map<String, Value>) -> Result<&str, Error> {
    match rope.get("rope_type").or_else(|| rope.get("type")) {
        None | Some(Value::Null) => Ok("default"),
        Some(Value::String(name)) => Ok(name),
        Some(other) => Err(wrong("rope_type", other, "a name")),
    }
}

fn refuse_partial(fields: &Fields<'_>) -> Result<(), Error> {
    match fields.float("partial_rotary_factor")? {
        Some(p) if p != 1.0 => Err(Error::config(format!(
            "partial_rotary_factor is {p}, hearth rotates whole heads: it must be 1 or absent"
        ))),
        _ => Ok(()),
    }
}

fn required(rope: &Fields<'_>, key: &str) -> Result<f64, Error> {
    rope.float(key)?.ok_or_else(|| Error::config(format!("the rope scaling object has no {key}")))
}

fn yarn(rope: &Fields<'_>, max_position: usize, original: usize) -> Result<RopeScaling, Error> {
    let factor = match rope.float("factor")? {
        Some(factor) => factor,
        None if original > 0 => max_position as f64 / original as f64,
        None => return Err(Error::config("original_max_position_embeddings is 0, it must be at least 1")),
    };
    let attention_factor = match rope.float("attention_factor")? {
        Some(explicit) => explicit,
        None => {
            let nonzero = |v: Option<f64>| v.filter(|m| *m != 0.0);
            match (nonzero(rope.float("mscale")?), nonzero(rope.float("mscale_all_dim")?)) {
                (Some(m), Some(all)) => magnitude(factor, m) / magnitude(factor, all),
                _ => magnitude(factor, 1.0),
            }
        }
    };
    let nonzero_or = |key, default| Ok::<_, Error>(rope.float(key)?.filter(|v| *v != 0.0).unwrap_or(default));
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position: original,
        beta_fast: nonzero_or("beta_fast", 32.0)?,
        beta_slow: nonzero_or("beta_slow", 1.0)?,
        attention_factor,
        truncate: rope.optional_flag("truncate")?.unwrap_or(true),
    })
}

/// YaRN's attention temperature, `0.1 · m · ln(scale) + 1`.
pub(super) fn magnitude(scale: f64, m: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 }
}

/// `longrope` with one set of factors and no attention factor is a plain list of divisors; the real, two-set
/// kind is refused.
fn divisors(rope: &Fields<'_>) -> Result<RopeScaling, Error> {
    let list = |key| rope.0.get(key).and_then(Value::as_array);
    let same = list("short_factor").is_some() && list("short_factor") == list("long_factor");
    let unscaled = rope.float("attention_factor")? == Some(1.0);
    let numbers: Option<Vec<f32>> = list("short_factor")
        .filter(|_| same && unscaled)
        .and_then(|l| l.iter().map(|v| v.as_f64().map(|f| f as f32)).collect());
    numbers.map(RopeScaling::Divisors).ok_or_else(|| {
        Error::config(
            "rope_type is \"longrope\" with different short and long factors, hearth computes default, linear, \
             dynamic, yarn and llama3",
        )
    })
}

/// The transformers 4 `rope_scaling` value, which transformers 5 reads too; `null` for plain RoPE.
pub(super) fn to_hf(scaling: &RopeScaling, max_position: usize) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Yarn {
            factor,
            original_max_position,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_position,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position,
        }),
        RopeScaling::Divisors(divisors) => json!({
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": max_position,
        }),
    }
}

/// Refuses numbers that make the frequencies infinite, zero or undefined.
pub(super) fn validate(rope: &RopeConfig, head_dim: usize) -> Result<(), Error> {
    let positive = |key: &str, value: f64| {
        if value.is_finite() && value > 0.0 {
            return Ok(());
        }
        Err(Error::config(format!("{key} is {value}, it must be a number above 0")))
    };
    positive("rope_theta", rope.theta)?;
    match &rope.scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => positive("rope scaling factor", *factor),
        RopeScaling::Dynamic { factor, original_max_position } => {
            positive("rope scaling factor", *factor)?;
            if head_dim == 2 {
                return Err(Error::config("head_dim is 2, dynamic rope scaling needs at least 4"));
            }
            positive("original_max_position_embeddings", *original_max_position as f64)
        }
        RopeScaling::Yarn {
            factor, original_max_position, beta_fast, beta_slow, attention_factor, ..
        } => {
            positive("rope scaling factor", *factor)?;
            positive("original_max_position_embeddings", *original_max_position as f64)?;
            positive("beta_fast", *beta_fast)?;
            positive("beta_slow", *beta_slow)?;
            positive("attention_factor", *attention_factor)?;
            if rope.theta <= 1.0 {
                return Err(Error::config(format!("rope_theta is {}, yarn needs more than 1", rope.theta)));
            }
            ordered("beta_slow", *beta_slow, "beta_fast", *beta_fast)
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            positive("rope scaling factor", *factor)?;
            positive("original_max_position_embeddings", *original_max_position as f64)?;
            positive("low_freq_factor", *low_freq_factor)?;
            ordered("low_freq_factor", *low_freq_factor, "high_freq_factor", *high_freq_factor)
        }
        RopeScaling::Divisors(divisors) => {
            if divisors.len() != head_dim / 2 {
                return Err(Error::config(format!(
                    "{} rope divisors are given, head_dim is {head_dim} and needs {}",
                    divisors.len(),
                    head_dim / 2
                )));
            }
            divisors.iter().try_for_each(|d| positive("rope divisor", f64::from(*d)))
        }
    }
}

fn ordered(low_key: &str, low: f64, high_key: &str, high: f64) -> Result<(), Error> {
    if low < high && high.is_finite() {
        return Ok(());
    }
    Err(Error::config(format!("{low_key} is {low}, it must be below {high_key}, which is {high}")))
}
