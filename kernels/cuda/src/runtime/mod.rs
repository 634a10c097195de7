//! Memory, streams and code on a card, through the driver found at run time.
//!
//! # Layout
//! - [`device`]: [`Device`], an opened card with its ledger.
//! - [`buffer`]: [`DeviceBuffer`] and the views of it that kernels take; every byte is charged before it is allocated.
//! - [`host`]: [`PinnedBuffer`], host memory that copies run from and to.
//! - [`stream`]: [`Stream`], [`Event`], [`Recorded`] work.
//! - [`ring`]: [`Ring`], slots that data streams through from the host while kernels compute.
//! - `code`: kernels by name, compiled when first used.
//! - `ffi`: the driver's functions; all `unsafe` is there.

pub mod buffer;
pub mod device;
pub mod host;
pub mod ring;
pub mod stream;

mod code;
mod error;
pub(crate) mod ffi;

pub use buffer::{DeviceBuffer, View, ViewMut};
pub use device::{Device, Libraries};
pub use error::Error;
pub use ffi::FreeMemory;
pub use host::PinnedBuffer;
pub use ring::Ring;
pub use stream::{Event, Recorded, Stream};
