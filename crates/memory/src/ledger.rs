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

/// Bytes held, by tier and kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings([[u64; Kind::ALL.len()]; Tier::ALL.len()]);

impl Holdings {
    /// Bytes of one kind in one tier.
    pub fn bytes(&self, tier: Tier, kind: Kind) -> u64 {
        self.0[tier as usize][kind as usize]
    }

    /// Bytes in one tier.
    pub fn total(&self, tier: Tier) -> u64 {
        self.0[tier as usize].iter().sum()
    }

    /// Bytes in one tier by kind; kinds without bytes are left out.
    pub fn by_kind(&self, tier: Tier) -> BTreeMap<Kind, u64> {
        let bytes = Kind::ALL.into_iter().map(|kind| (kind, self.bytes(tier, kind)));
        bytes.filter(|&(_, bytes)| bytes > 0).collect()
    }

    fn bytes_mut(&mut self, tier: Tier, kind: Kind) -> &mut u64 {
        &mut self.0[tier as usize][kind as usize]
    }
}

/// What was held at one moment of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The phase it belongs to: the last mark's label.
    pub label: String,
    /// The tier that rose above everything since the last mark; `None` at a mark.
    pub peak: Option<Tier>,
    /// What was held.
    pub held: Holdings,
}

#[derive(Debug, Default)]
struct Accounts {
    held: Holdings,
    /// What was held when each tier was fullest.
    peaks: [Holdings; Tier::ALL.len()],
    /// Of a recording: most bytes of each tier since the last mark.
    heights: [u64; Tier::ALL.len()],
    /// `None` = nobody asked for a recording.
    timeline: Option<Vec<Moment>>,
}

impl Accounts {
    fn raise_peak(&mut self, tier: Tier) {
        let total = self.held.total(tier);
        if total > self.peaks[tier as usize].total(tier) {
            self.peaks[tier as usize] = self.held;
        }
        if let Some(timeline) = &mut self.timeline
            && total > self.heights[tier as usize]
        {
            self.heights[tier as usize] = total;
            record_peak(timeline, tier, self.held);
        }
    }

    fn begin_phase(&mut self) {
        self.heights = Tier::ALL.map(|tier| self.held.total(tier));
    }
}

/// A tier that fills step by step within one phase leaves one moment, its highest.
fn record_peak(timeline: &mut Vec<Moment>, tier: Tier, held: Holdings) {
    match timeline.last_mut() {
        Some(last) if last.peak == Some(tier) => last.held = held,
        last => {
            let label = last.map(|last| last.label.clone()).unwrap_or_default();
            timeline.push(Moment { label, peak: Some(tier), held });
        }
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
        let used = accounts.held.total(tier);
        let limit = self.budget.limit(tier).unwrap_or(u64::MAX);
        let free = limit - used;
        if bytes > free {
            return Err(Error::OverBudget { tier, needed: bytes, free, limit });
        }
        *accounts.held.bytes_mut(tier, kind) += bytes;
        accounts.raise_peak(tier);
        Ok(Charge { ledger: self.clone(), tier, kind, bytes })
    }

    /// Bytes a tier holds now.
    pub fn used(&self, tier: Tier) -> u64 {
        self.lock().held.total(tier)
    }

    /// Bytes a tier can still take; `u64::MAX` less what it holds when it has no limit.
    pub fn free(&self, tier: Tier) -> u64 {
        self.budget.limit(tier).unwrap_or(u64::MAX) - self.used(tier)
    }

    /// Most bytes a tier ever held at once.
    pub fn peak(&self, tier: Tier) -> u64 {
        self.lock().peaks[tier as usize].total(tier)
    }

    /// What a tier held when it was fullest, by kind; kinds without bytes are left out.
    pub fn peak_by_kind(&self, tier: Tier) -> BTreeMap<Kind, u64> {
        self.lock().peaks[tier as usize].by_kind(tier)
    }

    /// Forgets the peaks: each tier's is what it holds now.
    pub fn reset_peaks(&self) {
        let mut accounts = self.lock();
        accounts.peaks = [accounts.held; Tier::ALL.len()];
    }

    /// Begins a recording; one that was under way is forgotten.
    pub fn record(&self) {
        let mut accounts = self.lock();
        accounts.timeline = Some(Vec::new());
        accounts.begin_phase();
    }

    /// Begins a phase in the recording, if there is one: `forward`, `backward`, `optimizer`.
    pub fn mark(&self, label: &str) {
        let mut accounts = self.lock();
        let held = accounts.held;
        accounts.begin_phase();
        if let Some(timeline) = &mut accounts.timeline {
            timeline.push(Moment { label: label.into(), peak: None, held });
        }
    }

    /// What was recorded: a moment at each mark, and in between those in which a tier held more than in the phase so far.
    pub fn timeline(&self) -> Vec<Moment> {
        self.lock().timeline.clone().unwrap_or_default()
    }

    /// What is held now.
    pub fn held(&self) -> Holdings {
        self.lock().held
    }

    /// Bytes a tier holds now, by kind; kinds without bytes are left out.
    pub fn by_kind(&self, tier: Tier) -> BTreeMap<Kind, u64> {
        self.lock().held.by_kind(tier)
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
        *self.ledger.lock().held.bytes_mut(self.tier, self.kind) -= bytes;
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
    fn a_peak_remembers_what_it_was_made_of() {
        let ledger = Ledger::default();
        let weights = ledger.charge(Tier::Host, Kind::Weights, 50).expect("no limit");
        let gradients = ledger.charge(Tier::Host, Kind::Gradients, 30).expect("no limit");
        drop(gradients);
        let optimizer = ledger.charge(Tier::Host, Kind::Optimizer, 20).expect("no limit");
        assert_eq!(
            ledger.peak_by_kind(Tier::Host),
            BTreeMap::from([(Kind::Weights, 50), (Kind::Gradients, 30)])
        );
        assert_eq!(ledger.held().bytes(Tier::Host, Kind::Optimizer), 20);
        drop((weights, optimizer));
        ledger.reset_peaks();
        assert_eq!(ledger.peak(Tier::Host), 0);
    }

    #[test]
    fn a_recording_shows_each_phase_and_the_highest_moment_within_it() {
        let ledger = Ledger::default();
        ledger.mark("before the recording");
        ledger.record();
        let charge = |kind, bytes| ledger.charge(Tier::Device, kind, bytes).expect("no limit");
        ledger.mark("load");
        let _weights = (charge(Kind::Weights, 5), charge(Kind::Weights, 5));
        ledger.mark("forward");
        let activations = charge(Kind::Activations, 8);
        drop(activations);
        ledger.mark("optimizer");
        drop(charge(Kind::Staging, 2));
        let moments = ledger.timeline();
        let told: Vec<_> = moments.iter().map(|m| (&*m.label, m.peak, m.held.total(Tier::Device))).collect();
        let device = Some(Tier::Device);
        let expected = [
            ("load", None, 0),
            ("load", device, 10),
            ("forward", None, 10),
            ("forward", device, 18),
            ("optimizer", None, 10),
            ("optimizer", device, 12),
        ];
        assert_eq!(told, expected);
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
