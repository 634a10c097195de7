//! The order of work on a card.

use super::ffi::{self, Argument, Grid};
use super::{Device, Error};
use std::sync::Arc;

/// Work that happens in the order it was sent. Streams wait for each other through events alone.
pub struct Stream {
    raw: ffi::Stream,
    device: Arc<Device>,
}

impl Stream {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, Error> {
        Ok(Self { raw: ffi::Stream::new(&device.context)?, device: device.clone() })
    }

    /// Its card.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Waits until everything sent is done.
    ///
    /// # Errors
    /// [`Error::Lost`]: what was sent earlier may have failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.raw.synchronize()
    }

    /// What is sent from now on waits for what the event marks.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn wait(&self, event: &Event) -> Result<(), Error> {
        self.raw.wait(&event.0)
    }

    /// Records what `send` sends, to be sent again at the cost of one launch: a CUDA graph. Nothing happens yet. Copies from
    /// and to the host cannot be part of it, nor kernels that were never launched before: compiling them is not work.
    ///
    /// # Errors
    /// Those of `send`, [`Error::Capturing`], [`Error::Lost`].
    pub fn record(&self, send: impl FnOnce() -> Result<(), Error>) -> Result<Recorded, Error> {
        Ok(Recorded(self.raw.capture(send)?))
    }

    /// Sends recorded work. It goes to the memory it was recorded with, which must still be there.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn replay(&self, recorded: &Recorded) -> Result<(), Error> {
        self.raw.replay(&recorded.0)
    }

    /// Sends the kernel `name` of a file.
    pub(crate) fn launch(
        &self,
        file: &'static str,
        name: &str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), Error> {
        let function = self.device.code.function(&self.device.context, file, name)?;
        self.raw.launch(&function, grid, arguments)
    }

    pub(super) fn raw(&self) -> &ffi::Stream {
        &self.raw
    }
}

/// A point in a stream.
pub struct Event(ffi::Event);

impl Event {
    /// One that marks nothing yet: waiting for it is no wait.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Call`].
    pub fn new(device: &Arc<Device>) -> Result<Self, Error> {
        Ok(Self(ffi::Event::new(&device.context, false)?))
    }

    /// One that takes the time when it passes.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Call`].
    pub fn timed(device: &Arc<Device>) -> Result<Self, Error> {
        Ok(Self(ffi::Event::new(&device.context, true)?))
    }

    /// Marks everything the stream was sent so far.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        self.0.record(&stream.raw)
    }

    /// Waits until what it marks is done.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn synchronize(&self) -> Result<(), Error> {
        self.0.synchronize()
    }

    /// Seconds from this timed event to a later one, on the card's clock.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Call`] when one of them marks nothing.
    pub fn seconds_to(&self, later: &Event) -> Result<f64, Error> {
        Ok(f64::from(self.0.milliseconds_to(&later.0)?) / 1e3)
    }
}

/// Work that can be sent again.
pub struct Recorded(ffi::Graph);
