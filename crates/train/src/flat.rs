//! Flat vectors in the precision the model is computed with, and tensors that borrow parts of them.

use crate::config::Compute;
use burn::tensor::{AllocationProperty, DType, Device, Tensor, TensorData};
use half::{bf16, f16};
use hearth_kernels::cpu::stored::narrow;
use std::ops::Range;

impl Compute {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Compute::F32 => 4,
            Compute::Bf16 | Compute::F16 => 2,
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

    pub(crate) fn len(&self) -> usize {
        match self {
            Flat::F32(values) => values.len(),
            Flat::Bf16(values) => values.len(),
            Flat::F16(values) => values.len(),
        }
    }

    /// Rounds `values` (to nearest, ties to even) into `start..`.
    pub(crate) fn write(&mut self, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        match self {
            Flat::F32(to) => to[range].copy_from_slice(values),
            Flat::Bf16(to) => narrow(values, &mut to[range]),
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
    pub(crate) fn part_mut(&mut self, range: Range<usize>) -> crate::optim::CopyOut<'_> {
        match self {
            Flat::F32(values) => crate::optim::CopyOut::F32(&mut values[range]),
            Flat::Bf16(values) => crate::optim::CopyOut::Bf16(&mut values[range]),
            Flat::F16(values) => crate::optim::CopyOut::F16(&mut values[range]),
        }
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
