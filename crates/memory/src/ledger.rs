//! Who holds which bytes.

use crate::{Budget, Error, Kind, Tier};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts bytes per tier and kind against a hard budget. Clones share one account.
///
/// Charges are made *before* bytes are allocated and given back by dropping the [`Charge`].
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    budget: Budget,
    accounts: Arc<Mutex<Accounts>>,
}

#[derive(Debug, Default)]
struct Accounts {
    held: BTreeMap<(Tier, Kind), u64>,
    /// Highest sum each tier ever held.
    peak: BTreeMap<Tier, u64>,
}

impl Accounts {
    fn used(&self, tier: Tier) -> u64 {
        self.held.range((tier, Kind::ALL[0])..=(tier, Kind::ALL[Kind::ALL.len() - 1])).map(|(_, n)| n).sum()
    }
}

impl Ledger {
    /// An empty ledger.
    pub fn new(budget: Budget) -> Self {
        Self { budget, accounts: Arc::default() }
    }

    /// The limits it keeps.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// Reserves bytes; nothing changes on error.
    ///
    /// # Errors
    /// [`Error::OverBudget`] when the tier does not hold that many more.
    pub fn charge(&self, tier: Tier, kind: Kind, bytes: u64) -> Result<Charge, Error> {
        let mut accounts = self.lock();
        let used = accounts.used(tier);
        let limit = self.budget.limit(tier).unwrap_or(u64::MAX);
        let free = limit - used;
        if bytes > free {
            return Err(Error::OverBudget { tier, needed: bytes, free, limit });
        }
        *accounts.held.entry((tier, kind)).or_default() += bytes;
        let peak = accounts.peak.entry(tier).or_default();
        *peak = (*peak).max(used + bytes);
        Ok(Charge { ledger: self.clone(), tier, kind, bytes })
    }

    /// Bytes a tier holds now.
    pub fn used(&self, tier: Tier) -> u64 {
        self.lock().used(tier)
    }

    /// Bytes a tier can still take; `u64::MAX` less what it holds when it has no limit.
    pub fn free(&self, tier: Tier) -> u64 {
        self.budget.limit(tier).unwrap_or(u64::MAX) - self.used(tier)
    }

    /// Most bytes a tier ever held at once.
    pub fn peak(&self, tier: Tier) -> u64 {
        self.lock().peak.get(&tier).copied().unwrap_or(0)
    }

    /// Bytes a tier holds now, by kind; kinds without bytes are left out.
    pub fn by_kind(&self, tier: Tier) -> BTreeMap<Kind, u64> {
        let accounts = self.lock();
        let held = accounts.held.iter().filter(|((t, _), bytes)| *t == tier && **bytes > 0);
        held.map(|(&(_, kind), &bytes)| (kind, bytes)).collect()
    }

    /// A panic elsewhere leaves the sums right: every change is one addition.
    fn lock(&self) -> MutexGuard<'_, Accounts> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes reserved in a ledger, refunded on drop. Lives beside the allocation it stands for.
#[derive(Debug)]
#[must_use = "dropping a charge refunds it"]
pub struct Charge {
    ledger: Ledger,
    tier: Tier,
    kind: Kind,
    bytes: u64,
}

impl Charge {
    /// Bytes reserved.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives a part back early: what turned out not to be needed.
    pub fn shrink_to(&mut self, bytes: u64) {
        assert!(bytes <= self.bytes, "a charge of {} bytes cannot shrink to {bytes}", self.bytes);
        self.refund(self.bytes - bytes);
        self.bytes = bytes;
    }

    fn refund(&self, bytes: u64) {
        let mut accounts = self.ledger.lock();
        let held = accounts.held.get_mut(&(self.tier, self.kind)).expect("a live charge has an account");
        *held -= bytes;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.refund(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_never_exceeded_and_the_error_says_by_how_much() {
        let ledger = Ledger::new(Budget::device(100));
        let weights = ledger.charge(Tier::Device, Kind::Weights, 70).expect("fits");
        let error = ledger.charge(Tier::Device, Kind::KvCache, 31).expect_err("one byte too many");
        assert_eq!(error.to_string(), "device tier: needs 31 bytes, 30 free of 100");
        assert_eq!(ledger.used(Tier::Device), 70);
        let _cache = ledger.charge(Tier::Device, Kind::KvCache, 30).expect("exactly full");
        assert_eq!(ledger.free(Tier::Device), 0);
        drop(weights);
        assert_eq!((ledger.free(Tier::Device), ledger.peak(Tier::Device)), (70, 100));
        assert_eq!(ledger.by_kind(Tier::Device), BTreeMap::from([(Kind::KvCache, 30)]));
    }

    #[test]
    fn tiers_do_not_borrow_from_each_other() {
        let ledger = Ledger::new("device=10,host=20".parse().expect("well formed"));
        let _device = ledger.charge(Tier::Device, Kind::Weights, 10).expect("fits");
        let _host = ledger.charge(Tier::Host, Kind::Weights, 20).expect("fits");
        assert!(ledger.charge(Tier::Device, Kind::Staging, 1).is_err());
        let _nvme = ledger.charge(Tier::Nvme, Kind::Weights, u64::MAX).expect("no limit was given");
        assert!(ledger.charge(Tier::Nvme, Kind::Weights, 1).is_err(), "sums do not wrap");
    }

    #[test]
    fn a_charge_gives_back_what_it_does_not_need_and_the_rest_on_drop() {
        let ledger = Ledger::new(Budget::device(100));
        let mut charge = ledger.charge(Tier::Device, Kind::KvCache, 100).expect("fits");
        charge.shrink_to(40);
        assert_eq!((charge.bytes(), ledger.used(Tier::Device)), (40, 40));
        drop(charge);
        assert_eq!(ledger.used(Tier::Device), 0);
    }

    #[test]
    fn threads_share_one_account() {
        let ledger = Ledger::new(Budget::device(1000));
        let granted: usize = std::thread::scope(|scope| {
            let charge = || {
                let charges = (0..100).map(|_| ledger.charge(Tier::Device, Kind::Weights, 7).ok());
                charges.collect::<Vec<_>>()
            };
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(charge)).collect();
            let charges = workers.into_iter().map(|w| w.join().expect("no panic"));
            charges.collect::<Vec<_>>().iter().flatten().flatten().count()
        });
        assert_eq!(granted, 1000 / 7);
        assert_eq!(ledger.used(Tier::Device), 0);
        assert!(ledger.peak(Tier::Device) <= 1000);
    }
}
