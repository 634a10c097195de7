//! Updating each unit as soon as its gradient is final, beside the passes through the model.
//!
//! That needs neither the norm of the whole gradient nor a place on the disk to keep gradients: the disk is busy with the
//! optimizer's state while the model is computed. [`Sizes::beside`] says where it is done.
//!
//! # Which unit when
//! The disk usually takes longer for a unit's state than the backward pass for its gradient. Where memory allows, some of the
//! units whose gradients come first therefore wait ([`Sizes::late`]): they are updated after the unit that comes last, in
//! the order in which the next step's forward pass uses them, while it computes. The order is fixed, so what is held does
//! not depend on timing; a [`Gate`] keeps the forward pass from reading a unit before it was written.

use crate::Error;
use crate::config::Compute;
use crate::copies::Copies;
use crate::disk::Waited;
use crate::flat::Flat;
use crate::gate::Gate;
use crate::optim::Step;
use crate::sizes::Sizes;
use crate::state::{OptimizerState, Tile, TileForm};
use crate::update::{copy_of, copy_range, ring};
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::nvme::NvmeFile;
use hearth_memory::stream::{Access, Part, Throughput, update_parts};
use hearth_memory::{Charge, Kind, Ledger, Tier};
use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// The update that runs beside the passes, on a thread of its own, for as long as a run.
pub(crate) struct Beside {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    gate: Arc<Gate>,
    ledger: Ledger,
    units: Arc<[Unit]>,
    /// How long gradients waited to be taken.
    pub(crate) waited: Waited,
}

/// What is to be known of a unit.
struct Unit {
    late: bool,
    /// No unit that is not late comes after it.
    last: bool,
    tiles: usize,
}

/// One step's update.
struct Job {
    step: Step,
    ready: Sender<()>,
    units: Receiver<Final>,
}

/// A unit's gradient, final.
struct Final {
    unit: usize,
    gradient: Flat,
    _charge: Option<Charge>,
}

impl Beside {
    /// Makes room for an update and waits for the first, if the configuration has it.
    ///
    /// # Errors
    /// A budget that does not hold the buffers.
    pub(crate) fn new(
        sizes: &Sizes<'_>,
        state: &OptimizerState,
        copies: &Copies,
        ledger: &Ledger,
    ) -> Result<Option<Self>, Error> {
        if !sizes.beside() {
            return Ok(None);
        }
        let (file, tiles) = state.on_disk().expect("the state is on a disk");
        let last = (0..sizes.layout.units().len()).find(|unit| !sizes.late(*unit));
        let unit = |unit| Unit {
            late: sizes.late(unit),
            last: Some(unit) == last,
            tiles: tiles.iter().filter(|tile| tile.unit == unit).count(),
        };
        let units: Arc<[Unit]> = (0..sizes.layout.units().len()).map(unit).collect();
        let mut tiles: Vec<(Tile, Range<u64>)> =
            tiles.iter().map(|tile| (tile.clone(), copy_range(sizes, tile, copies))).collect();
        tiles.sort_by_key(|(tile, _)| match units[tile.unit].late {
            false => (false, Reverse(tile.unit), 0),
            true => (true, Reverse(0), tile.unit),
        });
        let wide = sizes.widened();
        let worker = Worker {
            file: file.clone(),
            copied: copies.file().expect("the copies are on a disk").clone(),
            tiles,
            units: units.clone(),
            form: state.tile_form(),
            compute: sizes.config.compute,
            ring: ring(sizes, ledger)?,
            _widening: ledger.charge(Tier::Host, Kind::Staging, 4 * wide as u64)?,
            scratch: vec![0.0; wide],
            gate: copies.gate().clone(),
        };
        let (jobs, taken) = channel();
        let thread = std::thread::Builder::new()
            .name("update".into())
            .spawn(move || worker.serve(&taken))
            .map_err(|e| Error::Config(format!("no thread for the update beside the passes: {e}")))?;
        let (gate, ledger) = (copies.gate().clone(), ledger.clone());
        Ok(Some(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            gate,
            ledger,
            units,
            waited: Waited::default(),
        }))
    }

    /// Begins a step's update, which takes gradients as they come and may go on after the step.
    pub(crate) fn begin(&self, step: Step) -> Handover<'_> {
        let before = self.gate.begin();
        let ((done, ready), (units, taken)) = (channel(), channel());
        let job = Job { step, ready: done, units: taken };
        let jobs = self.jobs.as_ref().expect("taken only by drop");
        if jobs.send(job).is_err() {
            self.gate.end(Err(gone()));
        }
        Handover { beside: self, before, ready, units, taken: Cell::default(), spoiled: Cell::new(false) }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // Its failure was told through the gate.
            let _ = thread.join();
        }
    }
}

fn gone() -> Error {
    Error::Config("the update beside the backward pass has ended early".into())
}

/// The backward pass's end: hands over one gradient after another, from the last unit to the first.
pub(crate) struct Handover<'a> {
    beside: &'a Beside,
    /// Updates that must be over before anything is handed over.
    before: usize,
    ready: Receiver<()>,
    units: Sender<Final>,
    /// Of the gradient that was taken last, until the next is taken: what is charged does not depend on timing.
    taken: Cell<Option<Charge>>,
    /// A gradient was not finite: nothing more is updated.
    spoiled: Cell<bool>,
}

impl Handover<'_> {
    /// Hands a unit's gradient over: at once if it is updated late, else once the one before it is used up.
    pub(crate) fn give(
        &self,
        unit: usize,
        gradient: Flat,
        squares: &[f64],
        charge: Charge,
    ) -> Result<(), Error> {
        self.spoiled.set(self.spoiled.get() || squares.iter().any(|square| !square.is_finite()));
        if self.spoiled.get() {
            return Ok(());
        }
        let Beside { gate, ledger, units, waited, .. } = self.beside;
        waited.time(|| gate.await_ended(self.before))?;
        let Unit { late, last, tiles } = units[unit];
        if !late && waited.time(|| self.ready.recv()).is_err() {
            // The update's own error, if it has one to tell.
            gate.await_ended(self.before + 1)?;
            return Err(gone());
        }
        drop(charge);
        if !late {
            self.taken.take();
        }
        let bytes = gradient.as_bytes().len() as u64;
        let mut _charge = Some(ledger.charge(Tier::Host, Kind::Staging, bytes)?);
        if !late && !last {
            self.taken.set(_charge.take());
        }
        gate.close(unit, tiles);
        self.units.send(Final { unit, gradient, _charge }).map_err(|_| gone())
    }
}

/// Why an update ended early.
enum Ended {
    /// The other end is gone: the step failed, or a gradient was not finite.
    Alone,
    Failed(Error),
}

impl From<hearth_memory::Error> for Ended {
    fn from(error: hearth_memory::Error) -> Self {
        Ended::Failed(error.into())
    }
}

/// The update's end.
struct Worker {
    file: Arc<NvmeFile>,
    copied: Arc<NvmeFile>,
    /// In the order of the update, each with its copy's place.
    tiles: Vec<(Tile, Range<u64>)>,
    units: Arc<[Unit]>,
    form: TileForm,
    compute: Compute,
    ring: Vec<AlignedBuffer>,
    /// Where gradients in 16 bits are widened.
    scratch: Vec<f32>,
    _widening: Charge,
    gate: Arc<Gate>,
}

/// Ends an update at the gate, even if it panics.
struct Ending<'a>(&'a Gate, Option<Result<Throughput, Error>>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.end(self.1.take().unwrap_or_else(|| Err(gone())));
    }
}

impl Worker {
    fn serve(mut self, jobs: &Receiver<Job>) {
        let gate = self.gate.clone();
        for job in jobs {
            let mut ending = Ending(&gate, None);
            ending.1 = Some(self.update(job));
        }
    }

    /// Updates every unit in the order of the tiles; returns early, and without an error, when no more gradients come.
    fn update(&mut self, job: Job) -> Result<Throughput, Error> {
        let Worker { file, copied, tiles, units, form, compute, ring, scratch, gate, .. } = self;
        let parts: Vec<[Part<'_>; 3]> = tiles
            .iter()
            .map(|(tile, copy)| {
                [
                    Part { file, range: tile.offset..tile.offset + tile.bytes, access: Access::Change },
                    Part { file, range: 0..0, access: Access::Read },
                    Part { file: copied, range: copy.clone(), access: Access::Write },
                ]
            })
            .collect();
        let Job { step, ready, units: taken } = job;
        let mut gradients = Gradients { ready, taken, late: HashMap::new(), current: None };
        let update = &mut |at: usize, buffers: &mut [AlignedBuffer]| {
            let (tile, _) = &tiles[at];
            let gradient = gradients.of(tile.unit, units[tile.unit].late).ok_or(Ended::Alone)?;
            let [bytes, _, copy] = buffers else { panic!("a buffer for each part") };
            let gradient = gradient.floats(tile.range.clone(), scratch);
            form.update(tile, bytes, gradient, &step, copy_of(*compute, tile, copy));
            if tiles.get(at + 1).is_none_or(|(next, _)| next.unit != tile.unit) {
                gradients.current = None;
            }
            Ok(())
        };
        match update_parts(&parts, ring, update, &mut |at| gate.written(tiles[at].0.unit)) {
            Ok(moved) => Ok(moved),
            Err(Ended::Alone) => Ok(Throughput::default()),
            Err(Ended::Failed(error)) => Err(error),
        }
    }
}

/// Gradients as they come, and those that wait.
struct Gradients {
    ready: Sender<()>,
    taken: Receiver<Final>,
    late: HashMap<usize, Final>,
    current: Option<Final>,
}

impl Gradients {
    /// The gradient of a unit, which is taken until it is used up. `None` when it will not come.
    fn of(&mut self, unit: usize, late: bool) -> Option<&Flat> {
        if self.current.is_none() {
            self.current = self.late.remove(&unit);
            if self.current.is_none() && !late {
                self.ready.send(()).ok()?;
            }
        }
        while self.current.is_none() {
            let taken = self.taken.recv().ok()?;
            match taken.unit == unit {
                true => self.current = Some(taken),
                false => drop(self.late.insert(taken.unit, taken)),
            }
        }
        self.current.as_ref().map(|current| &current.gradient)
    }
}
