//! What the safetensors files of a checkpoint look like, before a byte of them is written.
//!
//! ```text
//! u64 header length | JSON header, space-padded so that the data begins at a multiple of 4096 | data
//! ```
//! The data is the tensors one after another, in the order they are given: for the masters this is the flat vector
//! of all trained parameters in execution order, for the optimizer its first state's flat vector, then the next's.
//! So a place in a flat vector is a place in the file, whoever owns it.

use serde_json::{Map, Value, json};
use std::ops::Range;

/// The data of every file begins at a multiple of this: a page, and a block of any disk.
pub const DATA_ALIGNMENT: u64 = 4096;

/// How a number of the training state is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDtype {
    /// 32-bit IEEE.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE: never a run's state, but what an export may be asked for.
    F16,
}

impl StateDtype {
    /// Bytes of one number.
    pub fn bytes(self) -> u64 {
        match self {
            StateDtype::F32 => 4,
            StateDtype::Bf16 | StateDtype::F16 => 2,
        }
    }

    /// Its name in a safetensors header.
    fn name(self) -> &'static str {
        match self {
            StateDtype::F32 => "F32",
            StateDtype::Bf16 => "BF16",
            StateDtype::F16 => "F16",
        }
    }
}

/// One tensor of the training state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateTensor {
    /// Name in the file.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// How its numbers are stored.
    pub dtype: StateDtype,
}

impl StateTensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|dim| *dim as u64).product()
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bytes()
    }
}

/// One safetensors file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFile {
    /// Plain file name.
    pub name: String,
    /// Its tensors, in the order of their data. Names differ.
    pub tensors: Vec<StateTensor>,
}

impl StateFile {
    /// Everything in the file before its data. It depends on names, shapes and dtypes alone.
    pub fn header(&self) -> Vec<u8> {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({ "format": "pt" }));
        for (tensor, range) in self.tensors.iter().zip(self.ranges()) {
            let (dtype, shape) = (tensor.dtype.name(), &tensor.shape);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [range.start, range.end]});
            let before = entries.insert(tensor.name.clone(), entry);
            assert!(before.is_none(), "{} stands twice in {}", tensor.name, self.name);
        }
        let mut text = serde_json::to_vec(&Value::Object(entries)).expect("a JSON map serialises");
        text.resize((8 + text.len()).next_multiple_of(DATA_ALIGNMENT as usize) - 8, b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        header
    }

    /// Where each tensor lies in the data, in order.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut end = 0;
        let place = |tensor: &StateTensor| {
            let start = end;
            end += tensor.bytes();
            start..end
        };
        self.tensors.iter().map(place).collect()
    }

    /// Bytes of the data.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(StateTensor::bytes).sum()
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.data_start() + self.data_bytes()
    }

    /// Where the data begins in the file.
    pub fn data_start(&self) -> u64 {
        self.header().len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn tensor(name: &str, shape: &[usize], dtype: StateDtype) -> StateTensor {
        StateTensor { name: name.into(), shape: shape.to_vec(), dtype }
    }

    #[test]
    fn any_reader_of_safetensors_finds_the_tensors_where_the_layout_says() {
        for count in [0, 1, 2, 37, 400] {
            let one = |i: usize| {
                let dtype = if i.is_multiple_of(2) { StateDtype::F32 } else { StateDtype::Bf16 };
                tensor(&format!("model.layers.{i}.weight"), &[i % 5, 3], dtype)
            };
            let file = StateFile { name: "x.safetensors".into(), tensors: (0..count).map(one).collect() };
            let mut bytes = file.header();
            assert_eq!(bytes.len() as u64 % DATA_ALIGNMENT, 0);
            bytes.resize(file.file_bytes() as usize, 7);
            let (header, metadata) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
            assert_eq!(header as u64 + 8, file.data_start());
            for (tensor, range) in file.tensors.iter().zip(file.ranges()) {
                let info = metadata.info(&tensor.name).expect("is there");
                assert_eq!(info.shape, tensor.shape);
                assert_eq!(info.data_offsets, (range.start as usize, range.end as usize));
            }
        }
    }

    #[test]
    #[should_panic(expected = "m.a stands twice in optimizer.safetensors")]
    fn two_tensors_of_one_name_are_a_bug() {
        let tensors = vec![tensor("m.a", &[1], StateDtype::F32); 2];
        StateFile { name: "optimizer.safetensors".into(), tensors }.header();
    }
}
