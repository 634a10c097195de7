//! What many requests came to.

use super::client::Sample;
use serde::Serialize;

/// Weight of the newest gap in the moving average that the generation's promise is held against.
const SMOOTHING: f64 = 0.1;

/// What a user is promised (DeepSpeed-FastGen's way of counting).
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sla {
    /// The first token comes within prompt tokens ÷ this many seconds.
    pub prompt_tok_s: f64,
    /// The moving average of the speed afterwards never falls below this.
    pub generation_tok_s: f64,
}

/// Of a distribution, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Percentiles {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// Nine of ten are below.
    pub p90: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Percentiles {
    /// Of these values, by nearest rank.
    pub fn of(mut values: Vec<f64>) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        let rank =
            |share: f64| values[((share * values.len() as f64).ceil() as usize).clamp(1, values.len()) - 1];
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: rank(0.5),
            p90: rank(0.9),
            p99: rank(0.99),
            max: rank(1.0),
        }
    }
}

/// Figures of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Requests made.
    pub requests: usize,
    /// Requests without an answer.
    pub errors: usize,
    /// Why the first of them failed.
    pub first_error: Option<String>,
    /// Seconds from the first asking to the last answer.
    pub wall_s: f64,
    /// Answers per second.
    pub requests_s: f64,
    /// Prompt tokens per second.
    pub prompt_tok_s: f64,
    /// Output tokens per second.
    pub output_tok_s: f64,
    /// Time to the first token.
    pub ttft_ms: Percentiles,
    /// Mean time per token after the first, per request.
    pub tpot_ms: Percentiles,
    /// Time between chunks, all of them.
    pub itl_ms: Percentiles,
    /// Whole requests.
    pub e2e_ms: Percentiles,
    /// The promise.
    pub sla: Sla,
    /// Share of all requests that were answered within it.
    pub within_sla: f64,
    /// Those per second: FastGen's effective throughput.
    pub effective_requests_s: f64,
    /// Mean tokens of prompt and half the output: what a token looks back on.
    pub mean_context: f64,
    /// Prompt tokens from the server's cache.
    pub cached_tokens: usize,
    /// Memory bandwidth that `of_peak` is a share of.
    pub peak_gb_s: Option<f64>,
}

impl Figures {
    /// Of the requests of a run of `wall_s` seconds.
    pub fn of(samples: &[Sample], wall_s: f64, sla: Sla) -> Self {
        let fine: Vec<&Sample> = samples.iter().filter(|s| s.error.is_none()).collect();
        let all = |of: fn(&Sample) -> f64| Percentiles::of(fine.iter().map(|s| of(s)).collect());
        let sum = |of: fn(&Sample) -> usize| fine.iter().map(|s| of(s)).sum::<usize>() as f64;
        let kept = fine.iter().filter(|s| sla.is_kept(s)).count() as f64;
        let (prompts, outputs) = (sum(|s| s.prompt_tokens), sum(|s| s.output_tokens));
        let wall = wall_s.max(1e-9);
        Self {
            requests: samples.len(),
            errors: samples.len() - fine.len(),
            first_error: samples.iter().find_map(|s| s.error.clone()),
            wall_s,
            requests_s: fine.len() as f64 / wall,
            prompt_tok_s: prompts / wall,
            output_tok_s: outputs / wall,
            ttft_ms: all(|s| s.ttft_ms),
            tpot_ms: Percentiles::of(
                fine.iter().filter(|s| s.output_tokens > 1).map(|s| s.tpot_ms).collect(),
            ),
            itl_ms: Percentiles::of(fine.iter().flat_map(|s| s.gaps_ms.iter().copied()).collect()),
            e2e_ms: all(|s| s.e2e_ms),
            sla,
            within_sla: kept / samples.len().max(1) as f64,
            effective_requests_s: kept / wall,
            mean_context: (prompts + outputs / 2.0) / fine.len().max(1) as f64,
            cached_tokens: sum(|s| s.cached_tokens) as usize,
            peak_gb_s: None,
        }
    }
}

impl Sla {
    /// Whether a request was answered as promised.
    fn is_kept(&self, sample: &Sample) -> bool {
        let first_due_ms = sample.prompt_tokens as f64 / self.prompt_tok_s * 1e3;
        sample.ttft_ms <= first_due_ms && self.generation_is_kept(&sample.gaps_ms)
    }

    fn generation_is_kept(&self, gaps_ms: &[f64]) -> bool {
        let longest_ms = 1e3 / self.generation_tok_s;
        let mut average = None;
        gaps_ms.iter().all(|&gap| {
            let next = average.map_or(gap, |average: f64| average + SMOOTHING * (gap - average));
            average = Some(next);
            next <= longest_ms
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ttft_ms: f64, gaps_ms: &[f64]) -> Sample {
        Sample {
            prompt_tokens: 512,
            output_tokens: 5,
            ttft_ms,
            gaps_ms: gaps_ms.to_vec(),
            ..Sample::default()
        }
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let p = Percentiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((p.p50, p.p90, p.p99, p.max, p.mean), (50.0, 90.0, 99.0, 100.0, 50.5));
        assert_eq!(Percentiles::of(vec![7.0]).p99, 7.0);
        assert_eq!(Percentiles::of(Vec::new()).p50, 0.0);
    }

    #[test]
    fn effective_requests_keep_both_promises() {
        let sla = Sla { prompt_tok_s: 512.0, generation_tok_s: 4.0 };
        assert!(sla.is_kept(&sample(1000.0, &[250.0, 250.0])));
        assert!(!sla.is_kept(&sample(1001.0, &[10.0])), "the first token is late");
        assert!(!sla.is_kept(&sample(10.0, &[251.0])), "too slow from the beginning");
        assert!(sla.is_kept(&sample(10.0, &[10.0, 2000.0])), "one hiccup is forgiven");
        assert!(!sla.is_kept(&sample(10.0, &[10.0, 2000.0, 2000.0])), "two are not");
        let failed = Sample { error: Some("no".into()), ..Sample::default() };
        let figures = Figures::of(&[sample(10.0, &[10.0]), failed], 2.0, sla);
        assert_eq!((figures.errors, figures.within_sla, figures.effective_requests_s), (1, 0.5, 0.5));
        assert_eq!(figures.output_tok_s, 2.5);
    }
}
