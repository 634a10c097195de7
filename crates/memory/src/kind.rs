//! What bytes are used for.

use std::fmt;

/// What bytes are used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Parameters.
    Weights,
    /// Keys and values of running sequences.
    KvCache,
    /// Values between layers.
    Activations,
    /// Gradients of parameters.
    Gradients,
    /// Moments and master weights.
    Optimizer,
    /// Buffers that bytes pass through.
    Staging,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 6] =
        [Kind::Weights, Kind::KvCache, Kind::Activations, Kind::Gradients, Kind::Optimizer, Kind::Staging];

    /// As in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Weights => "weights",
            Kind::KvCache => "kv_cache",
            Kind::Activations => "activations",
            Kind::Gradients => "gradients",
            Kind::Optimizer => "optimizer",
            Kind::Staging => "staging",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
