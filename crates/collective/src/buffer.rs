//! Buffers that an operation owns while it runs.

use std::any::Any;

use bytemuck::Pod;

mod sealed {
    pub trait Sealed {}
    impl<T> Sealed for Vec<T> {}
}

/// Elements of any plain type, seen as bytes. Every `Vec` of plain elements is one, and nothing else is.
///
/// An operation takes its buffers by value: ranks that are threads then read each other's memory without a copy, and a
/// backend that gives up in the middle can leave the memory to the transfer that may still write to it.
pub trait Buffer: sealed::Sealed + Any + Send + Sync {
    /// The elements as bytes. The address stays the same for as long as the buffer lives.
    fn bytes(&self) -> &[u8];

    /// The elements as bytes, to be written.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl<T: Pod + Send + Sync> Buffer for Vec<T> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self)
    }
}

/// The elements of `buffer`.
///
/// # Panics
/// If they are not of type `T`.
pub fn into_vec<T: Pod + Send + Sync>(buffer: Box<dyn Buffer>) -> Vec<T> {
    let buffer: Box<dyn Any> = buffer;
    *buffer.downcast().expect("a buffer comes back with the type it was given with")
}

/// `count` elements that are all zero bits.
pub fn zeroed<T: Pod>(count: usize) -> Vec<T> {
    bytemuck::zeroed_vec(count)
}
