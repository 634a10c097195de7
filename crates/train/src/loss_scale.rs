//! Dynamic loss scaling for half precision (arXiv 1710.03740; the semantics of Megatron's and DeepSpeed's scalers).
//!
//! f16 loses gradients below 6·10⁻⁸, so the loss is multiplied by a scale before the backward pass and the gradients
//! are divided by it before the update. The scale is as large as gradients allow: it doubles after a window of good
//! steps, and halves when a gradient overflows. A step that overflowed is skipped: neither the optimizer's `t` nor the
//! learning rate advances. Whether one overflowed is a question to all ranks at once (the maximum over every group).

use crate::Error;
use serde::{Deserialize, Serialize};

/// Settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossScaling {
    /// Scale of the first step, a power of two: scaling by it rounds nothing.
    pub init: f64,
    /// Good steps in a row after which the scale doubles.
    pub window: u32,
    /// Overflows it takes to halve the scale.
    pub hysteresis: u32,
    /// The scale never falls below.
    pub min: f64,
}

impl Default for LossScaling {
    fn default() -> Self {
        Self { init: 65_536.0, window: 1000, hysteresis: 2, min: 1.0 }
    }
}

impl LossScaling {
    /// Largest scale: what f32 can hold with room for a loss.
    pub const MAX: f64 = (1u64 << 63) as f64;

    /// Refuses settings out of range.
    ///
    /// # Errors
    /// [`Error::Config`] with the setting, its value and the limit.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |sentence: String| Err(Error::Config(sentence));
        for (name, scale) in [("init", self.init), ("min", self.min)] {
            let power_of_two = scale > 0.0 && scale.is_normal() && scale.to_bits() << 12 == 0;
            if !(power_of_two && scale <= Self::MAX) {
                return refuse(format!("loss scale: {name} = {scale} must be a power of two, at most 2^63"));
            }
        }
        if self.min > self.init {
            return refuse(format!("loss scale: min = {} is above init = {}", self.min, self.init));
        }
        if self.window == 0 || self.hysteresis == 0 {
            let (window, hysteresis) = (self.window, self.hysteresis);
            return refuse(format!(
                "loss scale: window = {window} and hysteresis = {hysteresis} must be at least 1"
            ));
        }
        Ok(())
    }
}

/// What to do with a step's gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Apply the update.
    Apply,
    /// Drop the gradients; nothing advances.
    Skip,
}

/// The scaler's state, all of which a checkpoint must hold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaler {
    /// What the loss is multiplied by.
    scale: f64,
    /// Good steps since the scale last changed or a step overflowed.
    good_steps: u32,
    /// Overflows left until the scale halves.
    hysteresis: u32,
}

impl LossScaler {
    /// The state before the first step.
    pub fn new(settings: &LossScaling) -> Self {
        Self { scale: settings.init, good_steps: 0, hysteresis: settings.hysteresis }
    }

    /// What the loss of the next step is multiplied by, and its gradients are divided by.
    pub fn scale(&self) -> f32 {
        self.scale as f32
    }

    /// Learns whether any gradient of any rank overflowed (is infinite or not a number).
    ///
    /// Overflow: one of the hysteresis is spent; from the last one on, every overflow halves the scale, down to the
    /// minimum. Good step: after `window` of them in a row the scale doubles and the hysteresis is whole again.
    pub fn update(&mut self, settings: &LossScaling, overflow: bool) -> Verdict {
        if overflow {
            self.good_steps = 0;
            self.hysteresis = self.hysteresis.saturating_sub(1);
            if self.hysteresis == 0 {
                self.scale = (self.scale / 2.0).max(settings.min);
            }
            return Verdict::Skip;
        }
        self.good_steps += 1;
        if self.good_steps >= settings.window {
            self.good_steps = 0;
            self.hysteresis = settings.hysteresis;
            self.scale = (self.scale * 2.0).min(LossScaling::MAX);
        }
        Verdict::Apply
    }

    /// Whether the scale is as low as it gets and the last step overflowed: more of them mean that the model diverges.
    pub fn exhausted(&self, settings: &LossScaling) -> bool {
        self.hysteresis == 0 && self.scale <= settings.min
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: LossScaling = LossScaling { init: 65_536.0, window: 4, hysteresis: 2, min: 1.0 };

    /// Scales before each step of a history, `x` an overflow and `.` a good step.
    fn scales(settings: &LossScaling, history: &str) -> Vec<f64> {
        let mut scaler = LossScaler::new(settings);
        let mut scales = vec![scaler.scale];
        for step in history.chars() {
            let verdict = scaler.update(settings, step == 'x');
            assert_eq!(verdict == Verdict::Skip, step == 'x');
            scales.push(scaler.scale);
        }
        scales
    }

    fn powers(exponents: &[i32]) -> Vec<f64> {
        exponents.iter().map(|e| 2f64.powi(*e)).collect()
    }

    #[test]
    fn histories_give_the_scales_that_the_rules_say() {
        for (history, exponents) in [
            // The first overflow spends the hysteresis, the next ones halve.
            ("xxx", &[16, 16, 15, 14][..]),
            // Overflows need not be neighbours: good steps short of a window restore nothing.
            ("x...x.x", &[16, 16, 16, 16, 16, 15, 15, 14]),
            // A window of good steps doubles.
            ("....", &[16, 16, 16, 16, 17]),
            ("........", &[16, 16, 16, 16, 17, 17, 17, 17, 18]),
            // An overflow starts the window anew.
            ("...x...", &[16; 8]),
            ("...x....", &[16, 16, 16, 16, 16, 16, 16, 16, 17]),
            // Growth makes the hysteresis whole.
            ("xx....x.x", &[16, 16, 15, 15, 15, 15, 16, 16, 16, 15]),
        ] {
            assert_eq!(scales(&SETTINGS, history), powers(exponents), "{history}");
        }
    }

    #[test]
    fn without_hysteresis_every_overflow_halves() {
        let settings = LossScaling { hysteresis: 1, ..SETTINGS };
        assert_eq!(scales(&settings, "xx....x"), powers(&[16, 15, 14, 14, 14, 14, 15, 14]));
    }

    #[test]
    fn the_scale_stays_between_minimum_and_maximum() {
        let settings = LossScaling { window: 1, ..SETTINGS };
        let low = scales(&settings, &"x".repeat(40));
        assert_eq!(*low.last().unwrap(), 1.0);
        let high = scales(&settings, &".".repeat(100));
        assert_eq!(*high.last().unwrap(), LossScaling::MAX);
        let mut scaler = LossScaler::new(&settings);
        let exhausted: Vec<bool> = (0..18)
            .map(|_| {
                scaler.update(&settings, true);
                scaler.exhausted(&settings)
            })
            .collect();
        // One overflow of hysteresis, sixteen halvings.
        assert_eq!(exhausted.iter().position(|e| *e), Some(16));
    }

    /// The rules once more, as a function of the whole history.
    fn reference(settings: &LossScaling, history: &[bool]) -> f64 {
        let (mut scale, mut run, mut overflows) = (settings.init, 0, 0);
        for overflow in history {
            if *overflow {
                (run, overflows) = (0, overflows + 1);
                if overflows >= settings.hysteresis {
                    scale = f64::max(scale / 2.0, settings.min);
                }
            } else {
                run += 1;
                if run % settings.window == 0 {
                    (scale, overflows) = (scale * 2.0, 0);
                }
            }
        }
        scale
    }

    #[test]
    fn every_history_of_twelve_steps_agrees_with_the_reference_however_it_is_interrupted() {
        for window in 1..4 {
            for hysteresis in 1..4 {
                let settings = LossScaling { init: 4.0, window, hysteresis, min: 1.0 };
                for bits in 0..1u32 << 12 {
                    let history: Vec<bool> = (0..12).map(|i| bits >> i & 1 == 1).collect();
                    let mut scaler = LossScaler::new(&settings);
                    for (i, overflow) in history.iter().enumerate() {
                        scaler.update(&settings, *overflow);
                        if i == 5 && bits % 64 == 7 {
                            let saved = serde_json::to_string(&scaler).unwrap();
                            scaler = serde_json::from_str(&saved).unwrap();
                        }
                    }
                    assert_eq!(scaler.scale, reference(&settings, &history), "{settings:?} {history:?}");
                }
            }
        }
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        LossScaling::default().validate().unwrap();
        for (settings, what) in [
            (LossScaling { init: 1000.0, ..SETTINGS }, "init = 1000 must be a power of two"),
            (LossScaling { init: f64::NAN, ..SETTINGS }, "init = NaN"),
            (LossScaling { init: 2f64.powi(70), ..SETTINGS }, "at most 2^63"),
            (LossScaling { min: 0.0, ..SETTINGS }, "min = 0"),
            (LossScaling { init: 1.0, min: 2.0, ..SETTINGS }, "min = 2 is above init = 1"),
            (LossScaling { window: 0, ..SETTINGS }, "window = 0"),
            (LossScaling { hysteresis: 0, ..SETTINGS }, "hysteresis = 0"),
        ] {
            let message = settings.validate().unwrap_err().to_string();
            assert!(message.contains(what), "{message}");
        }
    }
}
