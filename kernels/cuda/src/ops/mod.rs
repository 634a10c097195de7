//! The kernels as functions: one per entry, which checks shapes, chooses the grid and sends it to a stream.
//!
//! # Layout
//! - [`norm`], [`pointwise`], [`embedding`]: RMSNorm, RoPE, SwiGLU, dropout, rows of tables.
//! - [`quant`], [`gemm`], [`loss`]: products with quantized and dense matrices, cross-entropy.
//! - [`attention`], [`paged`]: over packed documents and through the paged KV cache.
//! - [`optimizer`], [`sampling`].
//!
//! # Invariants
//! - An op sends work and does not wait for it. Views are as long as the shape says; numbers fit the kernel's types.
//! - An op with no rows sends nothing.
//! - What lies *in* card memory is not checked: ids, block tables and tiles are the caller's to get right.

pub mod attention;
pub mod embedding;
pub mod gemm;
pub mod loss;
pub mod norm;
pub mod optimizer;
pub mod paged;
pub mod pointwise;
pub mod quant;
pub mod sampling;

use crate::runtime::ffi::{Argument, Grid};
use crate::runtime::{Error, View, ViewMut};
use bytemuck::Pod;

/// A type of numbers that kernels exist for.
pub trait Float: Pod {
    /// As kernels are named.
    const NAME: &'static str;
    /// Values per 16 bytes: what a thread reads at once.
    const WIDTH: usize = 16 / size_of::<Self>();
}

impl Float for f32 {
    const NAME: &'static str = "f32";
}
impl Float for half::bf16 {
    const NAME: &'static str = "bf16";
}
impl Float for half::f16 {
    const NAME: &'static str = "f16";
}

/// Something a kernel takes.
trait Pass {
    fn pass(&self) -> Argument;
}

impl<T: Pod> Pass for View<'_, T> {
    fn pass(&self) -> Argument {
        self.argument()
    }
}
impl<T: Pod> Pass for ViewMut<'_, T> {
    fn pass(&self) -> Argument {
        self.view().argument()
    }
}
/// Null for none.
impl<T: Pod> Pass for Option<View<'_, T>> {
    fn pass(&self) -> Argument {
        self.map_or(Argument::of(0u64), |view| view.argument())
    }
}
macro_rules! pass {
    ($($type:ty),*) => {$(
        impl Pass for $type {
            fn pass(&self) -> Argument {
                Argument::of(*self)
            }
        }
    )*};
}
pass!(i32, i64, u64, f32);

/// Arguments in the kernel's order.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        &[$($crate::ops::Pass::pass(&$argument)),*]
    };
}
use arguments;

/// An op's name, for what its checks say.
#[derive(Clone, Copy)]
struct Op(&'static str);

impl Op {
    /// Whether a view holds exactly what the shape asks for, where kernels can read whole vectors.
    fn takes<T: Pod>(self, argument: &'static str, view: &View<'_, T>, needed: usize) -> Result<(), Error> {
        if view.len() != needed {
            return Err(Error::Length { op: self.0, argument, len: view.len(), needed });
        }
        self.aligned(argument, view)
    }

    /// The same of a view that is written.
    fn gives<T: Pod>(
        self,
        argument: &'static str,
        view: &ViewMut<'_, T>,
        needed: usize,
    ) -> Result<(), Error> {
        self.takes(argument, &view.view(), needed)
    }

    /// Whether a view holds at least so much.
    fn holds<T: Pod>(self, argument: &'static str, view: &View<'_, T>, least: usize) -> Result<(), Error> {
        if view.len() < least {
            return Err(Error::Length { op: self.0, argument, len: view.len(), needed: least });
        }
        self.aligned(argument, view)
    }

    fn aligned<T: Pod>(self, argument: &'static str, view: &View<'_, T>) -> Result<(), Error> {
        match view.byte_offset() {
            offset if offset % 16 == 0 => Ok(()),
            offset => Err(Error::Alignment { op: self.0, argument, offset }),
        }
    }

    /// A number as kernels take it.
    fn int(self, argument: &'static str, value: usize) -> Result<i32, Error> {
        i32::try_from(value).map_err(|_| self.wrong(argument, value, "a number below 2147483648"))
    }

    /// How many rows of `width` a length is.
    fn rows(self, argument: &'static str, len: usize, width: usize) -> Result<usize, Error> {
        if width == 0 || !len.is_multiple_of(width) {
            return Err(self.wrong(argument, len, &format!("a multiple of {width}, above 0,")));
        }
        Ok(len / width)
    }

    fn wrong(self, argument: &'static str, value: usize, limit: &str) -> Error {
        Error::Value { op: self.0, argument, value, limit: limit.to_owned() }
    }

    /// Blocks by axis.
    fn grid(self, blocks: [usize; 3], threads: u32, shared_bytes: usize) -> Result<Grid, Error> {
        let limits = [i32::MAX as usize, 65535, 65535];
        let mut grid = Grid { blocks: [1; 3], threads, shared_bytes: shared_bytes as u32 };
        for axis in 0..3 {
            if blocks[axis] > limits[axis] {
                return Err(self.wrong(
                    "its grid",
                    blocks[axis],
                    &format!("at most {} blocks", limits[axis]),
                ));
            }
            grid.blocks[axis] = blocks[axis] as u32;
        }
        Ok(grid)
    }

    /// Blocks in a line.
    fn line(self, blocks: usize, threads: u32) -> Result<Grid, Error> {
        self.grid([blocks, 1, 1], threads, 0)
    }
}
