//! Optimizers over flat f32 slices: one file each, one arithmetic wherever the slice lies.
//!
//! [`OptimConfig`] is the registry. A new optimizer is one file, one variant here, and gets the tests that loop over
//! [`OptimConfig::ALL`].

mod adafactor;
mod adamw;
mod bandwidth;
mod lion;
mod sgd;

pub use adafactor::Adafactor;
pub use adamw::{AdamW, Moments, Update};
pub use bandwidth::{AdamBandwidth, adam_bandwidth};
pub use hearth_kernels::cpu::eight_bits::{Draws, EightBits};
pub use hearth_kernels::cpu::update::{CopyOut, HalvedSpan, Span, Values};
pub use lion::Lion;
pub use sgd::Sgd;

use crate::Error;
use crate::random::{key, word};
use half::bf16;
use hearth_kernels::cpu::{self, adafactor::AdafactorRule, adamw::AdamWRule, lion::LionRule, sgd::SgdRule};
use serde::{Deserialize, Serialize};

/// An optimizer and its settings, `kind` naming it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum OptimConfig {
    /// `adamw`.
    AdamW(AdamW),
    /// `sgd`.
    Sgd(Sgd),
    /// `lion`.
    Lion(Lion),
    /// `adafactor`.
    Adafactor(Adafactor),
}

impl Default for OptimConfig {
    fn default() -> Self {
        OptimConfig::AdamW(AdamW::default())
    }
}

/// How optimizer states are stored. The arithmetic is f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateDtype {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16, rounded to nearest even after every update.
    Bf16,
    /// 8 bits and a common exponent for every 64, rounded by chance after every update so that means stay right:
    /// [`hearth_kernels::cpu::eight_bits`]. The draws depend on seed, update and place alone.
    F8,
}

impl StateDtype {
    /// Bytes of a state of `len` elements, or of a part that begins with a block.
    pub fn bytes_of(self, len: usize) -> usize {
        match self {
            StateDtype::F32 => len * size_of::<f32>(),
            StateDtype::Bf16 => len * size_of::<bf16>(),
            StateDtype::F8 => cpu::eight_bits::bytes(len),
        }
    }
}

impl OptimConfig {
    /// Every optimizer with its default settings.
    pub const ALL: [OptimConfig; 4] = [
        OptimConfig::AdamW(AdamW::DEFAULT),
        OptimConfig::Sgd(Sgd::DEFAULT),
        OptimConfig::Lion(Lion::DEFAULT),
        OptimConfig::Adafactor(Adafactor::DEFAULT),
    ];

    /// The name in recipes and checkpoints.
    pub fn name(&self) -> &'static str {
        match self {
            OptimConfig::AdamW(_) => "adamw",
            OptimConfig::Sgd(_) => "sgd",
            OptimConfig::Lion(_) => "lion",
            OptimConfig::Adafactor(_) => "adafactor",
        }
    }

    /// Peak learning rate.
    pub fn lr(&self) -> f64 {
        match self {
            OptimConfig::AdamW(o) => o.lr,
            OptimConfig::Sgd(o) => o.lr,
            OptimConfig::Lion(o) => o.lr,
            OptimConfig::Adafactor(o) => o.lr,
        }
    }

    /// Names of the states a parameter has, in the order of [`Span::states`].
    pub fn states(&self) -> &'static [&'static str] {
        match self {
            OptimConfig::AdamW(_) => &["m", "v"],
            OptimConfig::Sgd(o) if o.momentum == 0.0 => &[],
            OptimConfig::Sgd(_) => &["momentum"],
            OptimConfig::Lion(_) => &["m"],
            OptimConfig::Adafactor(_) => &["v"],
        }
    }

    /// Whether a state's elements may be below zero.
    pub fn signed(&self, state: usize) -> bool {
        !(matches!(self, OptimConfig::AdamW(_)) && state == 1)
    }

    /// Elements of each state of a parameter of shape `shape`.
    pub fn state_len(&self, shape: &[usize]) -> usize {
        match self {
            OptimConfig::Adafactor(_) => cpu::adafactor::state_len(shape),
            _ => shape.iter().product(),
        }
    }

    /// Whether any slice of a parameter can be updated on its own. If not, state must neither be partitioned nor
    /// tiled, is f32, and updates go through [`Step::apply_whole`].
    pub fn elementwise(&self) -> bool {
        !matches!(self, OptimConfig::Adafactor(_))
    }

    /// Update number `t` (from 1) at learning rate `lr`; gradients are multiplied by `gradient_scale` first.
    pub fn step(&self, t: u64, lr: f64, gradient_scale: f32) -> Step {
        let rule = match self {
            OptimConfig::AdamW(o) => Rule::AdamW(o.rule(t, lr, gradient_scale)),
            OptimConfig::Sgd(o) => Rule::Sgd(o.rule(lr, gradient_scale)),
            OptimConfig::Lion(o) => Rule::Lion(o.rule(lr, gradient_scale)),
            OptimConfig::Adafactor(o) => Rule::Adafactor(o.rule(t, lr, gradient_scale)),
        };
        Step { rule, draws: t }
    }

    /// Refuses settings out of range.
    ///
    /// # Errors
    /// [`Error::Config`] with the key, its value and the limit.
    pub fn validate(&self) -> Result<(), Error> {
        not_negative("lr", self.lr())?;
        match self {
            OptimConfig::AdamW(o) => o.validate(),
            OptimConfig::Sgd(o) => o.validate(),
            OptimConfig::Lion(o) => o.validate(),
            OptimConfig::Adafactor(o) => o.validate(),
        }
    }
}

/// One update, ready to be applied to any number of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    rule: Rule,
    /// Names what is drawn to round states.
    draws: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// AdamW.
    AdamW(AdamWRule),
    /// SGD.
    Sgd(SgdRule),
    /// Lion.
    Lion(LionRule),
    /// Adafactor.
    Adafactor(AdafactorRule),
}

impl Step {
    /// The rule, if it is AdamW's.
    pub fn adamw(&self) -> Option<AdamWRule> {
        match self.rule {
            Rule::AdamW(rule) => Some(rule),
            _ => None,
        }
    }

    /// With draws of a run's own: `seed` is the run's.
    pub(crate) fn seeded(self, seed: u64) -> Self {
        Self { draws: key(&[seed, word("optimizer states"), self.draws]), ..self }
    }

    /// What rounds elements `first..` of a unit's state, counted from the unit's first.
    pub(crate) fn draws(&self, unit: usize, state: usize, first: usize) -> Draws {
        Draws { key: key(&[self.draws, unit as u64, state as u64]), first: first as u64 }
    }

    /// Updates any slice of a parameter with all cores. The bits do not depend on how a parameter is cut.
    ///
    /// # Panics
    /// If the span has not the optimizer's states, its slices differ in length, or the optimizer is not
    /// [elementwise](OptimConfig::elementwise).
    pub fn apply(&self, span: Span) {
        match &self.rule {
            Rule::AdamW(rule) => cpu::adamw::adamw(*rule, span),
            Rule::Sgd(rule) => cpu::sgd::sgd(*rule, span),
            Rule::Lion(rule) => cpu::lion::lion(*rule, span),
            Rule::Adafactor(_) => panic!("adafactor updates whole parameters only"),
        }
    }

    /// [`Step::apply`] to masters in two halves, with the same bits.
    ///
    /// # Panics
    /// As [`Step::apply`].
    pub fn apply_halved(&self, span: HalvedSpan) {
        match &self.rule {
            Rule::AdamW(rule) => cpu::update::apply_halved(*rule, span),
            Rule::Sgd(rule) => cpu::update::apply_halved(*rule, span),
            Rule::Lion(rule) => cpu::update::apply_halved(*rule, span),
            Rule::Adafactor(_) => panic!("adafactor updates whole parameters only"),
        }
    }

    /// Updates a whole parameter of shape `shape`; each state is [`OptimConfig::state_len`] long. Works for every
    /// optimizer.
    ///
    /// # Panics
    /// As [`Step::apply`]; Adafactor's state must be f32.
    pub fn apply_whole(&self, shape: &[usize], span: Span) {
        let Rule::Adafactor(rule) = &self.rule else { return self.apply(span) };
        let Span { master, mut states, gradient, copy } = span;
        let [Values::F32(state)] = states.as_mut_slice() else { panic!("adafactor has one state, in f32") };
        cpu::adafactor::adafactor(*rule, shape, master, gradient, state, copy);
    }
}

fn not_negative(key: &str, value: f64) -> Result<(), Error> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::Config(format!("optim.{key} = {value} must be a number, 0 or above")))
}

fn positive(key: &str, value: f64) -> Result<(), Error> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::Config(format!("optim.{key} = {value} must be a number above 0, as 1e-8")))
}

fn decays(betas: [f64; 2]) -> Result<(), Error> {
    if betas.iter().all(|beta| (0.0..1.0).contains(beta)) {
        return Ok(());
    }
    Err(Error::Config(format!("optim.betas = {betas:?}: each must be at least 0 and below 1")))
}

#[cfg(test)]
mod tests;
