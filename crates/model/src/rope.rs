//! Rotary position embedding: frequencies for every scaling in use (HF `modeling_rope_utils`).
//!
//! Frequencies and angles are rounded to f32 where transformers rounds them, so that both agree at long positions.

use crate::context::RowPosition;
use hearth_kernels::RotaryTable;
use hearth_weights::config::{ModelConfig, RopeConfig, RopeScaling};

/// A model's rotary embedding.
#[derive(Clone, Debug)]
pub struct Rope {
    config: RopeConfig,
    head_dim: usize,
    /// `head_dim / 2` inverse frequencies within the original length.
    frequencies: Vec<f32>,
    /// Multiplies cos and sin (YaRN), else 1.
    attention_factor: f32,
}

impl Rope {
    /// For a model.
    pub fn new(config: &ModelConfig) -> Self {
        let (rope, head_dim) = (config.rope.clone(), config.head_dim);
        let base = inverse_frequencies(rope.theta, head_dim);
        let mut attention_factor = 1.0;
        let frequencies = match &rope.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => base,
            RopeScaling::Linear { factor } => base.iter().map(|f| f / *factor as f32).collect(),
            RopeScaling::Divisors(d) => base.iter().zip(d).map(|(f, d)| f / d).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let band =
                    |f| llama3(f, *factor, *low_freq_factor, *high_freq_factor, *original_max_position);
                base.into_iter().map(band).collect()
            }
            RopeScaling::Yarn {
                factor,
                original_max_position,
                beta_fast,
                beta_slow,
                attention_factor: a,
                truncate,
            } => {
                attention_factor = *a as f32;
                let range = yarn_range(
                    rope.theta,
                    head_dim,
                    *original_max_position,
                    *beta_fast,
                    *beta_slow,
                    *truncate,
                );
                yarn(rope.theta, head_dim, *factor, range)
            }
        };
        Self { config: rope, head_dim, frequencies, attention_factor }
    }

    /// cos and sin for each row.
    pub fn table(&self, rows: &[RowPosition]) -> RotaryTable {
        let half = self.head_dim / 2;
        let (mut cos, mut sin) =
            (Vec::with_capacity(rows.len() * half), Vec::with_capacity(rows.len() * half));
        let mut stretched: Option<(u32, Vec<f32>)> = None;
        for row in rows {
            if stretched.as_ref().is_none_or(|(length, _)| *length != row.length) {
                stretched = self.for_length(row.length).map(|f| (row.length, f));
            }
            for &f in stretched.as_ref().map_or(&self.frequencies, |(_, f)| f) {
                let angle = (row.position as f32 * f) as f64;
                cos.push(angle.cos() as f32 * self.attention_factor);
                sin.push(angle.sin() as f32 * self.attention_factor);
            }
        }
        RotaryTable::new(half, cos, sin)
    }

    /// Dynamic NTK: another base once `length` exceeds the original one.
    fn for_length(&self, length: u32) -> Option<Vec<f32>> {
        let RopeScaling::Dynamic { factor, original_max_position } = self.config.scaling else { return None };
        if length as usize <= original_max_position {
            return None;
        }
        let (d, factor) = (self.head_dim as f64, factor as f32);
        let stretch = factor * length as f32 / original_max_position as f32 - (factor - 1.0);
        let theta = self.config.theta as f32 * f64::from(stretch).powf(d / (d - 2.0)) as f32;
        Some(inverse_frequencies(f64::from(theta), self.head_dim))
    }
}

/// `theta^(−2i/d)`, `i < d/2`.
fn inverse_frequencies(theta: f64, d: usize) -> Vec<f32> {
    powers(theta, d).map(|p| 1.0 / p).collect()
}

/// `theta^(2i/d)`, `i < d/2`: base, exponent and result are f32 in torch.
fn powers(theta: f64, d: usize) -> impl Iterator<Item = f32> {
    let theta = f64::from(theta as f32);
    (0..d / 2).map(move |i| theta.powf(f64::from((2 * i) as f32 / d as f32)) as f32)
}

/// Step by step in f32, a number divided by a tensor as torch does it: its reciprocal times the number.
fn llama3(f: f32, factor: f64, low: f64, high: f64, original: usize) -> f32 {
    let wavelength = 1.0 / f * std::f32::consts::TAU;
    if wavelength < (original as f64 / high) as f32 {
        f
    } else if wavelength > (original as f64 / low) as f32 {
        f / factor as f32
    } else {
        let smooth = (1.0 / wavelength * original as f32 - low as f32) / (high - low) as f32;
        (1.0 - smooth) * f / factor as f32 + smooth * f
    }
}

/// Dimensions between which YaRN blends interpolation and extrapolation.
fn yarn_range(theta: f64, d: usize, original: usize, fast: f64, slow: f64, truncate: bool) -> (f64, f64) {
    let dimension = |rotations: f64| {
        d as f64 * (original as f64 / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dimension(fast), dimension(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low.max(0.0), high.min(d as f64 - 1.0))
}

fn yarn(theta: f64, d: usize, factor: f64, (low, high): (f64, f64)) -> Vec<f32> {
    let width = if low == high { 0.001 } else { high - low } as f32;
    let blend = |(i, power): (usize, f32)| {
        let extrapolate = 1.0 - ((i as f32 - low as f32) / width).clamp(0.0, 1.0);
        1.0 / (factor as f32 * power) * (1.0 - extrapolate) + 1.0 / power * extrapolate
    };
    powers(theta, d).enumerate().map(blend).collect()
}
