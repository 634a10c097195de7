//! The header of a GGUF file, checked against the file's length before anything is allocated.

use crate::Error;
use crate::mapped::Mapped;
use crate::quant::{self, FormatRef};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any of the eight integer types.
    Int(i128),
    /// f32 or f64.
    Float(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8, or replaced where it is not.
    String(String),
    /// Element type, element count, and where the elements lie in the file.
    Array(u32, usize, Range<usize>),
}

/// One entry of the tensor table.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Name in the file.
    pub name: String,
    /// Shape, outermost first (the file has it innermost first).
    pub shape: Vec<usize>,
    /// ggml type number.
    pub ggml_type: u32,
    /// The storage format, if hearth reads it.
    pub format: Option<FormatRef>,
    /// Bytes in the file; empty when the format is unknown.
    pub range: Range<usize>,
}

/// A parsed, memory-mapped GGUF file.
pub struct Gguf {
    mapped: Mapped,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<Tensor>,
}

/// What every GGUF file starts with.
const MAGIC: &[u8; 4] = b"GGUF";
/// Arrays of arrays of arrays… deeper than this are not parsed.
const MAX_NESTING: usize = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl Gguf {
    /// Whether the file starts as a GGUF file does.
    pub fn is_gguf(path: &Path) -> bool {
        let mut magic = [0; 4];
        std::fs::File::open(path)
            .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut magic))
            .is_ok_and(|()| &magic == MAGIC)
    }

    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Damaged`] when anything reaches past the end of the file or contradicts itself.
    pub fn open(path: &Path) -> Result<Gguf, Error> {
        let mapped = Mapped::open(path)?;
        let mut cursor = Cursor { path, bytes: mapped.bytes(), at: 0 };
        if cursor.take(4)? != MAGIC {
            return Err(Error::not_a_model(path, "it does not start with GGUF"));
        }
        let version = cursor.u32()?;
        if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
            return Err(Error::unsupported(
                path,
                "it is a big-endian GGUF file, hearth reads little-endian ones",
            ));
        }
        if version != 2 && version != 3 {
            return Err(Error::unsupported(path, format!("GGUF version {version}, hearth reads 2 and 3")));
        }
        let tensor_count = cursor.u64()?;
        let key_count = cursor.u64()?;
        let metadata = cursor.metadata(key_count)?;
        let mut tensors = cursor.tensor_table(tensor_count)?;
        let alignment = alignment(path, &metadata)?;
        let data_start = cursor.at.next_multiple_of(alignment);
        place(path, &mut tensors, data_start, alignment, mapped.bytes().len())?;
        Ok(Gguf { mapped, metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.mapped.path()
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensor table, in file order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// A tensor's raw bytes, as they lie in the file.
    pub fn raw(&self, tensor: &Tensor) -> &[u8] {
        &self.mapped.bytes()[tensor.range.clone()]
    }

    /// Lets go of a tensor's pages.
    pub(super) fn release(&self, tensor: &Tensor) {
        self.mapped.release(tensor.range.clone());
    }

    /// A string, if the key is there.
    pub fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    /// A whole number from 0 up, if the key is there.
    pub fn size(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Int(n)) if usize::try_from(*n).is_ok() => Ok(Some(*n as usize)),
            Some(other) => Err(self.wrong(key, other, "a whole number from 0 up")),
        }
    }

    /// A whole number of any sign, if the key is there.
    pub fn int(&self, key: &str) -> Result<Option<i64>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Int(n)) if i64::try_from(*n).is_ok() => Ok(Some(*n as i64)),
            Some(other) => Err(self.wrong(key, other, "a whole number")),
        }
    }

    /// A number, if the key is there.
    pub fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(f)) => Ok(Some(*f)),
            Some(Value::Int(n)) => Ok(Some(*n as f64)),
            Some(other) => Err(self.wrong(key, other, "a number")),
        }
    }

    /// A truth value, if the key is there.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// An array of strings; empty when the key is not there.
    pub fn strings(&self, key: &str) -> Result<Vec<String>, Error> {
        self.array(key, "an array of strings", |c, kind| {
            if kind != STRING {
                return Ok(None);
            }
            c.string().map(Some)
        })
    }

    /// An array of numbers; empty when the key is not there.
    pub fn floats(&self, key: &str) -> Result<Vec<f64>, Error> {
        self.array(key, "an array of numbers", |c, kind| {
            Ok(match c.value(kind, 0)? {
                Value::Float(f) => Some(f),
                Value::Int(n) => Some(n as f64),
                _ => None,
            })
        })
    }

    /// An array of whole numbers; empty when the key is not there.
    pub fn ints(&self, key: &str) -> Result<Vec<i64>, Error> {
        self.array(key, "an array of whole numbers", |c, kind| {
            Ok(match c.value(kind, 0)? {
                Value::Int(n) => i64::try_from(n).ok(),
                Value::Bool(b) => Some(i64::from(b)),
                _ => None,
            })
        })
    }

    fn array<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl Fn(&mut Cursor<'_>, u32) -> Result<Option<T>, Error>,
    ) -> Result<Vec<T>, Error> {
        let (kind, count, range) = match self.metadata.get(key) {
            None => return Ok(vec![]),
            Some(Value::Array(kind, count, range)) => (*kind, *count, range),
            Some(other) => return Err(self.wrong(key, other, wanted)),
        };
        let bytes = &self.mapped.bytes()[..range.end];
        let mut cursor = Cursor { path: self.path(), bytes, at: range.start };
        (0..count)
            .map(|_| {
                read(&mut cursor, kind)?
                    .ok_or_else(|| Error::damaged(self.path(), format!("{key} is not {wanted}")))
            })
            .collect()
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let shown = match value {
            Value::Array(_, count, _) => format!("an array of {count}"),
            other => format!("{other:?}").chars().take(60).collect(),
        };
        Error::damaged(self.path(), format!("{key} is {shown}, it must be {wanted}"))
    }
}

fn alignment(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<usize, Error> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::Int(n)) if (1..=1 << 20).contains(n) && (*n as usize).is_power_of_two() => {
            Ok(*n as usize)
        }
        Some(other) => Err(Error::damaged(
            path,
            format!("general.alignment is {other:?}, it must be a power of two up to 1048576"),
        )),
    }
}

/// Turns offsets relative to the data section into checked byte ranges of the file.
fn place(
    path: &Path,
    tensors: &mut [Tensor],
    data_start: usize,
    alignment: usize,
    file_len: usize,
) -> Result<(), Error> {
    for tensor in tensors {
        let Some(format) = tensor.format else { continue };
        let bytes = quant::byte_len(format, &tensor.shape).ok_or_else(|| {
            let what = format!("shape {:?} is not whole blocks of {}", tensor.shape, format.name());
            Error::tensor(path, &tensor.name, what)
        })?;
        let offset = tensor.range.start;
        if offset % alignment != 0 {
            let what = format!("its offset {offset} is not a multiple of {alignment}");
            return Err(Error::tensor(path, &tensor.name, what));
        }
        let start = data_start.checked_add(offset);
        let end = start.and_then(|s| s.checked_add(bytes)).filter(|e| *e <= file_len);
        let (Some(start), Some(end)) = (start, end) else {
            let what = format!("{bytes} bytes at {offset} reach past the end of the file ({file_len} bytes)");
            return Err(Error::tensor(path, &tensor.name, what));
        };
        tensor.range = start..end;
    }
    Ok(())
}

/// A reader that never passes the end.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Error> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            let left = self.bytes.len() - self.at;
            let what = format!("its header is cut short: {len} bytes wanted at {}, {left} left", self.at);
            return Err(Error::damaged(self.path, what));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.number().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.number().map(u64::from_le_bytes)
    }

    fn len(&mut self) -> Result<usize, Error> {
        let n = self.u64()?;
        usize::try_from(n)
            .map_err(|_| Error::damaged(self.path, format!("a length of {n} at {}", self.at - 8)))
    }

    fn string(&mut self) -> Result<String, Error> {
        let len = self.len()?;
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>, Error> {
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.string()?;
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::damaged(self.path, format!("key {key:?} is there twice")));
            }
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, Error> {
        Ok(match kind {
            0 => Value::Int(u8::from_le_bytes(self.number()?).into()),
            1 => Value::Int(i8::from_le_bytes(self.number()?).into()),
            2 => Value::Int(u16::from_le_bytes(self.number()?).into()),
            3 => Value::Int(i16::from_le_bytes(self.number()?).into()),
            4 => Value::Int(self.u32()?.into()),
            5 => Value::Int(i32::from_le_bytes(self.number()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.number()?).into()),
            7 => Value::Bool(self.number::<1>()? != [0]),
            STRING => Value::String(self.string()?),
            ARRAY => self.array(depth)?,
            10 => Value::Int(self.u64()?.into()),
            11 => Value::Int(i64::from_le_bytes(self.number()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.number()?)),
            other => return Err(Error::damaged(self.path, format!("metadata type {other} does not exist"))),
        })
    }

    /// Steps over an array, remembering where it was: a vocabulary is only built when asked for.
    fn array(&mut self, depth: usize) -> Result<Value, Error> {
        if depth >= MAX_NESTING {
            return Err(Error::damaged(self.path, format!("arrays nest deeper than {MAX_NESTING}")));
        }
        let kind = self.u32()?;
        let count = self.len()?;
        let start = self.at;
        match scalar_bytes(kind) {
            Some(size) => {
                let total = count.checked_mul(size).ok_or_else(|| {
                    Error::damaged(self.path, format!("an array of {count} elements does not fit the file"))
                })?;
                self.take(total)?;
            }
            None => {
                for _ in 0..count {
                    match kind {
                        STRING => {
                            let len = self.len()?;
                            self.take(len)?;
                        }
                        _ => {
                            self.value(kind, depth + 1)?;
                        }
                    }
                }
            }
        }
        Ok(Value::Array(kind, count, start..self.at))
    }

    fn tensor_table(&mut self, count: u64) -> Result<Vec<Tensor>, Error> {
        let mut tensors = Vec::new();
        let mut names = BTreeSet::new();
        for _ in 0..count {
            let tensor = self.tensor()?;
            if !names.insert(tensor.name.clone()) {
                return Err(Error::tensor(self.path, &tensor.name, "it is in the tensor table twice"));
            }
            tensors.push(tensor);
        }
        Ok(tensors)
    }

    fn tensor(&mut self) -> Result<Tensor, Error> {
        let name = self.string()?;
        let dims = self.u32()?;
        if !(1..=4).contains(&dims) {
            let what = format!("it has {dims} dimensions, GGUF tensors have 1 to 4");
            return Err(Error::tensor(self.path, &name, what));
        }
        let mut shape = (0..dims).map(|_| self.len()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        if shape.contains(&0) {
            return Err(Error::tensor(self.path, &name, format!("its shape {shape:?} has a 0")));
        }
        let ggml_type = self.u32()?;
        let offset = self.len()?;
        let format = quant::by_ggml_type(ggml_type);
        // The start is relative until `place` has checked it.
        Ok(Tensor { name, shape, ggml_type, format, range: offset..offset })
    }
}

/// Bytes of a fixed-size metadata type.
fn scalar_bytes(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
