//! The optimizer's table: which keys belong to which optimizer, and what they are when nobody says.

use super::choices::OptimKind;
use super::tables::OptimTable;
use hearth_train::OptimConfig;
use hearth_train::optim::{Adafactor, AdamW, Lion, Sgd};

impl OptimTable {
    /// The optimizer: what the recipe says over its defaults.
    pub fn settings(&self) -> OptimConfig {
        match self.kind {
            OptimKind::Adamw => {
                let default = AdamW::default();
                OptimConfig::AdamW(AdamW {
                    lr: self.lr.unwrap_or(default.lr),
                    betas: self.betas.unwrap_or(default.betas),
                    eps: self.eps.unwrap_or(default.eps),
                    weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
                })
            }
            OptimKind::Sgd => {
                let default = Sgd::default();
                OptimConfig::Sgd(Sgd {
                    lr: self.lr.unwrap_or(default.lr),
                    momentum: self.momentum.unwrap_or(default.momentum),
                    weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
                })
            }
            OptimKind::Lion => {
                let default = Lion::default();
                OptimConfig::Lion(Lion {
                    lr: self.lr.unwrap_or(default.lr),
                    betas: self.betas.unwrap_or(default.betas),
                    weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
                })
            }
            OptimKind::Adafactor => {
                let default = Adafactor::default();
                OptimConfig::Adafactor(Adafactor {
                    lr: self.lr.unwrap_or(default.lr),
                    eps: self.eps.unwrap_or(default.eps),
                    decay_rate: self.decay_rate.unwrap_or(default.decay_rate),
                    clip_threshold: self.clip_threshold.unwrap_or(default.clip_threshold),
                    weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
                })
            }
        }
    }

    /// Writes the defaults into the keys that were left out, so that a printed recipe says everything.
    pub(super) fn fill(&mut self) {
        self.lr = Some(self.settings().lr());
        match self.settings() {
            OptimConfig::AdamW(o) => {
                (self.betas, self.eps, self.weight_decay) =
                    (Some(o.betas), Some(o.eps), Some(o.weight_decay));
            }
            OptimConfig::Sgd(o) => {
                (self.momentum, self.weight_decay) = (Some(o.momentum), Some(o.weight_decay));
            }
            OptimConfig::Lion(o) => {
                (self.betas, self.weight_decay) = (Some(o.betas), Some(o.weight_decay));
            }
            OptimConfig::Adafactor(o) => {
                (self.eps, self.weight_decay) = (Some(o.eps), Some(o.weight_decay));
                (self.decay_rate, self.clip_threshold) = (Some(o.decay_rate), Some(o.clip_threshold));
            }
        }
    }

    /// The first key that was given although the optimizer has none of it.
    pub(super) fn stray(&self) -> Option<&'static str> {
        use OptimKind::{Adafactor, Adamw, Lion, Sgd};
        let of: [(&str, bool, &[OptimKind]); 5] = [
            ("betas", self.betas.is_some(), &[Adamw, Lion]),
            ("eps", self.eps.is_some(), &[Adamw, Adafactor]),
            ("momentum", self.momentum.is_some(), &[Sgd]),
            ("decay_rate", self.decay_rate.is_some(), &[Adafactor]),
            ("clip_threshold", self.clip_threshold.is_some(), &[Adafactor]),
        ];
        of.iter().find(|(_, given, kinds)| *given && !kinds.contains(&self.kind)).map(|(key, ..)| *key)
    }
}
