//! Memory on the card, and the parts of it that kernels take.

use super::ffi::{Argument, Memory};
use super::{Device, Error, Stream};
use bytemuck::Pod;
use hearth_memory::{Charge, Kind, Tier};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// `len` elements on the card, charged to its ledger.
pub struct DeviceBuffer<T> {
    // Freed before the charge is given back.
    memory: Memory,
    len: usize,
    _charge: Charge,
    _device: Arc<Device>,
    _element: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// Charges, then allocates. The contents are whatever was there.
    ///
    /// # Errors
    /// [`Error::Budget`] before anything is allocated, [`Error::OutOfMemory`] when the card is full all the same.
    pub fn new(device: &Arc<Device>, kind: Kind, len: usize) -> Result<Self, Error> {
        let bytes = len.saturating_mul(size_of::<T>());
        let charge = device.ledger().charge(Tier::Device, kind, bytes as u64)?;
        let memory = Memory::new(&device.context, bytes)?;
        Ok(Self { memory, len, _charge: charge, _device: device.clone(), _element: PhantomData })
    }

    /// A copy of what the host has.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn from_host(stream: &Stream, kind: Kind, values: &[T]) -> Result<Self, Error> {
        let mut buffer = Self::new(stream.device(), kind, values.len())?;
        buffer.write(stream, values)?;
        Ok(buffer)
    }

    /// Zeros.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn zeros(stream: &Stream, kind: Kind, len: usize) -> Result<Self, Error> {
        let mut buffer = Self::new(stream.device(), kind, len)?;
        buffer.all_mut().clear(stream)?;
        Ok(buffer)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Overwrites the first elements with the host's. Waits.
    ///
    /// # Errors
    /// [`Error::Range`] when there are more, [`Error::Lost`].
    pub fn write(&mut self, stream: &Stream, values: &[T]) -> Result<(), Error> {
        self.part(0..values.len())?;
        self.memory.write(0, bytemuck::cast_slice(values), stream.raw())
    }

    /// A copy of the first elements, after everything the stream was sent.
    ///
    /// # Errors
    /// [`Error::Range`] when there are fewer, [`Error::Lost`].
    pub fn read(&self, stream: &Stream, into: &mut [T]) -> Result<(), Error> {
        self.part(0..into.len())?;
        self.memory.read(0, bytemuck::cast_slice_mut(into), stream.raw())
    }

    /// All elements, on the host.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn to_host(&self, stream: &Stream) -> Result<Vec<T>, Error> {
        let mut all = vec![T::zeroed(); self.len];
        self.read(stream, &mut all)?;
        Ok(all)
    }

    /// Copies another buffer's elements to the start of this one, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Range`] when there are more, [`Error::Lost`].
    pub fn copy_from(&mut self, stream: &Stream, from: &DeviceBuffer<T>) -> Result<(), Error> {
        self.part(0..from.len)?;
        self.memory.copy(0, &from.memory, 0, from.len * size_of::<T>(), stream.raw())
    }

    /// Everything, to read.
    pub fn all(&self) -> View<'_, T> {
        View { memory: &self.memory, offset: 0, len: self.len, _element: PhantomData }
    }

    /// Everything, to write.
    pub fn all_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut(View { memory: &self.memory, offset: 0, len: self.len, _element: PhantomData })
    }

    /// A part, to read.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn part(&self, range: Range<usize>) -> Result<View<'_, T>, Error> {
        self.all().part(range)
    }

    /// A part, to write.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn part_mut(&mut self, range: Range<usize>) -> Result<ViewMut<'_, T>, Error> {
        Ok(ViewMut(self.all().part(range)?))
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }
}

/// Consecutive elements that a kernel reads.
pub struct View<'a, T> {
    memory: &'a Memory,
    /// In bytes.
    offset: usize,
    len: usize,
    _element: PhantomData<T>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<'a, T: Pod> View<'a, T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn part(&self, range: Range<usize>) -> Result<View<'a, T>, Error> {
        if range.start > range.end || range.end > self.len {
            return Err(Error::Range { from: range.start, to: range.end, len: self.len });
        }
        let offset = self.offset + range.start * size_of::<T>();
        Ok(View { offset, len: range.len(), ..*self })
    }

    /// A copy of them on the host, after everything the stream was sent.
    ///
    /// # Errors
    /// [`Error::Range`] when there are more or fewer, [`Error::Lost`].
    pub fn read(&self, stream: &Stream, into: &mut [T]) -> Result<(), Error> {
        if into.len() != self.len {
            return Err(Error::Range { from: 0, to: into.len(), len: self.len });
        }
        self.memory.read(self.offset, bytemuck::cast_slice_mut(into), stream.raw())
    }

    /// The same bytes as elements of another type.
    ///
    /// # Errors
    /// [`Error::Range`] when they are no whole number of them.
    pub fn cast<U: Pod>(self) -> Result<View<'a, U>, Error> {
        let bytes = self.len * size_of::<T>();
        let len = bytes / size_of::<U>();
        if len * size_of::<U>() != bytes || !self.offset.is_multiple_of(align_of::<U>()) {
            return Err(Error::Range { from: self.offset, to: self.offset + bytes, len: size_of::<U>() });
        }
        Ok(View { memory: self.memory, offset: self.offset, len, _element: PhantomData })
    }

    /// Where it begins in its buffer.
    pub(crate) fn byte_offset(&self) -> usize {
        self.offset
    }

    pub(crate) fn argument(&self) -> Argument {
        Argument::memory(self.memory, self.offset)
    }
}

/// Consecutive elements that a kernel writes. Nobody else borrows the buffer meanwhile.
pub struct ViewMut<'a, T>(View<'a, T>);

impl<'a, T: Pod> ViewMut<'a, T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The same elements for a shorter time.
    pub fn again(&mut self) -> ViewMut<'_, T> {
        ViewMut(self.0)
    }

    /// Overwrites them with the host's. Waits.
    ///
    /// # Errors
    /// [`Error::Range`] when there are more or fewer, [`Error::Lost`].
    pub fn write(&mut self, stream: &Stream, values: &[T]) -> Result<(), Error> {
        if values.len() != self.0.len {
            return Err(Error::Range { from: 0, to: values.len(), len: self.0.len });
        }
        self.0.memory.write(self.0.offset, bytemuck::cast_slice(values), stream.raw())
    }

    /// Zeros everything, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn clear(&mut self, stream: &Stream) -> Result<(), Error> {
        let View { memory, offset, len, .. } = self.0;
        memory.fill(offset, len * size_of::<T>(), 0, stream.raw())
    }

    /// The same bytes as elements of another type.
    ///
    /// # Errors
    /// [`Error::Range`] when they are no whole number of them.
    pub fn cast<U: Pod>(self) -> Result<ViewMut<'a, U>, Error> {
        Ok(ViewMut(self.0.cast()?))
    }

    /// Copies another buffer's elements here, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Range`] when there are more or fewer, [`Error::Lost`].
    pub fn copy_from(&mut self, stream: &Stream, from: View<'_, T>) -> Result<(), Error> {
        if from.len != self.0.len {
            return Err(Error::Range { from: 0, to: from.len, len: self.0.len });
        }
        let to = &self.0;
        to.memory.copy(to.offset, from.memory, from.offset, from.len * size_of::<T>(), stream.raw())
    }

    pub(crate) fn view(&self) -> View<'a, T> {
        self.0
    }
}
