//! Learning-rate schedules, with the step indexing of transformers' `get_*_schedule_with_warmup`.
//!
//! The `n`-th update of a run (from 0) uses `rate(n)`. With warm-up, update 0 has rate 0 and update `warmup` the peak;
//! without warm-up update 0 has the peak. A cosine or linear schedule would reach `min_lr` at update `steps`, one past
//! the last.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// What happens after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// The peak for ever.
    Constant,
    /// Straight down to `min_lr` at the end.
    Linear,
    /// Half a cosine down to `min_lr` at the end (arXiv 1608.03983).
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the peak, then half a cosine down to `min_lr` over the last `decay` steps
    /// (arXiv 2404.06395). Its warm-up starts at `min_lr`, as transformers' does.
    Wsd,
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Updates of linear warm-up.
    pub warmup: usize,
    /// Rate at the end, in absolute terms.
    pub min_lr: f64,
    /// Updates of decay, for [`ScheduleKind::Wsd`] only; 0 means a tenth of the run.
    pub decay: usize,
}

impl Schedule {
    /// Learning rate of update `n` (from 0) of a run of `steps` updates with peak `lr`.
    pub fn rate(&self, n: usize, steps: usize, lr: f64) -> f64 {
        lr * self.factor(n, steps, if lr > 0.0 { self.min_lr / lr } else { 0.0 })
    }

    /// Updates over which [`ScheduleKind::Wsd`] decays.
    pub fn decay_steps(&self, steps: usize) -> usize {
        let wanted = if self.decay > 0 { self.decay } else { steps / 10 };
        wanted.min(steps.saturating_sub(self.warmup))
    }

    fn factor(&self, n: usize, steps: usize, floor: f64) -> f64 {
        let above = |factor: f64| (factor * (1.0 - floor) + floor).max(0.0);
        if n < self.warmup {
            let progress = n as f64 / self.warmup as f64;
            return if self.kind == ScheduleKind::Wsd { above(progress) } else { progress };
        }
        let after = steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((n - self.warmup) as f64 / after).min(1.0);
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => above(1.0 - progress),
            ScheduleKind::Cosine => above(0.5 * (1.0 + (PI * progress).cos())),
            ScheduleKind::Wsd => {
                let decay = self.decay_steps(steps);
                let into = (n + decay).saturating_sub(steps);
                if n + decay < steps {
                    1.0
                } else if into < decay {
                    above(0.5 * (1.0 + (PI * into as f64 / decay as f64).cos()))
                } else {
                    floor
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kind: ScheduleKind, warmup: usize, min_lr: f64, steps: usize, want: &[f64]) {
        let schedule = Schedule { kind, warmup, min_lr, decay: 4 };
        for (n, want) in want.iter().enumerate() {
            let rate = schedule.rate(n, steps, 2.0);
            assert!((rate - want).abs() < 1e-12, "{kind:?} update {n}: {rate}, expected {want}");
        }
    }

    #[test]
    fn rates_are_those_of_transformers() {
        use ScheduleKind::*;
        let s = 0.5f64.sqrt();
        check(Constant, 0, 0.0, 3, &[2.0, 2.0, 2.0]);
        check(Constant, 2, 0.0, 4, &[0.0, 1.0, 2.0, 2.0]);
        check(Linear, 2, 0.0, 6, &[0.0, 1.0, 2.0, 1.5, 1.0, 0.5]);
        check(Linear, 0, 1.0, 4, &[2.0, 1.75, 1.5, 1.25]);
        check(Cosine, 2, 0.0, 6, &[0.0, 1.0, 2.0, 1.0 + s, 1.0, 1.0 - s]);
        check(Cosine, 0, 1.0, 2, &[2.0, 1.5]);
        check(Wsd, 2, 0.0, 8, &[0.0, 1.0, 2.0, 2.0, 2.0, 1.0 + s, 1.0, 1.0 - s]);
        check(Wsd, 2, 1.0, 8, &[1.0, 1.5, 2.0, 2.0, 2.0, 1.5 + s / 2.0, 1.5, 1.5 - s / 2.0]);
    }

    #[test]
    fn rates_stay_between_the_ends_for_any_length() {
        for kind in [ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::Wsd] {
            for steps in 0..12 {
                for warmup in 0..12 {
                    let schedule = Schedule { kind, warmup, min_lr: 0.1, decay: 0 };
                    for n in 0..14 {
                        let rate = schedule.rate(n, steps, 1.0);
                        assert!((0.0..=1.0).contains(&rate), "{kind:?} {warmup}/{steps} update {n}: {rate}");
                        assert!(
                            n < warmup || rate >= 0.1 - 1e-12,
                            "{kind:?} {warmup}/{steps} update {n}: {rate}"
                        );
                    }
                }
            }
        }
    }
}
