//! Which units an update that runs on is still to write, so that nobody reads them before it has.

use crate::Error;
use hearth_memory::stream::Throughput;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Shared by the update, which opens it unit by unit, and by whoever reads units.
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Tiles of each unit that have a gradient and are not written.
    left: Vec<usize>,
    begun: usize,
    ended: usize,
    failure: Option<Error>,
    moved: Throughput,
}

impl Gate {
    /// Open for all of so many units.
    pub(crate) fn new(units: usize) -> Self {
        Self {
            state: Mutex::new(State { left: vec![0; units], ..State::default() }),
            changed: Condvar::new(),
        }
    }

    /// Another update begins; how many began before it.
    pub(crate) fn begin(&self) -> usize {
        let mut state = self.lock();
        state.begun += 1;
        state.begun - 1
    }

    /// From now on nobody reads the unit, until so many tiles are written.
    pub(crate) fn close(&self, unit: usize, tiles: usize) {
        self.lock().left[unit] = tiles;
    }

    /// A tile of the unit was written.
    pub(crate) fn written(&self, unit: usize) {
        let mut state = self.lock();
        state.left[unit] = state.left[unit].saturating_sub(1);
        if state.left[unit] == 0 {
            self.changed.notify_all();
        }
    }

    /// An update is over, well or not: what it has not written stays as it is, for all to read.
    pub(crate) fn end(&self, outcome: Result<Throughput, Error>) {
        let mut state = self.lock();
        state.left.fill(0);
        state.ended += 1;
        match outcome {
            Ok(moved) => state.moved.add(&moved),
            Err(error) => state.failure = state.failure.take().or(Some(error)),
        }
        self.changed.notify_all();
    }

    /// Waits until nothing of the unit is still to be written.
    pub(crate) fn pass(&self, unit: usize) {
        drop(self.wait(|state| state.left[unit] > 0));
    }

    /// Waits until so many updates are over.
    ///
    /// # Errors
    /// Why one of them failed, told once.
    pub(crate) fn await_ended(&self, updates: usize) -> Result<(), Error> {
        self.wait(|state| state.ended < updates).failure.take().map_or(Ok(()), Err)
    }

    /// Waits until every update is over.
    ///
    /// # Errors
    /// As [`Gate::await_ended`].
    pub(crate) fn await_all(&self) -> Result<(), Error> {
        self.wait(|state| state.ended < state.begun).failure.take().map_or(Ok(()), Err)
    }

    /// What updates moved that ended since this was last asked.
    pub(crate) fn take_moved(&self) -> Throughput {
        std::mem::take(&mut self.lock().moved)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, mut not_yet: impl FnMut(&State) -> bool) -> MutexGuard<'_, State> {
        let state = self.changed.wait_while(self.lock(), |state| not_yet(state));
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_unit_is_read_only_after_its_last_tile_was_written() {
        let (gate, written) = (Arc::new(Gate::new(2)), Arc::new(AtomicUsize::new(0)));
        gate.begin();
        gate.close(1, 3);
        gate.pass(0);
        let reader = {
            let (gate, written) = (gate.clone(), written.clone());
            std::thread::spawn(move || {
                gate.pass(1);
                written.load(Ordering::SeqCst)
            })
        };
        for _ in 0..3 {
            std::thread::yield_now();
            written.fetch_add(1, Ordering::SeqCst);
            gate.written(1);
        }
        assert_eq!(reader.join().expect("reads"), 3);
    }

    #[test]
    fn an_update_that_failed_opens_the_gate_and_is_told_of_once() {
        let gate = Gate::new(1);
        let before = gate.begin();
        gate.close(0, 1);
        gate.end(Err(Error::Config("the disk is gone".into())));
        gate.pass(0);
        assert_eq!(gate.await_ended(before).map_err(|e| e.to_string()), Err("the disk is gone".into()));
        assert!(gate.await_all().is_ok());
    }
}
