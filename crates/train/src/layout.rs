//! How the trained parameters lie in flat memory, and which rank owns what. Arithmetic only: the trainer, the
//! checkpoint and the planner share it.
//!
//! Parameters in execution order, one after another, form one flat vector. Each step of the block loop (embedding,
//! each transformer block, head) that trains anything is a *unit*: a contiguous part of it, gathered, reduced, updated
//! and stored as one. A unit's *partition* is the part a rank owns: equal lengths in multiples of [`NORM_CHUNK`], so
//! that the pieces of the gradient norm are the same for every number of ranks; the last ones may be short or empty.

use crate::config::hex;
use crate::gradients::NORM_CHUNK;
use hearth_model::Group;
use sha2::{Digest, Sha256};
use std::ops::Range;

/// A trained parameter and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Canonical name; an adapter's is `<linear layer>.lora_A.weight` or `….lora_B.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First step of the block loop that uses it.
    pub group: Group,
    /// Its unit, by place in [`Layout::units`].
    pub unit: usize,
    /// Its elements within the unit.
    pub range: Range<usize>,
}

/// The trained parameters of one step of the block loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Which step.
    pub group: Group,
    /// Its parameters, by place in [`Layout::params`].
    pub params: Range<usize>,
    /// Its first element in the flat vector.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

/// Every trained parameter's place, and one rank's view of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    params: Vec<Param>,
    units: Vec<Unit>,
    world: usize,
    rank: usize,
}

impl Layout {
    /// `params`: name, shape and group in execution order.
    pub fn new(
        params: impl IntoIterator<Item = (String, Vec<usize>, Group)>,
        world: usize,
        rank: usize,
    ) -> Self {
        let mut layout = Self { params: Vec::new(), units: Vec::new(), world, rank };
        for (name, shape, group) in params {
            layout.add(name, shape, group);
        }
        layout
    }

    fn add(&mut self, name: String, shape: Vec<usize>, group: Group) {
        let (len, at, start) = (shape.iter().product::<usize>(), self.params.len(), self.len());
        if self.units.last().is_none_or(|unit| unit.group != group) {
            self.units.push(Unit { group, params: at..at, start, len: 0 });
        }
        let unit = self.units.len() - 1;
        let last = &mut self.units[unit];
        let range = last.len..last.len + len;
        (last.len, last.params.end) = (range.end, at + 1);
        self.params.push(Param { name, shape, group, unit, range });
    }

    /// Trained parameters in execution order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Units in execution order.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// sha256 of their names and shapes.
    pub fn names_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for param in &self.params {
            hash.update(format!("{} {:?}\n", param.name, param.shape));
        }
        hex(&hash.finalize())
    }

    /// Number of trained elements.
    pub fn len(&self) -> usize {
        self.units.last().map_or(0, |unit| unit.start + unit.len)
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.params.is_empty()
    }

    /// Ranks that share the work.
    pub fn world(&self) -> usize {
        self.world
    }

    /// The rank whose view this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The unit of a step of the block loop, if anything in it is trained.
    pub fn unit_of(&self, group: Group) -> Option<usize> {
        self.units.iter().position(|unit| unit.group == group)
    }

    /// Elements of every rank's partition of a unit, padding included. A single rank's is the unit itself.
    pub fn partition_len(&self, unit: usize) -> usize {
        match self.world {
            1 => self.units[unit].len,
            world => self.units[unit].len.div_ceil(NORM_CHUNK).div_ceil(world) * NORM_CHUNK,
        }
    }

    /// Elements of a unit whose partitions lie one after another.
    pub fn padded_len(&self, unit: usize) -> usize {
        self.world * self.partition_len(unit)
    }

    /// What of a unit `rank` owns, without padding; may be empty.
    pub fn partition_of(&self, unit: usize, rank: usize) -> Range<usize> {
        let (len, part) = (self.units[unit].len, self.partition_len(unit));
        (rank * part).min(len)..((rank + 1) * part).min(len)
    }

    /// What of a unit this rank owns, without padding; may be empty.
    pub fn partition(&self, unit: usize) -> Range<usize> {
        self.partition_of(unit, self.rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(world: usize, rank: usize) -> Layout {
        let shapes = [
            (vec![100, 90], Group::Embedding),
            (vec![30, 30], Group::Block(0)),
            (vec![7], Group::Block(0)),
            (vec![4096, 3], Group::Block(1)),
            (vec![1], Group::Head),
        ];
        let params = shapes.into_iter().enumerate().map(|(i, (shape, group))| (i.to_string(), shape, group));
        Layout::new(params, world, rank)
    }

    #[test]
    fn units_are_the_contiguous_runs_of_one_group() {
        let layout = layout(1, 0);
        let units: Vec<_> = layout.units().iter().map(|u| (u.start, u.len, u.params.clone())).collect();
        assert_eq!(units, [(0, 9000, 0..1), (9000, 907, 1..3), (9907, 12288, 3..4), (22195, 1, 4..5)]);
        assert_eq!((layout.len(), layout.unit_of(Group::Block(1))), (22196, Some(2)));
        assert_eq!(layout.params()[2].range, 900..907);
    }

    #[test]
    fn partitions_tile_every_unit_at_chunks_for_every_number_of_ranks() {
        for world in 1..9 {
            for unit in 0..4 {
                let whole = layout(world, 0);
                let mut end = 0;
                for rank in 0..world {
                    let range = layout(world, rank).partition(unit);
                    assert_eq!(range.start, end.min(whole.units()[unit].len));
                    assert!(range.is_empty() || range.start.is_multiple_of(NORM_CHUNK));
                    assert!(range.len() <= whole.partition_len(unit));
                    end = range.end;
                }
                assert_eq!(end, whole.units()[unit].len);
            }
        }
    }
}
