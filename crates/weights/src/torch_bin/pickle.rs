//! A restricted pickle machine: the opcodes and globals of a state dict, nothing else.
//!
//! Objects live in an arena and refer to each other by number, so a pickle can neither recurse nor expand: memory
//! is proportional to its length. `REDUCE` builds descriptions of tensors; no code is ever looked up.

use crate::Error;
use crate::quant::{self, FormatRef};
use std::collections::HashMap;
use std::path::Path;

/// Most dimensions a tensor may have.
pub(super) const MAX_DIMS: usize = 8;

/// Element type of a storage.
#[derive(Clone, Copy)]
pub(super) enum Dtype {
    /// One hearth reads.
    Read(FormatRef),
    /// Another, by its PyTorch name.
    Other(&'static str),
}

impl Dtype {
    pub(super) fn name(self) -> &'static str {
        match self {
            Dtype::Read(format) => format.name(),
            Dtype::Other(name) => name,
        }
    }
}

/// A tensor as `torch._utils._rebuild_tensor_v2` would make it.
#[derive(Clone)]
pub(super) struct Tensor {
    pub(super) key: String,
    pub(super) dtype: Dtype,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

#[derive(Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

/// Every global a state dict needs. All others end the reading.
fn global(module: &str, name: &str) -> Option<Global> {
    let storage = |dtype| Some(Global::Storage(dtype));
    match (module, name) {
        ("collections", "OrderedDict") => Some(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
        ("torch", "FloatStorage") => storage(Dtype::Read(quant::F32)),
        ("torch", "HalfStorage") => storage(Dtype::Read(quant::F16)),
        ("torch", "BFloat16Storage") => storage(Dtype::Read(quant::BF16)),
        ("torch", "DoubleStorage") => storage(Dtype::Other("float64")),
        ("torch", "LongStorage") => storage(Dtype::Other("int64")),
        ("torch", "IntStorage") => storage(Dtype::Other("int32")),
        ("torch", "ShortStorage") => storage(Dtype::Other("int16")),
        ("torch", "CharStorage") => storage(Dtype::Other("int8")),
        ("torch", "ByteStorage") => storage(Dtype::Other("uint8")),
        ("torch", "BoolStorage") => storage(Dtype::Other("bool")),
        _ => None,
    }
}

/// Number of an object in the arena.
type Id = usize;

enum Object {
    /// None, numbers that are no sizes, and other things that are carried but never looked at.
    Opaque,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        key: String,
        dtype: Dtype,
    },
    Tensor(Tensor),
}

/// The named tensors of a pickled state dict; of `["state_dict"]` where training frameworks wrap it.
pub(super) fn state_dict(path: &Path, pickle: &[u8]) -> Result<Vec<(String, Tensor)>, Error> {
    let mut machine = Machine {
        path,
        bytes: pickle,
        at: 0,
        arena: vec![],
        stack: vec![],
        marks: vec![],
        memo: HashMap::new(),
    };
    let root = machine.run()?;
    let root = machine.lookup(root, "state_dict").unwrap_or(root);
    let Object::Dict(items) = &machine.arena[root] else {
        return Err(Error::unsupported(path, "its pickle is not a dictionary of tensors"));
    };
    let mut tensors = HashMap::new();
    for (key, value) in items {
        if let (Object::Text(name), Object::Tensor(tensor)) = (&machine.arena[*key], &machine.arena[*value]) {
            tensors.insert(name.clone(), tensor.clone());
        }
    }
    if tensors.is_empty() {
        return Err(Error::unsupported(path, "its pickle holds no named tensors"));
    }
    Ok(tensors.into_iter().collect())
}

struct Machine<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    arena: Vec<Object>,
    stack: Vec<Id>,
    /// Stack heights at each MARK.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Id, Error> {
        loop {
            let op = self.take(1)?[0];
            if op == b'.' {
                return self.pop();
            }
            self.step(op)?;
        }
    }

    fn step(&mut self, op: u8) -> Result<(), Error> {
        match op {
            0x80 => self.protocol(),
            0x95 => self.take(8).map(|_| ()), // FRAME: a length nobody needs
            b'c' => self.global_line(),
            0x93 => self.global_from_stack(),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'}' => self.push(Object::Dict(vec![])),
            b']' => self.push(Object::List(vec![])),
            b')' => self.push(Object::Tuple(vec![])),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Tuple(items))
            }
            0x85..=0x87 => self.short_tuple(usize::from(op - 0x84)),
            b'N' | 0x88 | 0x89 => self.push(Object::Opaque),
            b'G' => {
                self.take(8)?;
                self.push(Object::Opaque)
            }
            b'K' | b'M' | b'J' | 0x8a => self.integer(op),
            b'X' | 0x8c | 0x8d => self.text(op),
            b'q' | b'r' | 0x94 => self.memoize(op),
            b'h' | b'j' => self.recall(op),
            b'Q' => self.persistent(),
            b'R' => self.reduce(),
            b'b' => self.build(),
            b's' | b'u' => self.set_items(op),
            b'a' | b'e' => self.append(op),
            other => {
                let what =
                    format!("its pickle uses opcode {other:#04x}, which tensors do not need; not read");
                Err(Error::unsupported(self.path, what))
            }
        }
    }

    fn take(&mut self, len: usize) -> Result<&[u8], Error> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(Error::damaged(self.path, format!("its pickle is cut short at byte {}", self.at)));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<u64, Error> {
        let taken = self.take(bytes)?;
        Ok(taken.iter().rev().fold(0, |n, b| (n << 8) | u64::from(*b)))
    }

    fn wrong(&self, what: &str) -> Error {
        Error::damaged(self.path, format!("its pickle is wrong near byte {}: {what}", self.at))
    }

    fn push(&mut self, object: Object) -> Result<(), Error> {
        self.stack.push(self.arena.len());
        self.arena.push(object);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, Error> {
        // Things below the last mark belong to an unfinished container.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.wrong("the stack is empty"));
        }
        self.stack.pop().ok_or_else(|| self.wrong("the stack is empty"))
    }

    fn top(&self) -> Result<Id, Error> {
        self.stack.last().copied().ok_or_else(|| self.wrong("the stack is empty"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, Error> {
        let height = self.marks.pop().ok_or_else(|| self.wrong("there is no mark"))?;
        Ok(self.stack.split_off(height))
    }

    fn protocol(&mut self) -> Result<(), Error> {
        match self.take(1)?[0] {
            2..=5 => Ok(()),
            other => {
                Err(Error::unsupported(self.path, format!("pickle protocol {other}, torch.save writes 2")))
            }
        }
    }

    fn line(&mut self) -> Result<String, Error> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').ok_or_else(|| self.wrong("a line has no end"))?;
        let text = String::from_utf8_lossy(&rest[..len]).into_owned();
        self.at += len + 1;
        Ok(text)
    }

    fn global_line(&mut self) -> Result<(), Error> {
        let (module, name) = (self.line()?, self.line()?);
        self.push_global(&module, &name)
    }

    fn global_from_stack(&mut self) -> Result<(), Error> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (self.text_of(module), self.text_of(name)) {
            (Some(module), Some(name)) => self.push_global(&module, &name),
            _ => Err(self.wrong("a global has no name")),
        }
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<(), Error> {
        let global = global(module, name).ok_or_else(|| {
            let shown: String = format!("{module}.{name}").chars().take(100).collect();
            let what =
                format!("its pickle asks for {shown}, which tensors do not need; nothing in it was run");
            Error::unsupported(self.path, what)
        })?;
        self.push(Object::Global(global))
    }

    fn short_tuple(&mut self, len: usize) -> Result<(), Error> {
        let mut items = (0..len).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Object::Tuple(items))
    }

    fn integer(&mut self, op: u8) -> Result<(), Error> {
        let value = match op {
            b'K' => self.number(1)? as i64,
            b'M' => self.number(2)? as i64,
            b'J' => i64::from(self.number(4)? as u32 as i32),
            _ => {
                let len = usize::from(self.take(1)?[0]);
                if len > 8 {
                    return Err(self.wrong("a number has more than 8 bytes"));
                }
                // Little-endian two's complement of any length: move its sign to the top and back.
                let raw = self.number(len)?;
                if len == 0 { 0 } else { ((raw << (64 - 8 * len)) as i64) >> (64 - 8 * len) }
            }
        };
        self.push(Object::Int(value))
    }

    fn text(&mut self, op: u8) -> Result<(), Error> {
        let len = match op {
            b'X' => self.number(4)?,
            0x8c => self.number(1)?,
            _ => self.number(8)?,
        };
        let len = usize::try_from(len).map_err(|_| self.wrong("a text is too long"))?;
        let text = String::from_utf8_lossy(self.take(len)?).into_owned();
        self.push(Object::Text(text))
    }

    fn memoize(&mut self, op: u8) -> Result<(), Error> {
        let key = match op {
            b'q' => self.number(1)? as u32,
            b'r' => self.number(4)? as u32,
            _ => self.memo.len() as u32,
        };
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, op: u8) -> Result<(), Error> {
        let key = if op == b'h' { self.number(1)? } else { self.number(4)? } as u32;
        let id = *self.memo.get(&key).ok_or_else(|| self.wrong("it recalls what was never remembered"))?;
        self.stack.push(id);
        Ok(())
    }

    fn text_of(&self, id: Id) -> Option<String> {
        match &self.arena[id] {
            Object::Text(text) => Some(text.clone()),
            _ => None,
        }
    }

    fn size_of(&self, id: Id) -> Option<usize> {
        match &self.arena[id] {
            Object::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    fn sizes_of(&self, id: Id) -> Option<Vec<usize>> {
        let (Object::Tuple(items) | Object::List(items)) = &self.arena[id] else { return None };
        if items.len() > MAX_DIMS {
            return None;
        }
        items.iter().map(|i| self.size_of(*i)).collect()
    }

    fn tuple_of(&self, id: Id) -> Option<&[Id]> {
        match &self.arena[id] {
            Object::Tuple(items) => Some(items),
            _ => None,
        }
    }

    fn lookup(&self, dict: Id, key: &str) -> Option<Id> {
        let Object::Dict(items) = &self.arena[dict] else { return None };
        let (_, value) =
            items.iter().find(|(k, _)| matches!(&self.arena[*k], Object::Text(t) if t == key))?;
        matches!(self.arena[*value], Object::Dict(_)).then_some(*value)
    }

    /// `("storage", <type>, key, device, length)` → a storage.
    fn persistent(&mut self) -> Result<(), Error> {
        let id = self.pop()?;
        let storage = self.tuple_of(id).filter(|t| t.len() == 5).and_then(|t| {
            let Object::Global(Global::Storage(dtype)) = self.arena[t[1]] else { return None };
            (self.text_of(t[0])? == "storage").then_some(())?;
            Some(Object::Storage { key: self.text_of(t[2])?, dtype })
        });
        let storage = storage.ok_or_else(|| self.wrong("a storage is not described as torch.save does"))?;
        self.push(storage)
    }

    fn reduce(&mut self) -> Result<(), Error> {
        let (args, callee) = (self.pop()?, self.pop()?);
        let Object::Global(global) = self.arena[callee] else {
            return Err(self.wrong("it calls something that is no global"));
        };
        let made = match global {
            Global::OrderedDict => Some(Object::Dict(vec![])),
            Global::RebuildTensor => self.tensor(args).map(Object::Tensor),
            Global::RebuildParameter => self.tuple_of(args).and_then(|t| match &self.arena[*t.first()?] {
                Object::Tensor(tensor) => Some(Object::Tensor(tensor.clone())),
                _ => None,
            }),
            Global::Storage(_) => None,
        };
        let made = made.ok_or_else(|| self.wrong("a tensor is not described as torch.save does"))?;
        self.push(made)
    }

    /// `(storage, offset, shape, strides, requires_grad, hooks)`.
    fn tensor(&self, args: Id) -> Option<Tensor> {
        let [storage, offset, shape, strides, ..] = self.tuple_of(args)? else { return None };
        let Object::Storage { key, dtype } = &self.arena[*storage] else { return None };
        let (shape, strides) = (self.sizes_of(*shape)?, self.sizes_of(*strides)?);
        (shape.len() == strides.len()).then_some(())?;
        Some(Tensor { key: key.clone(), dtype: *dtype, offset: self.size_of(*offset)?, shape, strides })
    }

    /// Attributes of an object, such as a state dict's `_metadata`: nothing hearth needs.
    fn build(&mut self) -> Result<(), Error> {
        self.pop()?;
        self.top().map(|_| ())
    }

    fn set_items(&mut self, op: u8) -> Result<(), Error> {
        let items = if op == b'u' {
            self.pop_to_mark()?
        } else {
            let (value, key) = (self.pop()?, self.pop()?);
            vec![key, value]
        };
        let top = self.top()?;
        match &mut self.arena[top] {
            Object::Dict(dict) if items.len() % 2 == 0 => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => Err(self.wrong("it sets items of what is no dictionary")),
        }
    }

    fn append(&mut self, op: u8) -> Result<(), Error> {
        let items = if op == b'e' { self.pop_to_mark()? } else { vec![self.pop()?] };
        let top = self.top()?;
        match &mut self.arena[top] {
            Object::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err(self.wrong("it appends to what is no list")),
        }
    }
}
