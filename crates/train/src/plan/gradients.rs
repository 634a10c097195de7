//! Gradients from the backward pass to where they wait for the update, as [`crate::reduce`] charges them.

use super::Run;
use crate::Error;
use crate::activations::Working;
use crate::config::{Compute, Place};
use hearth_collective::Operation;
use hearth_memory::{Charge, Kind, Tier};
use hearth_model::Group;

/// A summed gradient that was put by.
pub(super) enum Stored {
    Memory(Charge),
    Disk,
}

/// Adds two of them. The right one is read, if need be, and let go.
type Add<'a> = dyn FnMut(Stored, Stored) -> Result<Stored, Error> + 'a;

/// An exchange of gradients under way.
pub(super) struct Exchange {
    unit: usize,
    turn: usize,
    charges: Vec<Charge>,
}

impl Run<'_> {
    /// Hands out the head's gradients; what waits for the embedding's half is returned.
    pub(super) fn head(
        &mut self,
        turn: usize,
        mut working: Working,
        exchange: &mut Option<Exchange>,
    ) -> Result<Vec<Charge>, Error> {
        working.only_gradients();
        let mut tied = Vec::new();
        for unit in self.head_units.clone() {
            match self.layout().units()[unit].group {
                Group::Head => self.hand_out(turn, Group::Head, &mut working, exchange)?,
                _ => {
                    let len = self.layout().units()[unit].len;
                    working.give(len * self.subject.config.compute.bytes());
                    tied.push(self.charge(Tier::Device, Kind::Gradients, 4 * len as u64)?);
                }
            }
        }
        Ok(tied)
    }

    pub(super) fn hand_out(
        &mut self,
        turn: usize,
        group: Group,
        working: &mut Working,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        self.hand_out_in(turn, group, self.subject.config.compute, working, exchange)
    }

    /// Hands out gradients that come in this precision.
    fn hand_out_in(
        &mut self,
        turn: usize,
        group: Group,
        precision: Compute,
        working: &mut Working,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        let Some(unit) = self.layout().unit_of(group) else { return Ok(()) };
        let params = self.layout().units()[unit].params.clone();
        let padded = self.layout().padded_len(unit);
        let kept = self.sizes.gradient_precision(unit);
        let mut open = None;
        for param in &self.layout().params()[params] {
            let len = param.range.len();
            working.give(len * self.subject.config.compute.bytes());
            if open.is_none() {
                open = Some(self.charge(Tier::Device, Kind::Gradients, self.sizes.gradient_bytes(unit))?);
            }
            if len != padded || precision != kept {
                drop(self.charge(Tier::Device, Kind::Gradients, (precision.bytes() * len) as u64)?);
            }
        }
        let open = open.expect("a unit has parameters");
        self.complete(turn, unit, open, exchange)
    }

    pub(super) fn hand_out_tied(
        &mut self,
        turn: usize,
        working: &mut Working,
        tied: Vec<Charge>,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        let precision = if tied.is_empty() { self.subject.config.compute } else { Compute::F32 };
        let _held = tied;
        self.hand_out_in(turn, Group::Embedding, precision, working, exchange)
    }

    /// A unit's gradient of one micro-batch is there.
    fn complete(
        &mut self,
        turn: usize,
        unit: usize,
        open: Charge,
        exchange: &mut Option<Exchange>,
    ) -> Result<(), Error> {
        let place = turn % self.assignment.block();
        let own = &mut self.sums[unit].0;
        own.push(place..place + 1, open, &mut |left, _right| Ok::<_, Error>(left))?;
        if !self.assignment.is_due(turn) {
            return Ok(());
        }
        self.settle(exchange)?;
        let sum = self.sums[unit].0.take_root().expect("complete");
        if self.subject.world == 1 {
            return self.keep(unit, self.assignment.nodes(turn).remove(0), sum);
        }
        let operation = if self.assignment.joint() { Operation::ReduceScatter } else { Operation::AllToAll };
        let bytes = self.sizes.gradient_bytes(unit);
        let moving = self.charge(Tier::Device, Kind::Staging, self.sizes.exchange_bytes(operation, bytes))?;
        self.traffic.received += bytes - bytes / self.subject.world as u64;
        *exchange = Some(Exchange { unit, turn, charges: vec![sum, moving] });
        Ok(())
    }

    pub(super) fn settle(&mut self, exchange: &mut Option<Exchange>) -> Result<(), Error> {
        let Some(Exchange { unit, turn, charges }) = exchange.take() else { return Ok(()) };
        let bytes = self.sizes.partition_bytes(unit);
        let nodes = self.assignment.nodes(turn);
        if nodes.len() == 1 {
            drop(charges);
            let charge = self.charge(Tier::Device, Kind::Gradients, bytes)?;
            return self.keep(unit, nodes[0].clone(), charge);
        }
        for node in nodes {
            let charge = self.charge(Tier::Device, Kind::Gradients, bytes)?;
            self.keep(unit, node, charge)?;
        }
        drop(charges);
        Ok(())
    }

    fn keep(&mut self, unit: usize, node: std::ops::Range<usize>, sum: Charge) -> Result<(), Error> {
        let (ledger, sizes, bytes) = (self.ledger, self.sizes, self.sizes.partition_bytes(unit));
        let place = self.subject.config.offload.grads;
        let (mut read, mut written) = (0, 0);
        let (writing, late) = (&mut self.writing, &mut self.late);
        let mut fetch = |stored| match stored {
            Stored::Memory(charge) => Ok(charge),
            Stored::Disk => {
                *writing = None;
                read += bytes;
                ledger.charge(Tier::Host, Kind::Staging, bytes)
            }
        };
        let add: &mut Add<'_> = &mut |left, right| {
            let (left, _right) = (fetch(left)?, fetch(right)?);
            Ok(Stored::Memory(left))
        };
        let all = &mut self.sums[unit].1;
        all.push(node, Stored::Memory(sum), add)?;
        all.update_last(&mut |stored| {
            let Stored::Memory(charge) = stored else { return Ok::<_, Error>(stored) };
            if sizes.beside() {
                drop(charge);
                match sizes.late(unit) {
                    true => late.push(ledger.charge(Tier::Host, Kind::Staging, bytes)?),
                    false => {
                        *writing = None;
                        *writing = Some(ledger.charge(Tier::Host, Kind::Staging, bytes)?);
                    }
                }
                return Ok(Stored::Disk);
            }
            match place {
                Place::Device => Ok(Stored::Memory(charge)),
                Place::Cpu => {
                    drop(charge);
                    Ok(Stored::Memory(ledger.charge(Tier::Host, Kind::Gradients, bytes)?))
                }
                Place::Nvme => {
                    drop((charge, writing.take()));
                    *writing = Some(ledger.charge(Tier::Host, Kind::Staging, sizes.writing_bytes(bytes))?);
                    written += bytes;
                    Ok(Stored::Disk)
                }
            }
        })?;
        self.traffic.disk_read += read;
        self.traffic.disk_written += written;
        Ok(())
    }
}
