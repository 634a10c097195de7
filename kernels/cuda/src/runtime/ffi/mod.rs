//! The driver's functions and the things it hands out, each owned by one value. All `unsafe` of the runtime is in here.
//!
//! # Invariants
//! - A handle is made by the driver, lives in exactly one owner ([`Context`], [`Memory`], …) and is given back when that is
//!   dropped. Owners keep their context alive, and the context keeps the library mapped.
//! - Every call makes the context the calling thread's current one first, so values may move between threads.
//! - Card memory is reached through the driver alone: Rust never holds a reference into it. Host memory that a copy in
//!   flight touches is not lent out before the copy's event has passed ([`super::host`]).

mod api;
mod memory;
mod work;

pub(crate) use memory::{HostMemory, Memory};
pub(crate) use work::{Argument, Event, Function, Graph, Grid, Module, Stream};

use super::Error;
use crate::driver::Driver;
use api::{Api, Handle};
use std::ffi::{CStr, c_int};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// A card's primary context.
pub(crate) struct Context {
    api: Api,
    handle: Handle,
    device: c_int,
    /// The first code that says the card is gone; 0 = none.
    lost: AtomicI32,
}

/// What the driver says about memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeMemory {
    /// Bytes nobody holds.
    pub free: u64,
    /// Bytes there are.
    pub total: u64,
}

impl Context {
    /// Retains the primary context of a card.
    pub fn new(driver: &Driver, ordinal: i32) -> Result<Arc<Self>, Error> {
        let api = Api::load(driver.path())?;
        let (mut device, mut handle) = (0, Handle::NULL);
        // SAFETY: places to write a number and a handle; the driver has been initialised by `Driver::open`.
        unsafe {
            checked(&api, "cuDeviceGet", (api.device_get)(&mut device, ordinal))?;
            checked(&api, "cuDevicePrimaryCtxRetain", (api.context_retain)(&mut handle, device))?;
        }
        Ok(Arc::new(Self { api, handle, device, lost: AtomicI32::new(0) }))
    }

    /// A property of the card, by the driver's number for it.
    pub fn attribute(&self, attribute: c_int) -> Result<i32, Error> {
        let mut value = 0;
        // SAFETY: an integer to write.
        self.check("cuDeviceGetAttribute", unsafe {
            (self.api.device_attribute)(&mut value, attribute, self.device)
        })?;
        Ok(value)
    }

    /// Free and whole memory of the card.
    pub fn memory(&self) -> Result<FreeMemory, Error> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two numbers to write, within a current context.
        self.check("cuMemGetInfo", unsafe { (self.api.memory_info)(&mut free, &mut total) })?;
        Ok(FreeMemory { free: free as u64, total: total as u64 })
    }

    /// Waits until everything sent to the card is done.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: no arguments; a context is current.
        self.check("cuCtxSynchronize", unsafe { (self.api.context_synchronize)() })
    }

    /// Makes this context the thread's current one.
    fn enter(&self) -> Result<(), Error> {
        if let code @ 1.. = self.lost.load(Ordering::Relaxed) {
            return Err(Error::Lost { call: "an earlier call", code, text: text(&self.api, code) });
        }
        // SAFETY: a live context.
        self.check("cuCtxSetCurrent", unsafe { (self.api.context_set)(self.handle) })
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        let result = checked(&self.api, call, code);
        if let Err(Error::Lost { code, .. }) = &result {
            self.lost.store(*code, Ordering::Relaxed);
        }
        result
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once; every owner of a handle has been dropped, since each keeps an `Arc` of this.
        unsafe { (self.api.context_release)(self.device) };
    }
}

/// Turns a result code into a sentence.
fn checked(api: &Api, call: &'static str, code: c_int) -> Result<(), Error> {
    match code {
        0 => Ok(()),
        // Unavailable; ECC; illegal address; timeout; destroyed; assertion; hardware stack, instruction, alignment,
        // address space, program counter; launch failure: nothing works on this context afterwards.
        46 | 214 | 700 | 702 | 709 | 710 | 714..=719 => {
            Err(Error::Lost { call, code, text: text(api, code) })
        }
        _ => Err(Error::Call { call, code, text: text(api, code) }),
    }
}

fn text(api: &Api, code: c_int) -> String {
    let mut text = std::ptr::null();
    // SAFETY: a place for a pointer to a text that lives as long as the driver; null for codes it does not know.
    unsafe {
        (api.error_string)(code, &mut text);
        if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

impl Api {
    fn load(path: &Path) -> Result<Self, Error> {
        // SAFETY: `Driver` has loaded the same library: it is a driver, and its initialisers have run.
        let library = unsafe { libloading::Library::new(path) };
        let library = library.map_err(|_| crate::driver::Error::missing(path))?;
        Ok(Self::of(library, &path.display().to_string())?)
    }
}
