//! A micro-batch, as the host has it and as kernels read it.

use super::model::Model;
use super::space::Room;
use super::wrong;
use crate::ops::attention::{Tile, tiles_of};
use crate::ops::embedding::Groups;
use crate::ops::pointwise::Rotations;
use crate::runtime::{DeviceBuffer, Error, Stream, View};
use std::collections::BTreeMap;

/// What one forward and backward pass works on: documents one after another, each row with the id it must predict.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatch<'a> {
    /// Token ids: `[rows]`.
    pub ids: &'a [u32],
    /// The id each row must predict, negative for none: `[rows]`.
    pub targets: &'a [i32],
    /// Lengths of the documents; together `rows`.
    pub documents: &'a [usize],
    /// Cosines of each row's rotation: `[rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

impl MicroBatch<'_> {
    /// Rows that predict something.
    pub fn trained(&self) -> u64 {
        self.targets.iter().filter(|target| **target >= 0).count() as u64
    }

    /// What kernels cannot check.
    pub(super) fn check(&self, model: &Model, most_rows: usize) -> Result<(), Error> {
        let (rows, vocab) = (self.ids.len(), model.shape.vocab);
        if rows == 0 || rows > most_rows {
            return Err(wrong("rows", rows, &format!("1 to {most_rows}")));
        }
        let half = rows * (model.shape.head_dim / 2);
        let documents = self.documents.iter().sum();
        let lengths = [
            ("targets", self.targets.len(), rows),
            ("documents", documents, rows),
            ("cosines", self.cos.len(), half),
            ("sines", self.sin.len(), half),
        ];
        for (argument, len, needed) in lengths {
            if len != needed {
                return Err(Error::Length { op: super::OP, argument, len, needed });
            }
        }
        let targets = self.targets.iter().filter_map(|target| u32::try_from(*target).ok());
        match self.ids.iter().copied().chain(targets).find(|id| *id as usize >= vocab) {
            Some(id) => Err(wrong("a token", id as usize, &format!("below {vocab}"))),
            None => Ok(()),
        }
    }
}

/// Its place on the card.
pub(super) struct BatchOnCard {
    rows: usize,
    half: usize,
    ids: DeviceBuffer<u32>,
    targets: DeviceBuffer<i32>,
    tiles: (DeviceBuffer<Tile>, usize),
    cos: DeviceBuffer<f32>,
    sin: DeviceBuffer<f32>,
    /// Rows by id, for the gradient of the embedding.
    group_rows: DeviceBuffer<u32>,
    group_starts: DeviceBuffer<u32>,
    group_ids: (DeviceBuffer<u32>, usize),
}

impl BatchOnCard {
    pub fn new(on: &Room<'_>, model: &Model) -> Result<Self, Error> {
        let half = model.shape.head_dim / 2;
        Ok(Self {
            rows: 0,
            half,
            ids: on.rows(1)?,
            targets: on.rows(1)?,
            // As many as there are documents of one row.
            tiles: (on.rows(1)?, 0),
            cos: on.rows(half)?,
            sin: on.rows(half)?,
            group_rows: on.rows(1)?,
            group_starts: on.card(on.rows + 1)?,
            group_ids: (on.rows(1)?, 0),
        })
    }

    pub fn bytes(model: &Model, rows: usize) -> usize {
        let half = model.shape.head_dim / 2;
        rows * (5 * size_of::<u32>() + size_of::<Tile>() + 2 * half * size_of::<f32>()) + size_of::<u32>()
    }

    /// Brings a micro-batch that was checked.
    pub fn upload(&mut self, stream: &Stream, batch: &MicroBatch<'_>) -> Result<(), Error> {
        self.rows = batch.ids.len();
        self.ids.write(stream, batch.ids)?;
        self.targets.write(stream, batch.targets)?;
        let tiles = tiles_of(batch.documents);
        self.tiles.1 = tiles.len();
        self.tiles.0.write(stream, &tiles)?;
        self.cos.write(stream, batch.cos)?;
        self.sin.write(stream, batch.sin)?;
        let mut groups: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (row, id) in batch.ids.iter().enumerate() {
            groups.entry(*id).or_default().push(row as u32);
        }
        let starts = groups.values().scan(0, |end, rows| {
            *end += rows.len() as u32;
            Some(*end)
        });
        let starts: Vec<u32> = [0].into_iter().chain(starts).collect();
        self.group_ids.1 = groups.len();
        self.group_ids.0.write(stream, &groups.keys().copied().collect::<Vec<_>>())?;
        self.group_starts.write(stream, &starts)?;
        self.group_rows.write(stream, &groups.into_values().flatten().collect::<Vec<_>>())
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn ids(&self) -> Result<View<'_, u32>, Error> {
        self.ids.part(0..self.rows)
    }

    /// Of the rows from `first` on.
    pub fn targets(&self, first: usize, count: usize) -> Result<View<'_, i32>, Error> {
        self.targets.part(first..first + count)
    }

    pub fn tiles(&self) -> Result<View<'_, Tile>, Error> {
        self.tiles.0.part(0..self.tiles.1)
    }

    pub fn rotations(&self) -> Result<Rotations<'_>, Error> {
        let len = self.rows * self.half;
        Ok(Rotations { cos: self.cos.part(0..len)?, sin: self.sin.part(0..len)?, half: self.half })
    }

    pub fn groups(&self) -> Result<Groups<'_>, Error> {
        Ok(Groups {
            rows: self.group_rows.part(0..self.rows)?,
            starts: self.group_starts.part(0..self.group_ids.1 + 1)?,
            ids: self.group_ids.0.part(0..self.group_ids.1)?,
        })
    }
}
