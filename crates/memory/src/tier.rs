//! Where bytes lie, and what they are.

use std::fmt;

/// Where bytes lie. On a machine without a GPU the device is the processor, and its memory the device tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Memory the arithmetic reads.
    Device,
    /// Main memory beside the device.
    Host,
    /// A fast disk.
    Nvme,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Nvme];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Nvme => "nvme",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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
