//! Where a run's bytes lie, and how many they are: what is charged to the ledger, before anything is allocated.

use super::model::{Layout, Model};
use super::numbers::Compute;
use super::space::Space;
use super::{Settings, wrong};
use crate::ops::optimizer::CHUNK;
use crate::runtime::Error;
use hearth_memory::{Error as BudgetError, Kind, Tier};
use std::collections::BTreeMap;

/// Blocks in flight from the host to the card, and gradients in flight back.
pub(super) const SLOTS: usize = 2;

/// Where a unit (the embedding, a transformer block, the head) lies between its uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// All of it on the card.
    Card,
    /// Weights on the card; gradient and optimizer state on the host, which updates them.
    Host,
    /// Everything on the host; weights stream through the card when they are needed. Transformer blocks only.
    Streamed,
}

/// Bytes by tier and kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs(BTreeMap<(Tier, Kind), u64>);

impl Needs {
    pub(super) fn add(&mut self, tier: Tier, kind: Kind, bytes: usize) {
        *self.0.entry((tier, kind)).or_default() += bytes as u64;
    }

    /// Bytes in a tier.
    pub fn total(&self, tier: Tier) -> u64 {
        Kind::ALL.into_iter().map(|kind| self.bytes(tier, kind)).sum()
    }

    /// Bytes of a kind in a tier.
    pub fn bytes(&self, tier: Tier, kind: Kind) -> u64 {
        self.0.get(&(tier, kind)).copied().unwrap_or_default()
    }
}

/// What a run takes: decided before it begins, and exactly what the ledger then sees.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The model.
    pub model: Model,
    /// How much is computed at once.
    pub settings: Settings,
    /// Where each unit lies: embedding, blocks, head.
    pub places: Vec<Place>,
    /// What that takes.
    pub needs: Needs,
}

impl Plan {
    /// Everything on the card but the first units whose parameters are at least this share of all, in the order blocks, head,
    /// embedding: their gradients and optimizer states are the host's.
    ///
    /// # Errors
    /// [`Error::Value`] for a model without blocks or settings without rows.
    pub fn with_share<T: Compute>(model: Model, settings: Settings, on_host: f64) -> Result<Self, Error> {
        let layout = Layout::new(&model)?;
        let (all, mut moved) = (layout.len() as f64, 0.0);
        let mut places = vec![Place::Card; layout.units.len()];
        for unit in order(&layout) {
            if moved >= on_host * all {
                break;
            }
            places[unit] = Place::Host;
            moved += layout.units[unit].len as f64;
        }
        Self::of::<T>(model, settings, places)
    }

    /// These places.
    ///
    /// # Errors
    /// As [`Self::with_share`]; [`Error::Value`] for places that are not one per unit, and for an embedding or head that
    /// would be streamed.
    pub fn of<T: Compute>(model: Model, settings: Settings, places: Vec<Place>) -> Result<Self, Error> {
        let layout = Layout::new(&model)?;
        if places.len() != layout.units.len() {
            return Err(wrong("places", places.len(), &format!("{}", layout.units.len())));
        }
        if [0, layout.head()].iter().any(|&unit| places[unit] == Place::Streamed) {
            return Err(wrong("streamed units outside the blocks", 1, "0"));
        }
        if settings.rows == 0 {
            return Err(wrong("rows", 0, "at least 1"));
        }
        let needs = needs::<T>(&model, &settings, &layout, &places);
        Ok(Self { model, settings, places, needs })
    }

    /// The fastest that fits `device` bytes on the card and `host` bytes beside it: as little on the host as possible, and
    /// weights streamed only where nothing else helps.
    ///
    /// # Errors
    /// [`Error::Budget`] when even everything streamed does not fit; as [`Self::with_share`].
    pub fn within<T: Compute>(
        model: Model,
        settings: Settings,
        device: u64,
        host: u64,
    ) -> Result<Self, Error> {
        Self::with_share::<T>(model, settings, 0.0)?.fit::<T>(device, host)
    }

    /// [`Self::within`] from these places on: what is on the host stays there.
    ///
    /// # Errors
    /// [`Error::Budget`] when even everything streamed does not fit.
    pub fn fit<T: Compute>(mut self, device: u64, host: u64) -> Result<Self, Error> {
        let layout = Layout::new(&self.model)?;
        let order: Vec<usize> = order(&layout).collect();
        let blocks = || order.iter().filter(|&&unit| unit != 0 && unit != layout.head());
        let moves = order.iter().map(|&unit| (unit, Place::Host));
        for (unit, place) in moves.chain(blocks().map(|&unit| (unit, Place::Streamed))) {
            if self.needs.total(Tier::Device) <= device {
                break;
            }
            self.places[unit] = self.places[unit].max(place);
            self.needs = needs::<T>(&self.model, &self.settings, &layout, &self.places);
        }
        for (tier, limit) in [(Tier::Device, device), (Tier::Host, host)] {
            let needed = self.needs.total(tier);
            if needed > limit {
                return Err(BudgetError::OverBudget { tier, needed, free: limit, limit }.into());
            }
        }
        Ok(self)
    }

    /// Numbers of each unit, in the order of [`Self::places`], those that only align others among them.
    pub fn unit_lengths(&self) -> Vec<usize> {
        let layout = Layout::new(&self.model).expect("it was made before");
        layout.units.iter().map(|unit| unit.len).collect()
    }

    /// Trained numbers.
    pub fn parameters(&self) -> usize {
        let layout = Layout::new(&self.model).expect("it was made before");
        let spans = layout.units.iter().flat_map(|unit| &unit.parameters);
        spans.map(|parameter| parameter.span.range().len()).sum()
    }
}

/// The order in which units are moved to the host: blocks first, which are many and alike.
fn order(layout: &Layout) -> impl Iterator<Item = usize> {
    (1..=layout.head()).chain([0])
}

/// Every charge of a run.
fn needs<T: Compute>(model: &Model, settings: &Settings, layout: &Layout, places: &[Place]) -> Needs {
    let mut needs = Needs::default();
    Space::<T>::needs(model, settings, &mut needs);
    let number = size_of::<f32>();
    let (mut slot, mut streamed) = (0, 0);
    for (unit, place) in layout.units.iter().zip(places) {
        let weights = unit.len * size_of::<T>();
        let state = unit.len * number * if T::APART { 3 } else { 2 };
        needs.add(Tier::Device, Kind::Gradients, unit.len.div_ceil(CHUNK) * size_of::<f64>());
        if *place == Place::Card {
            needs.add(Tier::Device, Kind::Weights, weights);
            needs.add(Tier::Device, Kind::Gradients, unit.len * number);
            needs.add(Tier::Device, Kind::Optimizer, state);
            continue;
        }
        slot = slot.max(unit.len * number);
        needs.add(Tier::Host, Kind::Weights, weights);
        needs.add(Tier::Host, Kind::Gradients, unit.len * number);
        needs.add(Tier::Host, Kind::Optimizer, state);
        match place {
            Place::Streamed => streamed = streamed.max(weights),
            _ => needs.add(Tier::Device, Kind::Weights, weights),
        }
    }
    needs.add(Tier::Device, Kind::Staging, SLOTS * (slot + streamed));
    needs.add(Tier::Host, Kind::Staging, SLOTS * streamed);
    needs
}
