//! An opened card.

use super::code::Code;
use super::ffi::{Context, FreeMemory};
use super::{Error, Stream};
use crate::cache::Cache;
use crate::driver::{Card, Driver};
use hearth_memory::Ledger;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where driver and compiler are, and where compiled kernels are kept.
#[derive(Clone, Debug, Default)]
pub struct Libraries {
    /// The driver; `None`: what the system has.
    pub driver: Option<PathBuf>,
    /// NVRTC; `None`: what the system has.
    pub nvrtc: Option<PathBuf>,
    /// `None`: every process compiles.
    pub cache: Option<Cache>,
}

impl Libraries {
    /// What the system has, and the user's cache.
    pub fn of_system() -> Self {
        Self { cache: Cache::of_user(), ..Self::default() }
    }

    fn open_driver(&self) -> Result<Driver, crate::driver::Error> {
        match &self.driver {
            Some(path) => Driver::open_at(path),
            None => Driver::open(),
        }
    }
}

/// A card that holds memory and runs kernels. Whatever is made from it keeps it open.
pub struct Device {
    pub(super) context: Arc<Context>,
    pub(super) code: Code,
    card: Card,
    ledger: Ledger,
}

impl Device {
    /// Opens a card with what the system has. The ledger's device tier is this card's budget.
    ///
    /// # Errors
    /// One sentence each for no driver, too old a one, no such card and a card that is too old.
    pub fn open(ordinal: usize, ledger: &Ledger) -> Result<Arc<Self>, Error> {
        Self::open_with(ordinal, ledger, &Libraries::of_system())
    }

    /// As [`Self::open`], with these libraries.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(ordinal: usize, ledger: &Ledger, libraries: &Libraries) -> Result<Arc<Self>, Error> {
        let driver = libraries.open_driver()?;
        let mut cards = driver.cards()?;
        if ordinal >= cards.len() {
            return Err(Error::NoSuchCard { ordinal, count: cards.len() });
        }
        let card = cards.swap_remove(ordinal);
        if !card.is_supported() {
            let (major, minor) = card.capability;
            return Err(Error::Unsupported { name: card.name, major, minor });
        }
        let context = Context::new(&driver, ordinal as i32)?;
        let code = Code::new(card.capability, libraries.nvrtc.clone(), libraries.cache.clone());
        Ok(Arc::new(Self { context, code, card, ledger: ledger.clone() }))
    }

    /// What the driver said of it when it was opened.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// What its memory is charged to.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Its memory, ours and others'.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn memory(&self) -> Result<FreeMemory, Error> {
        self.context.memory()
    }

    /// Bytes per second that its memory moves by its clock and bus width.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver does not tell.
    pub fn nominal_bandwidth(&self) -> Result<f64, Error> {
        // CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE in kHz, …_GLOBAL_MEMORY_BUS_WIDTH in bits; two transfers per clock.
        let (khz, bits) = (self.context.attribute(36)?, self.context.attribute(37)?);
        Ok(2.0 * f64::from(khz) * 1e3 * f64::from(bits) / 8.0)
    }

    /// How many multiprocessors it has.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn multiprocessors(&self) -> Result<usize, Error> {
        Ok(usize::try_from(self.context.attribute(16)?).unwrap_or(1))
    }

    /// A new order of work.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Call`].
    pub fn stream(self: &Arc<Self>) -> Result<Stream, Error> {
        Stream::new(self)
    }

    /// Waits until everything sent to the card is done.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Call`].
    pub fn synchronize(&self) -> Result<(), Error> {
        self.context.synchronize()
    }

    /// The driver's file, for what a report says.
    pub fn driver_version(libraries: &Libraries) -> Result<(i32, i32), Error> {
        Ok(libraries.open_driver()?.version()?)
    }
}

/// `cuda:1` is 1, `cuda` is 0.
pub fn ordinal_of(device: &str) -> Option<usize> {
    match device.strip_prefix("cuda")? {
        "" => Some(0),
        rest => rest.strip_prefix(':')?.parse().ok(),
    }
}

/// Where a library lies, for tests that bring their own.
impl From<&Path> for Libraries {
    fn from(both: &Path) -> Self {
        Self { driver: Some(both.to_owned()), nvrtc: Some(both.to_owned()), cache: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_names_its_card() {
        assert_eq!(["cuda", "cuda:0", "cuda:3"].map(ordinal_of), [Some(0), Some(0), Some(3)]);
        assert_eq!(["cpu", "cuda:", "cuda:-1", "cuda1"].map(ordinal_of), [None; 4]);
    }
}
