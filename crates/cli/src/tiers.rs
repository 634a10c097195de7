//! What a run holds in each tier, in the words of reports.

use hearth_memory::{Kind, Ledger, Tier};
use serde::Serialize;
use std::collections::BTreeMap;

/// Every tier, counted as budgets are: the device of each rank, host memory and disk of all ranks of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tiers {
    /// Memory the arithmetic reads, of each rank.
    pub device: TierUse,
    /// Main memory beside it, of the machine.
    pub host: TierUse,
    /// A fast disk, of the machine.
    pub nvme: TierUse,
}

/// One tier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TierUse {
    /// Most bytes at once.
    pub peak_bytes: u64,
    /// The limit, if there is one.
    pub budget_bytes: Option<u64>,
    /// What the peak was made of: see [`word`].
    pub by_kind: BTreeMap<&'static str, u64>,
}

/// How reports name a kind: `parameters`, `gradients`, `optimizer` (moments and master weights), `activations`, `buffers`
/// (what bytes pass through), `kv_cache`.
pub fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Weights => "parameters",
        Kind::Staging => "buffers",
        other => other.name(),
    }
}

/// How many ranks a tier's figures are the sum of, where `here` share a machine.
pub fn sharers(tier: Tier, here: usize) -> u64 {
    if tier == Tier::Device { 1 } else { here as u64 }
}

impl Tiers {
    /// The peaks of one rank's ledger, `here` such ranks being on the machine.
    pub fn of(ledger: &Ledger, here: usize) -> Self {
        let tier = |tier: Tier| {
            let ranks = sharers(tier, here);
            let by_kind = ledger.peak_by_kind(tier).into_iter();
            TierUse {
                peak_bytes: ledger.peak(tier).saturating_mul(ranks),
                budget_bytes: ledger.budget().limit(tier).map(|limit| limit.saturating_mul(ranks)),
                by_kind: by_kind.map(|(kind, bytes)| (word(kind), bytes.saturating_mul(ranks))).collect(),
            }
        };
        Self { device: tier(Tier::Device), host: tier(Tier::Host), nvme: tier(Tier::Nvme) }
    }

    /// One of them.
    pub fn tier(&self, tier: Tier) -> &TierUse {
        match tier {
            Tier::Device => &self.device,
            Tier::Host => &self.host,
            Tier::Nvme => &self.nvme,
        }
    }
}
