//! Reading any range of a checkpoint's state into the layout and dtype a run wants.

use super::{StateDtype, StateFile, StateTensor};
use crate::Error;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Largest header read: the limit of the safetensors format.
const HEADER_LIMIT: u64 = 100_000_000;

/// Numbers converted at a time.
const CHUNK: usize = 1 << 16;

/// One state file, open for reading ranges. Holds no tensor in memory.
#[derive(Debug)]
pub struct StateReader {
    path: PathBuf,
    file: File,
    wanted: StateFile,
    /// Beside the wanted tensors.
    places: Vec<Place>,
    scratch: Vec<u8>,
}

/// Where a wanted tensor is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// First element in the flat vector of all wanted tensors.
    element: u64,
    /// First byte in the data that is wanted.
    byte: u64,
    /// First byte in the file that is there.
    stored_at: u64,
    /// How it is stored there.
    stored: StateDtype,
}

impl StateReader {
    pub(super) fn open(checkpoint: &Path, wanted: &StateFile) -> Result<Self, Error> {
        let path = checkpoint.join(&wanted.name);
        let mut file = File::open(&path).map_err(Error::io(&path))?;
        let (data_start, metadata) = read_header(&mut file)
            .map_err(|why| Error::damaged(checkpoint, format!("{} {why}", wanted.name)))?;
        let foreign = |why: String| {
            let why = format!("its {} {why}", wanted.name);
            Error::Foreign { path: checkpoint.to_owned(), why }
        };
        let (mut element, mut byte) = (0, 0);
        let mut places = Vec::with_capacity(wanted.tensors.len());
        for tensor in &wanted.tensors {
            let info = metadata
                .info(&tensor.name)
                .ok_or_else(|| foreign(format!("has no {}, which this run needs", tensor.name)))?;
            let stored = matching(tensor, info).map_err(foreign)?;
            let stored_at = data_start + info.data_offsets.0 as u64;
            places.push(Place { element, byte, stored_at, stored });
            element += tensor.elements();
            byte += tensor.bytes();
        }
        if metadata.tensors().len() > wanted.tensors.len() {
            let known = |name: &String| wanted.tensors.iter().any(|tensor| tensor.name == *name);
            let extra = metadata.offset_keys().into_iter().find(|name| !known(name)).unwrap_or_default();
            return Err(foreign(format!("has {extra}, which this run does not")));
        }
        Ok(Self { path, file, wanted: wanted.clone(), places, scratch: Vec::new() })
    }

    /// Bytes of the data as it is wanted.
    pub fn len(&self) -> u64 {
        self.wanted.data_bytes()
    }

    /// Whether there is no data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tensors as they are wanted, in order.
    pub fn tensors(&self) -> &[StateTensor] {
        &self.wanted.tensors
    }

    /// Reads the data from `offset` on, as [`StateFile::ranges`] of the wanted layout places it: little-endian
    /// numbers in the wanted dtypes. Both ends lie between numbers and within the data.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        assert!(offset + out.len() as u64 <= self.len(), "{}: read beyond its end", self.wanted.name);
        let mut tensor = self.places.partition_point(|place| place.byte <= offset).saturating_sub(1);
        let (mut at, mut rest) = (offset, out);
        while !rest.is_empty() {
            let (place, wanted) = (self.places[tensor], self.wanted.tensors[tensor].dtype);
            let within = at - place.byte;
            let len = (self.wanted.tensors[tensor].bytes() - within).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(len as usize);
            if place.stored == wanted {
                self.fetch(place.stored_at + within, now)?;
            } else {
                let size = wanted.bytes();
                assert!(within.is_multiple_of(size) && len.is_multiple_of(size), "a read splits a number");
                self.convert(place, within / size, wanted, now)?;
            }
            (at, rest, tensor) = (at + len, later, tensor + 1);
        }
        Ok(())
    }

    /// Reads elements of the flat vector of all tensors, from `first` on, as f32.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_f32(&mut self, first: u64, out: &mut [f32]) -> Result<(), Error> {
        let elements: u64 = self.wanted.tensors.iter().map(StateTensor::elements).sum();
        assert!(first + out.len() as u64 <= elements, "{}: read beyond its end", self.wanted.name);
        let mut tensor = self.places.partition_point(|place| place.element <= first).saturating_sub(1);
        let (mut at, mut rest) = (first, out);
        while !rest.is_empty() {
            let place = self.places[tensor];
            let within = at - place.element;
            let len = (self.wanted.tensors[tensor].elements() - within).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(len as usize);
            self.decode(place, within, now)?;
            (at, rest, tensor) = (at + len, later, tensor + 1);
        }
        Ok(())
    }

    /// Elements of one tensor, in another dtype than they are stored in.
    fn convert(&mut self, place: Place, first: u64, wanted: StateDtype, out: &mut [u8]) -> Result<(), Error> {
        let mut values = vec![0.0; CHUNK.min(out.len() / wanted.bytes() as usize)];
        let mut at = first;
        for out in out.chunks_mut(CHUNK * wanted.bytes() as usize) {
            let values = &mut values[..out.len() / wanted.bytes() as usize];
            self.decode(place, at, values)?;
            encode(values, wanted, out);
            at += values.len() as u64;
        }
        Ok(())
    }

    /// Elements of one tensor as f32.
    fn decode(&mut self, place: Place, first: u64, out: &mut [f32]) -> Result<(), Error> {
        let mut at = place.stored_at + first * place.stored.bytes();
        for out in out.chunks_mut(CHUNK) {
            let mut bytes = std::mem::take(&mut self.scratch);
            bytes.resize(out.len() * place.stored.bytes() as usize, 0);
            self.fetch(at, &mut bytes)?;
            decode(&bytes, place.stored, out);
            at += bytes.len() as u64;
            self.scratch = bytes;
        }
        Ok(())
    }

    fn fetch(&mut self, at: u64, out: &mut [u8]) -> Result<(), Error> {
        let file = &mut self.file;
        let read = file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(out));
        read.map_err(Error::io(&self.path))
    }
}

/// Where the data begins, and what is in it. Lengths are checked before anything is allocated.
fn read_header(file: &mut File) -> Result<(u64, Metadata), String> {
    let said = |e: io::Error| e.to_string();
    let len = file.metadata().map_err(said)?.len();
    let mut word = [0; 8];
    file.read_exact(&mut word).map_err(|_| format!("has {len} bytes, too few for a header"))?;
    let header = u64::from_le_bytes(word);
    if header > HEADER_LIMIT.min(len - 8) {
        return Err(format!("says its header has {header} bytes; the file has {len}"));
    }
    let mut text = vec![0; header as usize];
    file.read_exact(&mut text).map_err(said)?;
    let metadata: Metadata =
        serde_json::from_slice(&text).map_err(|e| format!("has a wrong safetensors header: {e}"))?;
    let (start, data) = (8 + header, metadata.data_len() as u64);
    if start.checked_add(data) != Some(len) {
        return Err(format!("has {} bytes of data, its header says {data}", len - start));
    }
    Ok((start, metadata))
}

/// How the tensor is stored, if it is the one wanted.
fn matching(wanted: &StateTensor, found: &TensorInfo) -> Result<StateDtype, String> {
    let name = &wanted.name;
    if found.shape != wanted.shape {
        return Err(format!("has {name} as {:?}, this run needs {:?}", found.shape, wanted.shape));
    }
    dtype(name, found)
}

fn dtype(name: &str, found: &TensorInfo) -> Result<StateDtype, String> {
    match found.dtype {
        Dtype::F32 => Ok(StateDtype::F32),
        Dtype::BF16 => Ok(StateDtype::Bf16),
        Dtype::F16 => Ok(StateDtype::F16),
        other => Err(format!("has {name} as {other:?}; hearth reads F32, BF16 and F16")),
    }
}

/// The tensors of a file, as it says itself.
pub(super) fn stored(checkpoint: &Path, name: &str) -> Result<StateFile, Error> {
    let path = checkpoint.join(name);
    let mut file = File::open(&path).map_err(Error::io(&path))?;
    let damaged = |why| Error::damaged(checkpoint, format!("{name} {why}"));
    let (_, metadata) = read_header(&mut file).map_err(damaged)?;
    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        let dtype = dtype(&name, info).map_err(damaged)?;
        tensors.push(StateTensor { name, shape: info.shape.clone(), dtype });
    }
    Ok(StateFile { name: name.into(), tensors })
}

/// Little-endian numbers to f32, exactly.
fn decode(bytes: &[u8], dtype: StateDtype, out: &mut [f32]) {
    match dtype {
        StateDtype::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        StateDtype::Bf16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        StateDtype::F16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

/// f32 to little-endian numbers; to 16 bits rounded to the nearest, ties to even.
fn encode(values: &[f32], dtype: StateDtype, out: &mut [u8]) {
    match dtype {
        StateDtype::F32 => {
            for (value, bytes) in values.iter().zip(out.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
        }
        StateDtype::Bf16 => {
            for (value, bytes) in values.iter().zip(out.as_chunks_mut().0) {
                *bytes = bf16::from_f32(*value).to_le_bytes();
            }
        }
        StateDtype::F16 => {
            for (value, bytes) in values.iter().zip(out.as_chunks_mut().0) {
                *bytes = f16::from_f32(*value).to_le_bytes();
            }
        }
    }
}
