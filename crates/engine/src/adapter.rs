//! LoRA adapters laid over the model while it runs: every row of a forward pass may have its own.
//!
//! The base weights stay as they are, quantized and streamed ones too. A row's arithmetic is the trainer's,
//! `y = W·x + scale · B·(A·x)` in f32 and in that order, so it does not matter whose rows share the pass.

use crate::error::Error;
use crate::runner::SequenceStep;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use hearth_kernels::PackedMatrix;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::{Architecture, Lora, Matrix, params};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Numbers of adapters in the order they were loaded; 0 stands for none.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// An adapter in memory. Requests hold on to theirs; its bytes are free once nobody does.
pub struct Adapter {
    number: u32,
    path: PathBuf,
    rank: usize,
    digest: String,
    /// By the canonical name of the linear layer.
    layers: HashMap<String, Lora>,
    charge: Charge,
}

impl Adapter {
    /// Where it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The largest rank among its factors.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        self.charge.bytes()
    }

    /// SHA-256 of its scales and factors: adapters that compute the same have the same.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Names this load: sequences share computed tokens only under the same.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter({}, {:.12})", self.path.display(), self.digest)
    }
}

/// The very same load.
impl PartialEq for Adapter {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

/// How large an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterSize {
    /// Bytes on the device.
    pub bytes: u64,
    /// The largest rank among its factors.
    pub rank: usize,
}

impl AdapterSize {
    fn of(pairs: &[Pair]) -> Self {
        Self {
            bytes: pairs.iter().map(Pair::bytes).sum(),
            rank: pairs.iter().map(|p| p.rank).max().unwrap_or_default(),
        }
    }
}

/// Loads adapters for one model.
pub struct AdapterLoader {
    /// `[out, in]` of every linear layer, by canonical name.
    shapes: HashMap<String, [usize; 2]>,
    ledger: Ledger,
}

/// A pair of factors, checked and not yet read.
struct Pair<'a> {
    module: &'a str,
    shape: [usize; 2],
    rank: usize,
}

impl Pair<'_> {
    fn bytes(&self) -> u64 {
        let [out, inner] = self.shape;
        let matrix = |rows, columns| PackedMatrix::bytes_for(rows, columns, "f32") as u64;
        matrix(self.rank, inner) + matrix(out, self.rank)
    }
}

impl AdapterLoader {
    /// For the linear layers of an architecture.
    pub fn new(arch: &dyn Architecture, ledger: &Ledger) -> Self {
        let linear = params(arch).into_iter().filter(|spec| spec.linear);
        let named = |spec: hearth_model::ParamSpec| {
            let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name).to_owned();
            (module, [spec.shape[0], spec.shape[1]])
        };
        Self { shapes: linear.map(named).collect(), ledger: ledger.clone() }
    }

    /// What an adapter takes on the device, and its rank. Reads no values and charges nothing.
    ///
    /// # Errors
    /// As [`AdapterLoader::load`].
    pub fn size(&self, path: &Path) -> Result<AdapterSize, Error> {
        let files = hearth_weights::open_adapter(path)?;
        Ok(AdapterSize::of(&self.pairs(&files)?))
    }

    fn pairs<'a>(&self, files: &'a hearth_weights::Adapter) -> Result<Vec<Pair<'a>>, Error> {
        files.modules.iter().map(|module| self.pair(files, module)).collect()
    }

    /// Reads an adapter that `hearth train` or PEFT wrote. Its shapes are checked against the model's, its rank against
    /// `most_rank`, and its bytes are charged to the device, before anything is allocated.
    ///
    /// # Errors
    /// [`Error::Weights`] for damaged files and kinds of adapter that are not computed, [`Error::Adapter`] for one that
    /// belongs to another model or holds what is not a number, [`Error::AdapterTooLarge`] when the budget has no room.
    pub fn load(&self, path: &Path, most_rank: usize) -> Result<Arc<Adapter>, Error> {
        let files = hearth_weights::open_adapter(path)?;
        let pairs = self.pairs(&files)?;
        let AdapterSize { bytes, rank } = AdapterSize::of(&pairs);
        if rank > most_rank {
            return Err(refusal(path, format!("its rank is {rank}, at most {most_rank} is taken here")));
        }
        let charge = self.charge(path, bytes)?;
        let mut digest = Sha256::new();
        let mut layers = HashMap::with_capacity(pairs.len());
        for pair in &pairs {
            layers.insert(pair.module.to_owned(), read(&files, pair, &mut digest)?);
        }
        Ok(Arc::new(Adapter {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            path: path.to_owned(),
            rank,
            digest: digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            layers,
            charge,
        }))
    }

    fn pair<'a>(&self, files: &hearth_weights::Adapter, module: &'a str) -> Result<Pair<'a>, Error> {
        let a = &files.tensors.meta(&format!("{module}.lora_A.weight"))?.shape;
        let b = &files.tensors.meta(&format!("{module}.lora_B.weight"))?.shape;
        let Some(&shape) = self.shapes.get(module) else {
            let what = format!("it adapts {module}, which is no linear layer of this model");
            return Err(refusal(&files.path, what));
        };
        if shape != [b[0], a[1]] {
            let what = format!(
                "it adapts {module} as [{}, {}], the model has {shape:?}: it belongs to another model",
                b[0], a[1]
            );
            return Err(refusal(&files.path, what));
        }
        Ok(Pair { module, shape, rank: a[0] })
    }

    fn charge(&self, path: &Path, bytes: u64) -> Result<Charge, Error> {
        self.ledger.charge(Tier::Device, Kind::Weights, bytes).map_err(|_| Error::AdapterTooLarge {
            path: path.to_owned(),
            bytes,
            free: self.ledger.free(Tier::Device),
        })
    }
}

fn read(files: &hearth_weights::Adapter, pair: &Pair<'_>, digest: &mut Sha256) -> Result<Lora, Error> {
    let Pair { module, shape: [out, inner], rank } = *pair;
    let scale = files.scale(rank) as f32;
    if !scale.is_finite() {
        return Err(refusal(
            &files.path,
            format!("its scale, alpha {} over rank {rank}, is too large", files.alpha),
        ));
    }
    digest.update(format!("\n{module} {out} {inner} {rank} {:08x}\n", scale.to_bits()));
    let mut factor = |which: &str, rows, columns| {
        let name = format!("{module}.{which}.weight");
        let values = files.tensors.read_f32(&name)?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(refusal(&files.path, format!("{name} holds {} at place {at}", values[at])));
        }
        values.iter().for_each(|v| digest.update(v.to_le_bytes()));
        Ok(Matrix::Packed(Arc::new(PackedMatrix::from_f32(rows, columns, &values))))
    };
    Ok(Lora { a: factor("lora_A", rank, inner)?, b: factor("lora_B", out, rank)?, scale, dropout: None })
}

fn refusal(path: &Path, what: String) -> Error {
    Error::Adapter { path: path.to_owned(), what }
}

/// The rows of one pass that have adapters, an adapter's rows together wherever they stand.
pub(crate) struct AdaptedRows(Vec<Group>);

struct Group {
    adapter: Arc<Adapter>,
    /// `None` = all rows of the pass.
    rows: Option<Tensor<1, Int>>,
}

impl AdaptedRows {
    /// Whether no row has an adapter.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn of(step: &[SequenceStep]) -> Self {
        let mut groups: Vec<(&Arc<Adapter>, Vec<i32>)> = Vec::new();
        let mut first = 0;
        for s in step {
            let rows = first..first + s.tokens.len() as i32;
            first = rows.end;
            let Some(adapter) = &s.adapter else { continue };
            match groups.iter_mut().find(|(known, _)| *known == adapter) {
                Some((_, known)) => known.extend(rows),
                None => groups.push((adapter, rows.collect())),
            }
        }
        let group = |(adapter, rows): (&Arc<Adapter>, Vec<i32>)| {
            let (len, all) = (rows.len(), rows.len() == first as usize);
            let rows = || Tensor::from_data(TensorData::new(rows, [len]), &Device::flex());
            Group { adapter: adapter.clone(), rows: (!all).then(rows) }
        };
        Self(groups.into_iter().map(group).collect())
    }

    /// Adds what the adapters say to the output `y` of a layer. `x`: `[rows, in]`, `y`: `[rows, out]`.
    pub(crate) fn adapt(&self, layer: &str, x: Tensor<2>, mut y: Tensor<2>) -> Tensor<2> {
        for Group { adapter, rows } in &self.0 {
            let Some(lora) = adapter.layers.get(layer) else { continue };
            y = match rows {
                None => y + lora.forward(x.clone()),
                Some(rows) => {
                    let share = lora.forward(x.clone().select(0, rows.clone()));
                    y.select_assign(0, rows.clone(), share, IndexingUpdateOp::Add)
                }
            };
        }
        y
    }
}
