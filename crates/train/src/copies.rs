//! The parameters as the model is computed with: whole or this rank's partition, in memory or on a disk; and how they
//! come to the device just before they are used.

use crate::Error;
use crate::config::{Compute, Place};
use crate::disk::Waited;
use crate::flat::Flat;
use crate::gate::Gate;
use crate::sizes::{Sizes, TILE};
use bytes::Bytes;
use hearth_collective::{Ordered, Pending};
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::nvme::NvmeFile;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Every unit's copy.
pub(crate) struct Copies {
    held: Vec<Held>,
    /// Elements the model needs of each unit.
    lens: Vec<usize>,
    /// Bytes charged to the device for each unit that is brought there.
    view_bytes: Vec<u64>,
    file: Option<Arc<NvmeFile>>,
    /// Units that an update has still to write.
    gate: Arc<Gate>,
    compute: Compute,
    place: Place,
    partitioned: bool,
    ledger: Ledger,
    waited: Waited,
}

enum Held {
    Memory { values: Arc<Flat>, _charge: Charge },
    Disk { offset: u64, len: usize },
}

/// A unit on the device, for as long as it is used.
#[derive(Clone)]
pub(crate) struct View {
    pub(crate) unit: usize,
    bytes: Bytes,
    _charge: Option<Arc<Charge>>,
}

impl View {
    /// The bytes of elements `range`, borrowed.
    pub(crate) fn part(&self, range: std::ops::Range<usize>, compute: Compute) -> Bytes {
        self.bytes.slice(range.start * compute.bytes()..range.end * compute.bytes())
    }
}

/// A copy kept alive as bytes.
struct Owner<T>(T);

impl AsRef<[u8]> for Owner<Arc<Flat>> {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl AsRef<[u8]> for Owner<Vec<u32>> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl AsRef<[u8]> for Owner<AlignedBuffer> {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Copies {
    /// Zeros, charged.
    pub(crate) fn new(sizes: &Sizes<'_>, ledger: &Ledger) -> Result<Self, Error> {
        let units = 0..sizes.layout.units().len();
        let place = sizes.config.offload.params;
        let compute = sizes.config.compute;
        let total: u64 = units.clone().map(|unit| sizes.copy_bytes(unit)).sum();
        let file = match place {
            Place::Nvme => {
                Some(Arc::new(crate::disk::file(sizes, "parameters", total, Kind::Weights, ledger)?))
            }
            _ => None,
        };
        let (mut held, mut offset) = (Vec::new(), 0);
        for unit in units.clone() {
            let (len, bytes) = (sizes.copy_len(unit), sizes.copy_bytes(unit));
            held.push(match place {
                Place::Nvme => Held::Disk { offset, len },
                _ => {
                    let charge = ledger.charge(place.tier(), Kind::Weights, bytes)?;
                    Held::Memory { values: Arc::new(Flat::zeros(compute, len)), _charge: charge }
                }
            });
            offset += bytes;
        }
        Ok(Self {
            held,
            lens: sizes.layout.units().iter().map(|unit| unit.len).collect(),
            view_bytes: units.map(|unit| sizes.view_bytes(unit)).collect(),
            file,
            gate: Arc::new(Gate::new(sizes.layout.units().len())),
            compute,
            place,
            partitioned: sizes.partitioned(),
            ledger: ledger.clone(),
            waited: Waited::default(),
        })
    }

    /// The file they lie in, if they are on a disk.
    pub(crate) fn file(&self) -> Option<&Arc<NvmeFile>> {
        self.file.as_ref()
    }

    /// Keeps a unit from being read before an update that runs on has written it.
    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Where in the file an element of what is kept of a unit lies.
    ///
    /// # Panics
    /// If the unit is in memory.
    pub(crate) fn offset(&self, unit: usize, element: usize) -> u64 {
        let Held::Disk { offset, .. } = &self.held[unit] else {
            panic!("values in memory are changed in place")
        };
        offset + (element * self.compute.bytes()) as u64
    }

    /// What those who use them waited for the disk.
    pub(crate) fn waited(&self) -> &Waited {
        &self.waited
    }

    /// The precision they are in.
    pub(crate) fn compute(&self) -> Compute {
        self.compute
    }

    /// A unit's values in memory, to be changed. No view of it may be alive.
    pub(crate) fn memory_mut(&mut self, unit: usize) -> Option<&mut Flat> {
        match &mut self.held[unit] {
            Held::Memory { values, .. } => {
                Some(Arc::get_mut(values).expect("nothing uses a unit while it is updated"))
            }
            Held::Disk { .. } => None,
        }
    }

    /// A unit's values in memory, shared.
    pub(crate) fn memory(&self, unit: usize) -> Option<&Arc<Flat>> {
        match &self.held[unit] {
            Held::Memory { values, .. } => Some(values),
            Held::Disk { .. } => None,
        }
    }

    /// Whether a tensor still borrows a unit, so that it cannot be changed.
    pub(crate) fn is_borrowed(&self, unit: usize) -> bool {
        self.memory(unit).is_some_and(|values| Arc::strong_count(values) > 1)
    }

    /// Sets all that is kept of a unit, rounded from its exact values.
    pub(crate) fn fill(&mut self, unit: usize, values: &[f32]) -> Result<(), Error> {
        if let Some(copy) = self.memory_mut(unit) {
            assert_eq!(copy.len(), values.len(), "a unit keeps its length");
            copy.write(0, values);
            return Ok(());
        }
        let compute = self.compute;
        for (at, part) in values.chunks(TILE).enumerate() {
            let mut copy = Flat::zeros(compute, part.len());
            copy.write(0, part);
            self.write(unit, at * TILE, &copy)?;
        }
        Ok(())
    }

    /// Overwrites elements `start..` of what is kept of a unit on a disk.
    pub(crate) fn write(&mut self, unit: usize, start: usize, values: &Flat) -> Result<(), Error> {
        let at = self.offset(unit, start);
        let file = self.file.as_ref().expect("copies on a disk have a file");
        Ok(crate::disk::write(file, at, values.as_bytes())?)
    }

    /// The bytes of elements `start..` of what is kept of a unit.
    pub(crate) fn read(&self, unit: usize, start: usize, bytes: &mut [u8]) -> Result<(), Error> {
        let at = start * self.compute.bytes();
        match &self.held[unit] {
            Held::Memory { values, .. } => bytes.copy_from_slice(&values.as_bytes()[at..][..bytes.len()]),
            Held::Disk { offset, .. } => {
                self.gate.pass(unit);
                let file = self.file.as_ref().expect("copies on a disk have a file");
                file.read_at(offset + at as u64, bytes)?;
            }
        }
        Ok(())
    }

    /// Replaces all that is kept of a unit; bytes beyond it are padding.
    pub(crate) fn set_bytes(&mut self, unit: usize, bytes: &[u8]) -> Result<(), Error> {
        match &mut self.held[unit] {
            Held::Memory { values, .. } => {
                let values = Arc::get_mut(values).expect("nothing uses a unit while it is updated");
                let to = values.as_bytes_mut();
                to.copy_from_slice(&bytes[..to.len()]);
                Ok(())
            }
            Held::Disk { offset, len } => {
                let file = self.file.as_ref().expect("copies on a disk have a file");
                Ok(file.write_at(*offset, &bytes[..*len * self.compute.bytes()])?)
            }
        }
    }

    /// Begins reading a unit, if it is on a disk.
    fn begin(&self, unit: usize) -> Result<Local, Error> {
        let (offset, len) = match &self.held[unit] {
            Held::Memory { values, .. } => return Ok(Local::Memory(values.clone())),
            Held::Disk { offset, len } => (*offset, len * self.compute.bytes()),
        };
        let file = self.file.clone().expect("copies on a disk have a file");
        // What is not to be gathered first is read to where it is used.
        let tier = if self.partitioned { Tier::Host } else { Tier::Device };
        let kind = if self.partitioned { Kind::Staging } else { Kind::Weights };
        let charge = self.ledger.charge(tier, kind, AlignedBuffer::capacity_for(len) as u64)?;
        let gate = self.gate.clone();
        Ok(Local::Coming(std::thread::spawn(move || {
            gate.pass(unit);
            let mut buffer = AlignedBuffer::under(charge, len)?;
            file.read_at(offset, &mut buffer)?;
            Ok(buffer)
        })))
    }
}

/// What this rank keeps of a unit, on its way.
enum Local {
    Memory(Arc<Flat>),
    Coming(JoinHandle<Result<AlignedBuffer, hearth_memory::Error>>),
}

impl Local {
    fn wait(self) -> Result<LocalBytes, Error> {
        match self {
            Local::Memory(values) => Ok(LocalBytes::Memory(values)),
            Local::Coming(thread) => Ok(LocalBytes::Read(thread.join().expect("reading does not panic")?)),
        }
    }
}

enum LocalBytes {
    Memory(Arc<Flat>),
    Read(AlignedBuffer),
}

/// A unit on its way to the device.
enum Coming {
    Local(Local),
    Gathering(Box<(Pending<Vec<u32>>, [Charge; 2])>),
}

/// Brings units to the device in the order of a script, a few ahead of their use: reading from the disk two ahead,
/// gathering from the other ranks one ahead. Every rank follows the same script, so every rank gathers in the same order.
pub(crate) struct Conveyor<'a> {
    copies: &'a Copies,
    comm: &'a Ordered,
    script: VecDeque<usize>,
    coming: VecDeque<(usize, Coming)>,
}

impl<'a> Conveyor<'a> {
    pub(crate) fn new(
        copies: &'a Copies,
        comm: &'a Ordered,
        script: impl IntoIterator<Item = usize>,
    ) -> Self {
        Self { copies, comm, script: script.into_iter().collect(), coming: VecDeque::new() }
    }

    /// The next unit of the script, on the device.
    ///
    /// # Panics
    /// When the script says another unit: the caller and the script disagree.
    pub(crate) fn next(&mut self, unit: usize) -> Result<View, Error> {
        let ahead = match (self.copies.place, self.copies.partitioned) {
            (Place::Nvme, true) => 3,
            (Place::Nvme, false) | (_, true) => 2,
            _ => 1,
        };
        while self.coming.len() < ahead
            && let Some(unit) = self.script.pop_front()
        {
            self.coming.push_back((unit, Coming::Local(self.copies.begin(unit)?)));
        }
        if self.copies.partitioned {
            for at in 0..self.coming.len().min(2) {
                self.gather(at)?;
            }
        }
        let (next, coming) = self.coming.pop_front().expect("the script goes on");
        assert_eq!(next, unit, "the script is the order of use");
        self.arrive(unit, coming)
    }

    /// Sends out a unit's partition, once.
    fn gather(&mut self, at: usize) -> Result<(), Error> {
        let (unit, coming) = self.coming.remove(at).expect("in range");
        let coming = match coming {
            Coming::Local(local) => {
                // Whole words: partitions are multiples of NORM_CHUNK elements.
                let partition: Vec<u32> = match self.copies.waited.time(|| local.wait())? {
                    LocalBytes::Memory(values) => bytemuck::pod_collect_to_vec(values.as_bytes()),
                    LocalBytes::Read(buffer) => bytemuck::pod_collect_to_vec(&buffer),
                };
                let bytes = self.copies.view_bytes[unit];
                let ledger = &self.copies.ledger;
                let charges = [
                    ledger.charge(Tier::Device, Kind::Weights, bytes)?,
                    ledger.charge(Tier::Device, Kind::Staging, size_of_val(partition.as_slice()) as u64)?,
                ];
                Coming::Gathering(Box::new((self.comm.all_gather(partition), charges)))
            }
            gathering => gathering,
        };
        self.coming.insert(at, (unit, coming));
        Ok(())
    }

    fn arrive(&self, unit: usize, coming: Coming) -> Result<View, Error> {
        let needed = self.copies.lens[unit] * self.copies.compute.bytes();
        let (bytes, charge) = match coming {
            Coming::Gathering(gathering) => {
                let (pending, [charge, _moving]) = *gathering;
                (Bytes::from_owner(Owner(pending.wait()?)), Some(charge))
            }
            Coming::Local(local) => match self.copies.waited.time(|| local.wait())? {
                LocalBytes::Read(buffer) => (Bytes::from_owner(Owner(buffer)), None),
                LocalBytes::Memory(values) if self.copies.place == Place::Device => {
                    (Bytes::from_owner(Owner(values)), None)
                }
                LocalBytes::Memory(values) => {
                    let bytes = self.copies.view_bytes[unit];
                    let charge = self.copies.ledger.charge(Tier::Device, Kind::Weights, bytes)?;
                    (Bytes::from_owner(Owner(Arc::new((*values).clone()))), Some(charge))
                }
            },
        };
        Ok(View { unit, bytes: bytes.slice(..needed), _charge: charge.map(Arc::new) })
    }
}
