//! Tokens that may still be drawn, and the filters that thin them out.
//!
//! A vocabulary has tens of thousands of tokens, and one is drawn for every sequence in every step: whole rows are only
//! passed over by loops that the compiler turns into vectors, and few tokens are ever sorted.

use super::descending;
use hearth_kernels::cpu::pointwise::{block_maxima, softmax_weights};
use std::cmp::Ordering;

/// A token with its logit and its unnormalised probability `exp((logit − best) / temperature)`.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    logit: f32,
    weight: f64,
}

impl Candidate {
    /// Best first; the lower id among equals. Logits rather than weights: those may underflow to equal zeros.
    fn rank(&self, other: &Self) -> Ordering {
        descending(self.logit, other.logit).then(self.token.cmp(&other.token))
    }
}

/// The tokens that may be drawn. The best one always may.
#[derive(Debug)]
pub struct Candidates<'a> {
    logits: &'a [f32],
    best: f32,
    temperature: f32,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    /// Every token.
    All,
    /// Some, in the order they are drawn in.
    Some(Vec<Candidate>),
}

/// How many candidates the nucleus search sorts first; most nuclei are smaller.
const FIRST_SORTED: usize = 256;
/// Logits of which the highest is found first, to know where high ones are.
const BLOCK: usize = 64;

impl<'a> Candidates<'a> {
    /// Every token. `best` is the highest logit; `temperature > 0`.
    pub fn new(logits: &'a [f32], best: f32, temperature: f32) -> Self {
        Self { logits, best, temperature, kept: Kept::All }
    }

    /// Keeps the `k ≥ 1` best.
    pub fn keep_best(&mut self, k: usize) {
        self.kept = Kept::Some(self.highest(k));
    }

    /// Keeps the smallest set of best candidates whose share of the whole weight reaches `p`.
    pub fn keep_nucleus(&mut self, p: f64) {
        let reached = |candidates: &[Candidate], enough: f64| {
            let mut sum = 0.0;
            candidates.iter().position(|c| (sum += c.weight, sum >= enough).1)
        };
        if let Kept::Some(kept) = &mut self.kept {
            let last = reached(kept, p * total(kept));
            return kept.truncate(last.map_or(kept.len(), |last| last + 1));
        }
        let enough = p * Sums::new(&self.weights()).total();
        let mut sorted = FIRST_SORTED;
        loop {
            let mut highest = self.highest(sorted);
            if let Some(last) = reached(&highest, enough) {
                highest.truncate(last + 1);
                self.kept = Kept::Some(highest);
                return;
            }
            if sorted >= self.logits.len() {
                return;
            }
            sorted *= 8;
        }
    }

    /// Keeps those at least `fraction` as likely as the best.
    pub fn keep_likely(&mut self, fraction: f64) {
        // The best one's weight is 1.
        match &mut self.kept {
            Kept::Some(kept) => kept.retain(|c| c.weight >= fraction),
            Kept::All => {
                // What is far below that need not be looked at closely.
                let least = self.best + (fraction.ln() as f32 - 1.0) * self.temperature;
                let tokens = (0..self.logits.len() as u32).filter(|t| self.logits[*t as usize] >= least);
                let kept = tokens.map(|t| self.candidate(t)).filter(|c| c.weight >= fraction);
                self.kept = Kept::Some(kept.collect());
            }
        }
    }

    /// The candidate at share `u ∈ [0, 1)` of the whole weight.
    pub fn draw(&self, u: f64) -> u32 {
        let Kept::Some(kept) = &self.kept else {
            return self.draw_of_all(u);
        };
        let mut left = u * total(kept);
        let mut possible = kept.iter().filter(|c| c.weight > 0.0);
        let hit = possible.clone().find(|c| (left -= c.weight, left < 0.0).1);
        // Rounding may leave a crumb past the last one.
        hit.or_else(|| possible.next_back()).expect("the best candidate is never dropped").token
    }

    fn draw_of_all(&self, u: f64) -> u32 {
        let weights = self.weights();
        let sums = Sums::new(&weights);
        let mut left = u * sums.total();
        let mut last = None;
        for (block, (sum, weights)) in sums.0.iter().zip(weights.chunks(BLOCK)).enumerate() {
            if left >= *sum && block + 1 < sums.0.len() {
                left -= sum;
                continue;
            }
            for (i, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                left -= f64::from(*weight);
                last = Some((block * BLOCK + i) as u32);
                if left < 0.0 {
                    return (block * BLOCK + i) as u32;
                }
            }
        }
        let before = || weights.iter().rposition(|weight| *weight > 0.0).map(|token| token as u32);
        last.or_else(before).expect("the best token's weight is 1")
    }

    fn candidate(&self, token: u32) -> Candidate {
        let logit = self.logits[token as usize];
        let weight = ((f64::from(logit) - f64::from(self.best)) / f64::from(self.temperature)).exp();
        Candidate { token, logit, weight }
    }

    /// Every token's weight.
    fn weights(&self) -> Vec<f32> {
        let mut weights = vec![0.0; self.logits.len()];
        softmax_weights(self.logits, self.best, self.temperature, &mut weights);
        weights
    }

    /// The `count` best of all tokens, in order.
    fn highest(&self, count: usize) -> Vec<Candidate> {
        let mut maxima = vec![0.0; self.logits.len().div_ceil(BLOCK)];
        block_maxima(self.logits, BLOCK, &mut maxima);
        // As many blocks have something at least as high as this, so the `count` best are.
        let mut ranked = maxima.clone();
        let least = match count < ranked.len() {
            true => *ranked.select_nth_unstable_by(count - 1, |a, b| descending(*a, *b)).1,
            false => f32::NEG_INFINITY,
        };
        let mut high = Vec::new();
        for (block, _) in maxima.iter().enumerate().filter(|(_, highest)| **highest >= least) {
            let tokens = block * BLOCK..self.logits.len().min((block + 1) * BLOCK);
            let tokens = tokens.filter(|token| self.logits[*token] >= least);
            high.extend(tokens.map(|token| self.candidate(token as u32)));
        }
        if count < high.len() {
            high.select_nth_unstable_by(count, Candidate::rank);
            high.truncate(count);
        }
        high.sort_unstable_by(Candidate::rank);
        high
    }
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| c.weight).sum()
}

/// Sums of [`BLOCK`] weights each.
struct Sums(Vec<f64>);

impl Sums {
    fn new(weights: &[f32]) -> Self {
        Self(weights.chunks(BLOCK).map(|block| block.iter().map(|w| f64::from(*w)).sum()).collect())
    }

    fn total(&self) -> f64 {
        self.0.iter().sum()
    }
}
