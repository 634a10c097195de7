//! Weights on their way to where they are used, as [`crate::copies`] charges them.

use super::Run;
use crate::Error;
use crate::config::Place;
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::{Charge, Kind, Tier};
use hearth_model::Group;
use std::collections::VecDeque;

/// Weights on their way, in the order of the script; see [`crate::copies::Conveyor`].
pub(super) struct Conveyor {
    script: VecDeque<usize>,
    coming: VecDeque<(usize, Coming)>,
}

enum Coming {
    Local(Option<Charge>),
    Gathering(Charge, Charge),
}

impl Run<'_> {
    pub(super) fn conveyor(&self, steps: &[Group]) -> Conveyor {
        let script = steps.iter().flat_map(|group| self.units_for(*group)).collect();
        Conveyor { script, coming: VecDeque::new() }
    }

    pub(super) fn units_for(&self, group: Group) -> Vec<usize> {
        match group {
            Group::Head => self.head_units.clone(),
            _ => self.layout().unit_of(group).into_iter().collect(),
        }
    }

    /// The views of a step's units, charged as [`crate::copies::Conveyor::next`] charges them.
    pub(super) fn bring(&mut self, group: Group, conveyor: &mut Conveyor) -> Result<Vec<Charge>, Error> {
        let mut views = Vec::new();
        for unit in self.units_for(group) {
            views.extend(self.next(unit, conveyor)?);
        }
        Ok(views)
    }

    fn next(&mut self, unit: usize, conveyor: &mut Conveyor) -> Result<Option<Charge>, Error> {
        let (place, partitioned) = (self.subject.config.offload.params, self.sizes.partitioned());
        let ahead = match (place, partitioned) {
            (Place::Nvme, true) => 3,
            (Place::Nvme, false) | (_, true) => 2,
            _ => 1,
        };
        while conveyor.coming.len() < ahead
            && let Some(unit) = conveyor.script.pop_front()
        {
            let local = match place {
                Place::Nvme => {
                    let bytes = self.sizes.copy_len(unit) * self.subject.config.compute.bytes();
                    self.traffic.disk_read += bytes as u64;
                    let bytes = AlignedBuffer::capacity_for(bytes) as u64;
                    let (tier, kind) = match partitioned {
                        true => (Tier::Host, Kind::Staging),
                        false => (Tier::Device, Kind::Weights),
                    };
                    Some(self.charge(tier, kind, bytes)?)
                }
                _ => None,
            };
            conveyor.coming.push_back((unit, Coming::Local(local)));
        }
        if partitioned {
            for at in 0..conveyor.coming.len().min(2) {
                let (unit, coming) = &mut conveyor.coming[at];
                if let Coming::Local(local) = coming {
                    let whole = self.sizes.view_bytes(*unit);
                    let own = whole / self.subject.world as u64;
                    let _read = local.take();
                    self.traffic.received += whole - own;
                    *coming = Coming::Gathering(
                        self.ledger.charge(Tier::Device, Kind::Weights, whole)?,
                        self.ledger.charge(Tier::Device, Kind::Staging, own)?,
                    );
                }
            }
        }
        let (_, coming) = conveyor.coming.pop_front().expect("the script goes on");
        match coming {
            Coming::Gathering(charge, _moved) => Ok(Some(charge)),
            Coming::Local(local) => match place {
                Place::Device => Ok(None),
                Place::Nvme => Ok(local),
                Place::Cpu => {
                    Ok(Some(self.charge(Tier::Device, Kind::Weights, self.sizes.view_bytes(unit))?))
                }
            },
        }
    }
}
