//! The update, after the passes as [`crate::update`] charges it or beside them as [`crate::beside`] does; and what a save takes.

use super::Run;
use super::gradients::Stored;
use crate::Error;
use crate::checkpoint::saver::CHUNK_BYTES;
use crate::config::Place;
use crate::sizes::Masters;
use crate::update::{copy_buffers, gradient_ring_bytes};
use hearth_collective::Operation;
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::{Charge, Kind, Tier};

impl Run<'_> {
    /// What the update beside the passes works in, as [`crate::beside`], and what it moves.
    pub(super) fn beside(&mut self) -> Result<Option<[Charge; 2]>, Error> {
        let sizes = self.sizes;
        if !sizes.beside() {
            return Ok(None);
        }
        for unit in self.units() {
            for (range, _) in sizes.pieces(unit) {
                let state = sizes.tile_bytes(range.len());
                self.traffic.disk_read += state;
                self.traffic.disk_written +=
                    state + (range.len() * self.subject.config.compute.bytes()) as u64;
            }
        }
        let wide = 4 * sizes.widened() as u64;
        Ok(Some([self.ring()?, self.charge(Tier::Host, Kind::Staging, wide)?]))
    }

    /// Gradients of the step before that wait for their update.
    pub(super) fn late_before(&self) -> Result<Vec<Charge>, Error> {
        let late = self.units().filter(|unit| self.sizes.late(*unit));
        late.map(|unit| self.charge(Tier::Host, Kind::Staging, self.sizes.partition_bytes(unit))).collect()
    }

    /// What a save passes through.
    pub(super) fn saving(&self) -> Result<Option<Charge>, Error> {
        match self.subject.config.checkpoint {
            Some(_) => self.charge(Tier::Host, Kind::Staging, CHUNK_BYTES).map(Some),
            None => Ok(None),
        }
    }

    /// What state on a disk, and what travels with it, passes through.
    fn ring(&self) -> Result<Charge, Error> {
        let parts = self.sizes.ring_parts().map(|bytes| AlignedBuffer::capacity_for(bytes) as u64);
        self.charge(
            Tier::Host,
            Kind::Staging,
            self.subject.config.offload.ring as u64 * parts.iter().sum::<u64>(),
        )
    }

    /// The update, as [`crate::update::Updater::run`].
    pub(super) fn update(&mut self) -> Result<(), Error> {
        if self.sizes.beside() {
            return Ok(());
        }
        let (sizes, config, world) = (self.sizes, self.subject.config, self.subject.world);
        let sums: Vec<Stored> =
            self.sums.iter_mut().map(|(_, all)| all.take_root().expect("complete")).collect();
        let replicated = config.zero == 0 && world > 1;
        let of_unit = |unit| sizes.pieces(unit).into_iter().map(move |(range, at)| (unit, range.len(), at));
        let (on_disk, in_memory): (Vec<_>, Vec<_>) =
            self.units().flat_map(of_unit).partition(|(_, _, place)| *place == Place::Nvme);
        let _widening = self.charge(Tier::Host, Kind::Staging, 4 * sizes.widened() as u64)?;
        let mut whole = None;
        {
            let _behind = self.copies_behind(&in_memory)?;
            let from_disk =
                in_memory.iter().filter(|(unit, ..)| !replicated && matches!(sums[*unit], Stored::Disk));
            let longest =
                from_disk.map(|(unit, len, _)| sizes.gradient_width(*unit) * len).max().unwrap_or(0);
            let _ahead = match longest {
                0 => None,
                _ => Some(self.charge(Tier::Host, Kind::Staging, gradient_ring_bytes(longest))?),
            };
            self.update_pieces(&in_memory, &sums, &mut whole)?;
        }
        {
            let _ring = if on_disk.is_empty() { None } else { Some(self.ring()?) };
            self.update_pieces(&on_disk, &sums, &mut whole)?;
        }
        drop((whole, sums, _widening));
        self.exchange()
    }

    fn update_pieces(
        &mut self,
        pieces: &[(usize, usize, Place)],
        sums: &[Stored],
        whole: &mut Option<(usize, Charge)>,
    ) -> Result<(), Error> {
        let (sizes, config, world) = (self.sizes, self.subject.config, self.subject.world);
        let (replicated, copy) = (config.zero == 0 && world > 1, config.compute.bytes());
        for &(unit, len, place) in pieces {
            if replicated && whole.as_ref().is_none_or(|(there, _)| *there != unit) {
                drop(whole.take());
                let bytes = 4 * self.layout().partition_len(unit);
                let held = Operation::AllGather.held_bytes(world, bytes) as u64;
                *whole = Some((unit, self.charge(Tier::Device, Kind::Gradients, held)?));
                self.traffic.received += (bytes * (world - 1)) as u64;
            }
            if config.offload.params == Place::Nvme {
                self.traffic.update_written += (len * copy) as u64;
            }
            if matches!(sums[unit], Stored::Disk) {
                self.traffic.update_read += (sizes.gradient_width(unit) * len) as u64;
            }
            match place {
                Place::Nvme => {
                    self.traffic.update_read += sizes.tile_bytes(len);
                    self.traffic.update_written += sizes.tile_bytes(len);
                }
                _ => {
                    let states = config.optim.states().len() * config.state_dtype.bytes_of(len);
                    // Unless the copy is the master, or half of it.
                    let copied = if sizes.masters() == Masters::Whole { copy } else { 0 };
                    self.traffic.update_memory += (len * (4 + 2 * 4 + copied) + 2 * states) as u64;
                }
            }
        }
        Ok(())
    }

    /// What copies on their way to the disk pass through.
    fn copies_behind(&self, pieces: &[(usize, usize, Place)]) -> Result<Option<Charge>, Error> {
        let config = self.subject.config;
        let longest = pieces.iter().map(|(_, len, _)| *len).max().unwrap_or(0);
        if config.offload.params != Place::Nvme || longest == 0 {
            return Ok(None);
        }
        let (buffers, bytes) = copy_buffers(longest, config.compute);
        self.charge(Tier::Host, Kind::Staging, (buffers * bytes) as u64).map(Some)
    }

    /// Stages 1 and 2: the copies that the other ranks updated.
    fn exchange(&mut self) -> Result<(), Error> {
        let (config, world) = (self.subject.config, self.subject.world);
        if world == 1 || !matches!(config.zero, 1 | 2) {
            return Ok(());
        }
        for unit in self.units() {
            let own = self.layout().partition_len(unit) * config.compute.bytes();
            let held = Operation::AllGather.held_bytes(world, own) as u64;
            drop(self.charge(Tier::Device, Kind::Staging, held)?);
            self.traffic.received += (own * (world - 1)) as u64;
        }
        Ok(())
    }
}
