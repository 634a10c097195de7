//! Tokens that may still be drawn, and the filters that thin them out.

use super::descending;
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
pub struct Candidates(Vec<Candidate>);

/// How many candidates the nucleus search sorts first; most nuclei are smaller.
const FIRST_SORTED: usize = 256;

impl Candidates {
    /// Every token, by id. `best` is the highest logit; `temperature > 0`.
    pub fn new(logits: &[f32], best: f32, temperature: f32) -> Self {
        let weight = |logit: f32| ((f64::from(logit) - f64::from(best)) / f64::from(temperature)).exp();
        let candidate =
            |(token, &logit): (usize, &f32)| Candidate { token: token as u32, logit, weight: weight(logit) };
        Self(logits.iter().enumerate().map(candidate).collect())
    }

    /// Keeps the `k ≥ 1` best.
    pub fn keep_best(&mut self, k: usize) {
        self.sort_best(k);
        self.0.truncate(k);
    }

    /// Keeps the smallest set of best candidates whose share of the whole weight reaches `p`.
    pub fn keep_nucleus(&mut self, p: f64) {
        let enough = p * self.total();
        let mut sorted = FIRST_SORTED;
        loop {
            self.sort_best(sorted);
            let mut sum = 0.0;
            let reaches = |c: &Candidate| (sum += c.weight, sum >= enough).1;
            if let Some(last) = self.0.iter().take(sorted).position(reaches) {
                return self.0.truncate(last + 1);
            }
            if sorted >= self.0.len() {
                return;
            }
            sorted *= 8;
        }
    }

    /// Keeps those at least `fraction` as likely as the best.
    pub fn keep_likely(&mut self, fraction: f64) {
        // The best one's weight is 1.
        self.0.retain(|c| c.weight >= fraction);
    }

    /// The candidate at share `u ∈ [0, 1)` of the whole weight.
    pub fn draw(&self, u: f64) -> u32 {
        let mut left = u * self.total();
        let mut possible = self.0.iter().filter(|c| c.weight > 0.0);
        let hit = possible.clone().find(|c| (left -= c.weight, left < 0.0).1);
        // Rounding may leave a crumb past the last one.
        hit.or_else(|| possible.next_back()).expect("the best candidate is never dropped").token
    }

    fn total(&self) -> f64 {
        self.0.iter().map(|c| c.weight).sum()
    }

    /// Brings the `count` best to the front, in order.
    fn sort_best(&mut self, count: usize) {
        if count < self.0.len() {
            self.0.select_nth_unstable_by(count, Candidate::rank);
        }
        let count = count.min(self.0.len());
        self.0[..count].sort_unstable_by(Candidate::rank);
    }
}
