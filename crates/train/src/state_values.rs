//! Numbers of one optimizer state, in memory and as a tile on a disk has them.

use crate::checkpoint;
use crate::optim::{StateDtype, Values};
use half::bf16;
use hearth_kernels::cpu::eight_bits::{BLOCK, Draws, EightBits};
use std::ops::Range;

/// Values of one optimizer state.
#[derive(Clone, Debug)]
pub(crate) enum StateValues {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F8 { codes: Vec<u8>, exponents: Vec<i8>, signed: bool },
}

impl StateValues {
    pub(crate) fn zeros(dtype: StateDtype, len: usize, signed: bool) -> Self {
        match dtype {
            StateDtype::F32 => StateValues::F32(vec![0.0; len]),
            StateDtype::Bf16 => StateValues::Bf16(vec![bf16::ZERO; len]),
            StateDtype::F8 => {
                StateValues::F8 { codes: vec![0; len], exponents: vec![0; len.div_ceil(BLOCK)], signed }
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            StateValues::F32(values) => values.len(),
            StateValues::Bf16(values) => values.len(),
            StateValues::F8 { codes, .. } => codes.len(),
        }
    }

    /// A part to be updated; one in 8 bits begins and ends as [`EightBits`] says.
    pub(crate) fn part_mut(&mut self, range: Range<usize>, draws: Draws) -> Values<'_> {
        match self {
            StateValues::F32(values) => Values::F32(&mut values[range]),
            StateValues::Bf16(values) => Values::Bf16(&mut values[range]),
            StateValues::F8 { codes, exponents, signed } => {
                let exponents = &mut exponents[range.start / BLOCK..range.end.div_ceil(BLOCK)];
                Values::F8(EightBits { codes: &mut codes[range], exponents, signed: *signed }, draws)
            }
        }
    }

    /// Sets elements `at..`.
    pub(crate) fn set(&mut self, at: usize, values: &[f32]) {
        let range = at..at + values.len();
        match self {
            StateValues::F32(to) => to[range].copy_from_slice(values),
            StateValues::Bf16(to) => {
                to[range].iter_mut().zip(values).for_each(|(to, value)| *to = bf16::from_f32(*value));
            }
            StateValues::F8 { codes, exponents, signed } => {
                EightBits { codes, exponents, signed: *signed }.write(at, values, None);
            }
        }
    }

    /// Elements `at..` as a checkpoint has them, as many as `out` takes.
    pub(crate) fn read(&self, at: usize, out: &mut [u8]) {
        match self {
            StateValues::F32(values) => {
                out.copy_from_slice(&bytemuck::cast_slice(values)[4 * at..][..out.len()]);
            }
            StateValues::Bf16(values) => {
                out.copy_from_slice(&bytemuck::cast_slice(values)[2 * at..][..out.len()]);
            }
            StateValues::F8 { codes, exponents, signed } => {
                let range = at..at + out.len() / 2;
                let exponents = &exponents[range.start / BLOCK..range.end.div_ceil(BLOCK)];
                read_f8(&codes[range], exponents, *signed, out);
            }
        }
    }
}

/// Blocks in 8 bits as bfloat16, which holds them exactly.
fn read_f8(codes: &[u8], exponents: &[i8], signed: bool, out: &mut [u8]) {
    let mut values = [0.0; BLOCK];
    for ((codes, exponent), out) in codes.chunks(BLOCK).zip(exponents).zip(out.chunks_mut(2 * BLOCK)) {
        let values = &mut values[..codes.len()];
        hearth_kernels::cpu::eight_bits::read(codes, &[*exponent], signed, values);
        for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
            *out = bf16::from_f32(*value).to_le_bytes();
        }
    }
}

/// How one state of a tile lies in its bytes: elements, in 8 bits followed by their exponents.
#[derive(Clone, Copy)]
pub(crate) struct OnDisk {
    pub(crate) dtype: StateDtype,
    pub(crate) signed: bool,
    /// Elements of the tile.
    pub(crate) len: usize,
}

impl OnDisk {
    /// The bytes of a tile's state, to be updated.
    pub(crate) fn values<'b>(&self, bytes: &'b mut [u8], draws: Draws) -> Values<'b> {
        let bytes = &mut bytes[..self.dtype.bytes_of(self.len)];
        match self.dtype {
            StateDtype::F32 => Values::F32(bytemuck::cast_slice_mut(bytes)),
            StateDtype::Bf16 => Values::Bf16(bytemuck::cast_slice_mut(bytes)),
            StateDtype::F8 => {
                let (codes, exponents) = bytes.split_at_mut(self.len);
                let exponents = bytemuck::cast_slice_mut(exponents);
                Values::F8(EightBits { codes, exponents, signed: self.signed }, draws)
            }
        }
    }

    /// Where elements `range` of the tile lie in its bytes: one or two parts.
    pub(crate) fn parts(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let width = match self.dtype {
            StateDtype::F32 => size_of::<f32>(),
            StateDtype::Bf16 => size_of::<bf16>(),
            StateDtype::F8 => {
                let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
                return vec![range.clone(), self.len + blocks.start..self.len + blocks.end];
            }
        };
        std::iter::once(width * range.start..width * range.end).collect()
    }

    /// What those parts hold when the elements are `values`.
    pub(crate) fn encode(&self, values: &[f32]) -> Vec<Vec<u8>> {
        let mut held = StateValues::zeros(self.dtype, values.len(), self.signed);
        held.set(0, values);
        match held {
            StateValues::F32(values) => vec![bytemuck::cast_slice(&values).to_vec()],
            StateValues::Bf16(values) => vec![bytemuck::cast_slice(&values).to_vec()],
            StateValues::F8 { codes, exponents, .. } => {
                vec![codes, exponents.into_iter().map(|exponent| exponent as u8).collect()]
            }
        }
    }

    /// The elements that parts hold, as a checkpoint has them.
    pub(crate) fn decode(&self, parts: &[Vec<u8>], out: &mut [u8]) {
        match parts {
            [codes, exponents] => read_f8(codes, bytemuck::cast_slice(exponents), self.signed, out),
            parts => out.copy_from_slice(&parts[0]),
        }
    }
}

impl StateDtype {
    /// How checkpoints store it: so that nothing is lost.
    pub(crate) fn saved(self) -> checkpoint::StateDtype {
        match self {
            StateDtype::F32 => checkpoint::StateDtype::F32,
            StateDtype::Bf16 | StateDtype::F8 => checkpoint::StateDtype::Bf16,
        }
    }
}
