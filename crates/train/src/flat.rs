//! Flat vectors in the precision the model is computed with, and tensors that borrow parts of them.

use crate::config::Compute;
use crate::optim::CopyOut;
use burn::tensor::{AllocationProperty, DType, Device, Tensor, TensorData};
use half::{bf16, f16};
use hearth_kernels::cpu::halves::High;
use hearth_kernels::cpu::stored::{Stored, narrow, widen, widened};
use std::ops::Range;

impl Compute {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Compute::F32 => 4,
            Compute::Bf16 | Compute::F16 => 2,
        }
    }

    /// That of tensors of this type; everything that is not 16 bits wide is computed in f32.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::BF16 => Compute::Bf16,
            DType::F16 => Compute::F16,
            _ => Compute::F32,
        }
    }

    /// Burn's name for it.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Compute::F32 => DType::F32,
            Compute::Bf16 => DType::BF16,
            Compute::F16 => DType::F16,
        }
    }
}

/// Elements of one precision.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Flat {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Flat {
    pub(crate) fn zeros(compute: Compute, len: usize) -> Self {
        match compute {
            Compute::F32 => Flat::F32(vec![0.0; len]),
            Compute::Bf16 => Flat::Bf16(vec![bf16::ZERO; len]),
            Compute::F16 => Flat::F16(vec![f16::ZERO; len]),
        }
    }

    /// Nothing yet, with room for `len`.
    pub(crate) fn with_capacity(compute: Compute, len: usize) -> Self {
        match compute {
            Compute::F32 => Flat::F32(Vec::with_capacity(len)),
            Compute::Bf16 => Flat::Bf16(Vec::with_capacity(len)),
            Compute::F16 => Flat::F16(Vec::with_capacity(len)),
        }
    }

    /// A tensor's values, moved where that is possible.
    pub(crate) fn from_data(data: TensorData) -> Self {
        let readable = "a float tensor's data is readable";
        match data.dtype() {
            DType::BF16 => Flat::Bf16(data.try_into_vec().expect(readable)),
            DType::F16 => Flat::F16(data.try_into_vec().expect(readable)),
            _ => Flat::F32(data.try_into_vec_as().expect(readable)),
        }
    }

    /// Their precision.
    pub(crate) fn precision(&self) -> Compute {
        match self {
            Flat::F32(_) => Compute::F32,
            Flat::Bf16(_) => Compute::Bf16,
            Flat::F16(_) => Compute::F16,
        }
    }

    /// In f32, exactly; moved if they are.
    pub(crate) fn into_f32(self) -> Vec<f32> {
        match self {
            Flat::F32(values) => values,
            Flat::Bf16(values) => widened(&values),
            Flat::F16(values) => widened(&values),
        }
    }

    /// Values `range` in f32, by way of `scratch` unless they are in it.
    pub(crate) fn floats<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        let wide = match self {
            Flat::F32(values) => return &values[range],
            _ => &mut scratch[..range.len()],
        };
        match self {
            Flat::F32(_) => {}
            Flat::Bf16(values) => widen(&values[range], wide),
            Flat::F16(values) => widen(&values[range], wide),
        }
        wide
    }

    /// Puts values of the same or a lower precision at `start`. What comes in order is appended to what is there.
    pub(crate) fn put(&mut self, start: usize, values: &Flat) {
        match (self, values) {
            (Flat::F32(to), Flat::F32(from)) => put_same(to, start, from),
            (Flat::F32(to), Flat::Bf16(from)) => put(to, start, from, &Stored::widen_block),
            (Flat::F32(to), Flat::F16(from)) => put(to, start, from, &Stored::widen_block),
            (Flat::Bf16(to), Flat::Bf16(from)) => put_same(to, start, from),
            (Flat::F16(to), Flat::F16(from)) => put_same(to, start, from),
            (to, from) => panic!("{:?} do not become {:?} without loss", from.precision(), to.precision()),
        }
    }

    /// Zeros up to `len`.
    pub(crate) fn pad_to(&mut self, len: usize) {
        match self {
            Flat::F32(values) => values.resize(len, 0.0),
            Flat::Bf16(values) => values.resize(len, bf16::ZERO),
            Flat::F16(values) => values.resize(len, f16::ZERO),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Flat::F32(values) => values.len(),
            Flat::Bf16(values) => values.len(),
            Flat::F16(values) => values.len(),
        }
    }

    /// Rounds `values` to the nearest into `start..`: ties to even, and in bfloat16 away from zero, as an optimizer that
    /// keeps masters in [halves](hearth_kernels::cpu::halves) copies them.
    pub(crate) fn write(&mut self, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        match self {
            Flat::F32(to) => to[range].copy_from_slice(values),
            Flat::Bf16(to) => narrow(values, bytemuck::cast_slice_mut::<_, High>(&mut to[range])),
            Flat::F16(to) => narrow(values, &mut to[range]),
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Flat::F32(values) => bytemuck::cast_slice(values),
            Flat::Bf16(values) => bytemuck::cast_slice(values),
            Flat::F16(values) => bytemuck::cast_slice(values),
        }
    }

    pub(crate) fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Flat::F32(values) => bytemuck::cast_slice_mut(values),
            Flat::Bf16(values) => bytemuck::cast_slice_mut(values),
            Flat::F16(values) => bytemuck::cast_slice_mut(values),
        }
    }

    /// A part of it, in the words of an optimizer that writes the copy it computes with.
    pub(crate) fn part_mut(&mut self, range: Range<usize>) -> CopyOut<'_> {
        match self {
            Flat::F32(values) => CopyOut::F32(&mut values[range]),
            Flat::Bf16(values) => CopyOut::High(&mut values[range]),
            Flat::F16(values) => CopyOut::F16(&mut values[range]),
        }
    }
}

/// Elements that are converted at a time while they are appended: they stay in the first-level cache.
const APPENDED: usize = 2048;

/// [`put`] without a conversion.
fn put_same<T: Copy + Default>(to: &mut Vec<T>, start: usize, from: &[T]) {
    if to.len() < start {
        to.resize(start, T::default());
    }
    if to.len() == start {
        return to.extend_from_slice(from);
    }
    to.resize(to.len().max(start + from.len()), T::default());
    to[start..start + from.len()].copy_from_slice(from);
}

fn put<F, T: Copy + Default>(to: &mut Vec<T>, start: usize, from: &[F], convert: &dyn Fn(&[F], &mut [T])) {
    if to.len() < start {
        to.resize(start, T::default());
    }
    if to.len() > start {
        to.resize(to.len().max(start + from.len()), T::default());
        return convert(from, &mut to[start..start + from.len()]);
    }
    let mut block = [T::default(); APPENDED];
    for part in from.chunks(APPENDED) {
        convert(part, &mut block[..part.len()]);
        to.extend_from_slice(&block[..part.len()]);
    }
}

/// Bytes as the copy that an optimizer writes.
pub(crate) fn copy_out(compute: Compute, bytes: &mut [u8]) -> CopyOut<'_> {
    match compute {
        Compute::F32 => CopyOut::F32(bytemuck::cast_slice_mut(bytes)),
        Compute::Bf16 => CopyOut::High(bytemuck::cast_slice_mut(bytes)),
        Compute::F16 => CopyOut::F16(bytemuck::cast_slice_mut(bytes)),
    }
}

/// Bytes of values in f32, by way of `scratch` unless they are in it.
pub(crate) fn floats<'a>(precision: Compute, bytes: &'a [u8], scratch: &'a mut [f32]) -> &'a [f32] {
    if precision == Compute::F32 {
        return bytemuck::cast_slice(bytes);
    }
    let wide = &mut scratch[..bytes.len() / precision.bytes()];
    match precision {
        Compute::Bf16 => widen::<bf16>(bytemuck::cast_slice(bytes), wide),
        _ => widen::<f16>(bytemuck::cast_slice(bytes), wide),
    }
    wide
}

/// A part of a copy.
pub(crate) fn part_of<'a>(copy: &'a mut CopyOut<'_>, range: Range<usize>) -> CopyOut<'a> {
    match copy {
        CopyOut::F32(values) => CopyOut::F32(&mut values[range]),
        CopyOut::Bf16(values) => CopyOut::Bf16(&mut values[range]),
        CopyOut::F16(values) => CopyOut::F16(&mut values[range]),
        CopyOut::High(values) => CopyOut::High(&mut values[range]),
    }
}

impl AsRef<[u8]> for Flat {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// A tensor of the compute precision that borrows `bytes` on the CPU, or is copied to another device.
pub(crate) fn tensor<const D: usize>(
    bytes: bytes::Bytes,
    shape: [usize; D],
    compute: Compute,
    device: &Device,
) -> Tensor<D> {
    let bytes = burn::tensor::Bytes::from_shared(bytes, AllocationProperty::Native);
    let dtype = compute.dtype();
    Tensor::from_data(TensorData::from_bytes(bytes, shape, dtype), (device, dtype))
}
