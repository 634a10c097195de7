//! Updating each unit as soon as its gradient is final, beside the backward pass that makes the next one.
//!
//! That needs neither the norm of the whole gradient nor a place to keep gradients: they never go to the disk, which is
//! busy with the optimizer's state while the model is computed. [`Sizes::beside`](crate::sizes::Sizes::beside) says
//! where it is done.

use crate::Error;
use crate::copies::Copies;
use crate::disk::Waited;
use crate::flat::Flat;
use crate::optim::Step;
use crate::state::OptimizerState;
use crate::update::Updater;
use hearth_memory::buffer::AlignedBuffer;
use hearth_memory::stream::{Throughput, update_parts};
use hearth_memory::{Charge, Kind, Ledger, Tier};
use std::cell::Cell;
use std::cmp::Reverse;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A unit's gradient, final.
struct Final {
    unit: usize,
    gradient: Flat,
    _charge: Charge,
}

/// The backward pass's end: hands over one gradient after another, from the last unit to the first.
pub(crate) struct Handover<'a> {
    ledger: &'a Ledger,
    waited: &'a Waited,
    ready: Receiver<()>,
    units: Sender<Final>,
    /// A gradient was not finite: nothing more is updated.
    spoiled: Cell<bool>,
}

/// The update's end.
pub(crate) struct Takeover {
    ready: Sender<()>,
    units: Receiver<Final>,
    ring: Vec<AlignedBuffer>,
    /// Where gradients in 16 bits are widened.
    scratch: Vec<f32>,
    _widening: Charge,
}

/// Both ends, and what the update works in.
pub(crate) fn handover<'a>(
    updater: &Updater<'a>,
    waited: &'a Waited,
) -> Result<(Handover<'a>, Takeover), Error> {
    let ring = updater.ring()?;
    let wide = updater.sizes().widened();
    let _widening = updater.ledger.charge(Tier::Host, Kind::Staging, 4 * wide as u64)?;
    let ((done, ready), (units, taken)) = (channel(), channel());
    let takeover = Takeover { ready: done, units: taken, ring, scratch: vec![0.0; wide], _widening };
    Ok((Handover { ledger: updater.ledger, waited, ready, units, spoiled: Cell::new(false) }, takeover))
}

impl Handover<'_> {
    /// Hands a unit's gradient over, once the one before it is used up: what is held does not depend on timing.
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
        // Whoever joins the other end learns why it ended.
        let gone = || Error::Config("the update beside the backward pass has ended early".into());
        self.waited.time(|| self.ready.recv()).map_err(|_| gone())?;
        drop(charge);
        let bytes = gradient.as_bytes().len() as u64;
        let _charge = self.ledger.charge(Tier::Host, Kind::Staging, bytes)?;
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

/// Updates every unit, from the last to the first, as its gradient comes; returns early, and without an error, when no
/// more will come.
pub(crate) fn run(
    updater: &Updater<'_>,
    state: &OptimizerState,
    copies: &Copies,
    step: &Step,
    takeover: Takeover,
) -> Result<Throughput, Error> {
    let Takeover { ready, units, mut ring, mut scratch, _widening } = takeover;
    let (file, tiles) = state.on_disk().expect("the state is on a disk");
    let mut tiles = tiles.to_vec();
    tiles.sort_by_key(|tile| Reverse(tile.unit));
    let files = (&**file, copies.file().map(|file| &**file));
    let parts: Vec<_> = tiles.iter().map(|tile| updater.parts(tile, copies, files, None)).collect();
    let mut current: Option<Final> = None;
    let moved = update_parts(&parts, &mut ring, &mut |at, buffers| {
        let tile = &tiles[at];
        if current.as_ref().is_none_or(|current| current.unit != tile.unit) {
            current = None;
            ready.send(()).map_err(|_| Ended::Alone)?;
            current = Some(units.recv().map_err(|_| Ended::Alone)?);
        }
        let Final { unit, gradient, .. } = current.as_ref().expect("just received");
        assert_eq!(*unit, tile.unit, "units are final from the last to the first");
        let [bytes, _, copy] = buffers else { panic!("a buffer for each part") };
        let gradient = gradient.floats(tile.range.clone(), &mut scratch);
        state.update_tile(tile, bytes, gradient, step, updater.copy_of(tile, copy));
        Ok(())
    });
    match moved {
        Ok(moved) => Ok(moved),
        Err(Ended::Alone) => Ok(Throughput::default()),
        Err(Ended::Failed(error)) => Err(error),
    }
}
