//! Slots in host memory for the contents of blocks that the device has no room for.

use super::Registered;
use std::collections::BTreeMap;

/// Which slot holds what, and since when.
#[derive(Clone, Debug)]
pub(super) struct HostSlots {
    slots: Vec<Option<Held>>,
    free: Vec<u32>,
    /// Slots that hold something, by when they were filled.
    by_age: BTreeMap<u64, u32>,
}

#[derive(Clone, Debug)]
struct Held {
    registered: Registered,
    since: u64,
}

impl HostSlots {
    /// All empty.
    pub fn new(total: usize) -> Self {
        let count = u32::try_from(total).expect("slot numbers are u32");
        Self { slots: vec![None; total], free: (0..count).rev().collect(), by_age: BTreeMap::new() }
    }

    pub fn total(&self) -> usize {
        self.slots.len()
    }

    pub fn held(&self) -> usize {
        self.by_age.len()
    }

    /// A slot to [`put`](Self::put) something into, and what was forgotten for it. `None` if there are no slots.
    pub fn free_slot(&mut self) -> Option<(u32, Option<Registered>)> {
        if let Some(slot) = self.free.pop() {
            return Some((slot, None));
        }
        let (_, slot) = self.by_age.pop_first()?;
        let held = self.slots[slot as usize].take().expect("it has an age");
        Some((slot, Some(held.registered)))
    }

    /// Fills a slot that is empty and not among the free.
    pub fn put(&mut self, slot: u32, registered: Registered, now: u64) {
        let old = self.slots[slot as usize].replace(Held { registered, since: now });
        assert!(old.is_none(), "KV slot {slot} of the host is filled twice");
        self.by_age.insert(now, slot);
    }

    /// Empties a slot. It is not among the free until it is given back.
    pub fn take(&mut self, slot: u32) -> Registered {
        let held = self.slots[slot as usize].take().expect("what is known to lie there");
        self.by_age.remove(&held.since);
        held.registered
    }

    /// A slot that was emptied is free.
    pub fn give_back(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// What each slot holds.
    #[cfg(test)]
    pub fn slots(&self) -> impl Iterator<Item = Option<&Registered>> {
        self.slots.iter().map(|held| held.as_ref().map(|held| &held.registered))
    }

    /// Which are free, and the order of the others.
    #[cfg(test)]
    pub fn shape(&self) -> String {
        assert_eq!(self.free.len() + self.by_age.len(), self.slots.len(), "no slot is lost");
        format!("{:?} {:?}", self.free, self.by_age.values().collect::<Vec<_>>())
    }
}
