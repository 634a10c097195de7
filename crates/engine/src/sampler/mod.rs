//! Logits → token, deterministic for a seed.
//!
//! # Layout
//! - here: [`Sampler`], one sequence's sampling parameters and what they remember.
//! - [`logprobs`]: log-probabilities under the raw distribution.
//! - [`constraint`]: what the output must conform to.
//! - `candidates`: top-k, top-p, min-p and the draw.
//! - `random`: one uniform number per (seed, position).
//!
//! # Invariants
//! A choice depends on the row of logits, the request's parameters and seed, the tokens so far and the position:
//! never on other requests. Sums are in f64 and in one fixed order. Among equal logits the lower id wins.

pub mod constraint;
pub mod logprobs;

mod candidates;
mod random;

use crate::api::{Sampling, SubmitError};
use candidates::Candidates;
use hearth_kernels::cpu::pointwise::block_maxima;
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

/// Logits no token can be drawn from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// NaN or +∞ among them.
    #[error("the logit of token {token} is {value}; the weights or a sampling parameter are at fault")]
    NotFinite {
        /// The first such token.
        token: u32,
        /// Its logit.
        value: f32,
    },
    /// Every token is at −∞.
    #[error("no token is possible: every logit is -inf")]
    NothingPossible,
    /// The grammar could not go on.
    #[error("{0}")]
    Constraint(String),
}

/// One sequence's way of choosing tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    seed: u64,
    /// Tokens generated so far, with their counts; kept only if a penalty asks for it.
    generated: HashMap<u32, u32>,
    /// Tokens of prompt and output; kept only if the repetition penalty asks for it.
    seen: HashSet<u32>,
}

impl Sampler {
    /// For a request with these (valid) parameters and prompt.
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let seed = sampling.seed.unwrap_or_else(|| RandomState::new().hash_one("a fresh seed"));
        let seen = if sampling.repetition_penalty == 1.0 { &[] } else { prompt };
        Self { seed, generated: HashMap::new(), seen: seen.iter().copied().collect(), sampling }
    }

    /// The token for `position` (counted from the start of the prompt). `logits`: `[vocab]`.
    ///
    /// # Errors
    /// [`SampleError`] when the logits, penalties and biases applied, are not a distribution.
    pub fn choose(&self, logits: &[f32], position: usize) -> Result<u32, SampleError> {
        let adjusted;
        let logits = if self.adjusts() {
            adjusted = self.adjust(logits);
            &adjusted
        } else {
            logits
        };
        let best = best(logits)?;
        let s = &self.sampling;
        if s.temperature == 0.0 {
            return Ok(best);
        }
        let mut candidates = Candidates::new(logits, logits[best as usize], s.temperature);
        if s.top_k > 0 {
            candidates.keep_best(s.top_k);
        }
        if s.top_p < 1.0 {
            candidates.keep_nucleus(f64::from(s.top_p));
        }
        if s.min_p > 0.0 {
            candidates.keep_likely(f64::from(s.min_p));
        }
        Ok(candidates.draw(random::uniform(self.seed, position as u64)))
    }

    /// Remembers a generated token for the penalties.
    pub fn record(&mut self, token: u32) {
        let s = &self.sampling;
        if s.presence_penalty != 0.0 || s.frequency_penalty != 0.0 {
            *self.generated.entry(token).or_default() += 1;
        }
        if s.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
    }

    fn adjusts(&self) -> bool {
        !(self.generated.is_empty() && self.seen.is_empty() && self.sampling.logit_bias.is_empty())
    }

    /// Penalties, then biases: a bias says where a logit ends up, so nothing scales it afterwards but temperature.
    fn adjust(&self, logits: &[f32]) -> Vec<f32> {
        let (s, mut logits) = (&self.sampling, logits.to_vec());
        for &token in &self.seen {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / s.repetition_penalty } else { *logit * s.repetition_penalty };
        }
        for (&token, &count) in &self.generated {
            logits[token as usize] -= s.presence_penalty + s.frequency_penalty * count as f32;
        }
        for &(token, bias) in &s.logit_bias {
            logits[token as usize] += bias;
        }
        logits
    }
}

/// The token with the highest logit, the lowest id among equals.
///
/// # Errors
/// [`SampleError`] unless some logit is finite and none is NaN or +∞.
fn best(logits: &[f32]) -> Result<u32, SampleError> {
    const BLOCK: usize = 64;
    let mut maxima = vec![0.0; logits.len().div_ceil(BLOCK)];
    block_maxima(logits, BLOCK, &mut maxima);
    let (mut best, mut highest) = (None, f32::NEG_INFINITY);
    for (block, &value) in maxima.iter().enumerate() {
        if value > highest {
            (best, highest) = (Some(block), value);
        }
    }
    let block = best.ok_or(SampleError::NothingPossible)?;
    let not_finite = |x: &f32| x.is_nan() || *x == f32::INFINITY;
    if highest == f32::INFINITY {
        let token = logits.iter().position(not_finite).expect("it is the highest");
        return Err(SampleError::NotFinite { token: token as u32, value: logits[token] });
    }
    let first = logits[block * BLOCK..].iter().position(|x| *x == highest).expect("it is the highest there");
    Ok((block * BLOCK + first) as u32)
}

/// Higher logits first. Zeros of either sign are equal; NaN was refused before anything is ranked.
fn descending(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal)
}

/// Refuses parameters that mean nothing.
///
/// # Errors
/// [`SubmitError::Sampling`] naming the first such parameter, its value and the limit.
pub fn validate(s: &Sampling, vocab: usize) -> Result<(), SubmitError> {
    let at_least_zero = |x: f32| x.is_finite() && x >= 0.0;
    let checks = [
        ("temperature", s.temperature, at_least_zero(s.temperature), "a finite number of at least 0"),
        ("top_p", s.top_p, (0.0..=1.0).contains(&s.top_p), "from 0 to 1"),
        ("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "from 0 to 1"),
        (
            "repetition_penalty",
            s.repetition_penalty,
            s.repetition_penalty.is_finite() && s.repetition_penalty > 0.0,
            "a finite number above 0",
        ),
        ("presence_penalty", s.presence_penalty, s.presence_penalty.is_finite(), "a finite number"),
        ("frequency_penalty", s.frequency_penalty, s.frequency_penalty.is_finite(), "a finite number"),
    ];
    for (name, value, fine, limit) in checks {
        if !fine {
            return Err(SubmitError::Sampling { what: format!("{name} is {value}, it must be {limit}") });
        }
    }
    for &(token, bias) in &s.logit_bias {
        // −∞ forbids a token; +∞ and NaN leave no distribution.
        if token as usize >= vocab || bias.is_nan() || bias == f32::INFINITY {
            let what = format!(
                "logit_bias {bias} for token {token}: the bias must be a number and the token below {vocab}"
            );
            return Err(SubmitError::Sampling { what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
