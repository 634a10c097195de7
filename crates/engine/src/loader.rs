//! Weights from disk into panel layout, each matrix once, within the device's budget.

use crate::error::Error;
use crate::footprint;
use burn::tensor::{Device, Tensor};
use hearth_kernels::cpu::pages::Arena;
use hearth_kernels::paged::KvType;
use hearth_kernels::{Activations, PackedMatrix};
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::rope::Rope;
use hearth_model::{
    Architecture, Block, Embedding, Error as ModelError, Head, Linear, Matrix, ParamSpec, WeightSource,
    architecture, params,
};
use hearth_weights::{FormatRef, ModelConfig, ModelFiles};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How far loading is, in bytes as held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes packed so far.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Weights held in memory for as long as it lives, ready to be put into layers. Frozen.
pub struct ResidentWeights {
    matrices: HashMap<String, Arc<PackedMatrix>>,
    vectors: HashMap<String, Tensor<1>>,
    kv_type: KvType,
    charge: Charge,
}

impl ResidentWeights {
    /// Reads and packs every parameter of the architecture. Shapes are checked against the files' own, and bytes
    /// are charged to the device, before anything is allocated.
    ///
    /// # Errors
    /// [`Error::Weights`] for a missing tensor, a wrong shape or damaged files; [`Error::TooSmall`] when the
    /// device's budget holds no more than the weights.
    pub fn load(
        arch: &dyn Architecture,
        files: &ModelFiles,
        activations: Activations,
        ledger: &Ledger,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Self, Error> {
        let parts =
            params(arch).into_iter().map(|spec| Part::new(spec, files)).collect::<Result<Vec<_>, _>>()?;
        let total = parts.iter().map(|p| p.bytes).sum();
        let kv_type = kv_type(&parts, activations);
        footprint::check_weights(arch.config(), kv_type, total, ledger)?;
        let mut loaded = Self {
            matrices: HashMap::new(),
            vectors: HashMap::new(),
            kv_type,
            charge: ledger.charge(Tier::Device, Kind::Weights, total)?,
        };
        let done = AtomicU64::new(0);
        let report = |bytes| {
            let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            progress(LoadProgress { done, total });
        };
        progress(LoadProgress { done: 0, total });
        let matrices = parts.iter().filter(|p| p.spec.shape.len() == 2);
        let arena = Arena::new(matrices.map(|p| p.bytes as usize).sum());
        let read = |part: &Part| part.read(files, activations, &arena, &report);
        // What is decoded to f32 on the way goes one by one, on all cores: the copies are large.
        let (native, decoded): (Vec<_>, Vec<_>) = parts.into_iter().partition(|p| is_native(p.format));
        let mut weights = native.par_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        weights.extend(decoded.iter().map(read).collect::<Result<Vec<_>, _>>()?);
        for (part, weight) in native.iter().chain(&decoded).zip(weights) {
            loaded.keep(part.spec.name.clone(), weight);
        }
        Ok(loaded)
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.charge.bytes()
    }

    fn keep(&mut self, name: String, weight: Weight) {
        match weight {
            Weight::Matrix(m) => drop(self.matrices.insert(name, m)),
            Weight::Vector(v) => {
                drop(self.vectors.insert(name, Tensor::from_floats(v.as_slice(), &Device::flex())));
            }
        }
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix, ModelError> {
        let matrix = self.matrices.get(&format!("{name}.weight"));
        let matrix = matrix.filter(|m| [m.rows(), m.columns()] == shape);
        matrix.map(|m| Matrix::Packed(m.clone())).ok_or_else(|| not_listed(name, &shape))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        let vector = self.vectors.get(name).filter(|v| v.dims() == [len]);
        vector.cloned().ok_or_else(|| not_listed(name, &[len]))
    }
}

impl WeightSource for ResidentWeights {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, ModelError> {
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), shape[0])?) } else { None };
        Ok(Linear::new(self.matrix(name, shape)?, bias))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.vector(&format!("{name}.weight"), len)
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, ModelError> {
        self.matrix(name, shape)
    }
}

/// An architecture that asks for what it did not list is broken; say which.
fn not_listed(name: &str, shape: &[usize]) -> ModelError {
    ModelError::Source(format!("{name} {shape:?} is not among the parameters the architecture listed"))
}

enum Weight {
    Matrix(Arc<PackedMatrix>),
    Vector(Vec<f32>),
}

/// A parameter to be read, checked.
struct Part {
    spec: ParamSpec,
    format: FormatRef,
    bytes: u64,
}

impl Part {
    fn new(spec: ParamSpec, files: &ModelFiles) -> Result<Self, Error> {
        let format = files.expect(&spec.name, &spec.shape)?.format;
        let bytes = match spec.shape[..] {
            [rows, columns] => PackedMatrix::bytes_for(rows, columns, format.name()),
            _ => spec.len() * size_of::<f32>(),
        };
        Ok(Self { spec, format, bytes: bytes as u64 })
    }

    fn read(
        &self,
        files: &ModelFiles,
        activations: Activations,
        arena: &Arc<Arena>,
        report: &dyn Fn(u64),
    ) -> Result<Weight, Error> {
        let (name, tensors) = (&self.spec.name, &files.tensors);
        let weight = match self.spec.shape[..] {
            [rows, columns] => {
                let packed = match is_native(self.format) {
                    true => PackedMatrix::from_format_in(
                        Some(arena),
                        rows,
                        columns,
                        self.format.name(),
                        &tensors.bytes(name)?,
                    ),
                    false => None,
                };
                let matrix = match packed {
                    Some(packed) => packed,
                    None => PackedMatrix::from_f32_in(Some(arena), rows, columns, &tensors.read_f32(name)?)
                        .expect("the arena holds every matrix"),
                };
                Weight::Matrix(Arc::new(matrix.with_activations(activations)))
            }
            _ => Weight::Vector(tensors.read_f32(name)?),
        };
        report(self.bytes);
        Ok(weight)
    }
}

/// What the KV cache of such weights stores: halves where the arithmetic rounds activations anyway.
fn kv_type(parts: &[Part], activations: Activations) -> KvType {
    let rounds = activations == Activations::Int8 && parts.iter().any(|p| p.format.block_len() > 1);
    if rounds { KvType::F16 } else { KvType::F32 }
}

/// Whether a format keeps its size in panels; the others are held as f32.
fn is_native(format: FormatRef) -> bool {
    PackedMatrix::has_layout(format.name())
}

/// A model in memory, ready to run. Clones share the weights.
#[derive(Clone)]
pub struct LoadedModel(Arc<Parts>);

pub(crate) struct Parts {
    pub(crate) config: ModelConfig,
    pub(crate) embedding: Embedding,
    pub(crate) blocks: Vec<Box<dyn Block>>,
    pub(crate) head: Head,
    pub(crate) rope: Rope,
    ledger: Ledger,
    /// Held for the bytes it stands for.
    weights: Option<ResidentWeights>,
}

impl LoadedModel {
    /// Loads a model's weights, charging the ledger; quantized ones will multiply `activations`. `progress` may be called from several threads.
    ///
    /// # Errors
    /// As [`ResidentWeights::load`], and for an unknown architecture.
    pub fn load(
        files: &ModelFiles,
        activations: Activations,
        ledger: &Ledger,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Self, Error> {
        let arch = architecture(&files.config)?;
        let mut weights = ResidentWeights::load(arch.as_ref(), files, activations, ledger, progress)?;
        let mut parts = Parts::build(arch.as_ref(), &mut weights, ledger)?;
        parts.weights = Some(weights);
        Ok(Self(Arc::new(parts)))
    }

    /// Builds a model from weights held elsewhere, by whoever also answers for their bytes.
    ///
    /// # Errors
    /// What the source reports.
    pub fn from_source(
        arch: &dyn Architecture,
        source: &mut dyn WeightSource,
        ledger: &Ledger,
    ) -> Result<Self, Error> {
        Ok(Self(Arc::new(Parts::build(arch, source, ledger)?)))
    }

    /// Shape and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// Bytes of weights charged for this model.
    pub fn weight_bytes(&self) -> u64 {
        self.0.weights.as_ref().map_or(0, ResidentWeights::bytes)
    }

    /// What its KV cache stores.
    pub fn kv_type(&self) -> KvType {
        self.0.weights.as_ref().map_or(KvType::F32, |w| w.kv_type)
    }

    /// The ledger the model is charged to.
    pub fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.0
    }
}

impl Parts {
    fn build(arch: &dyn Architecture, source: &mut dyn WeightSource, ledger: &Ledger) -> Result<Self, Error> {
        Ok(Self {
            config: arch.config().clone(),
            embedding: arch.embedding(source)?,
            blocks: (0..arch.num_blocks()).map(|i| arch.block(i, source)).collect::<Result<_, _>>()?,
            head: arch.head(source)?,
            rope: Rope::new(arch.config()),
            ledger: ledger.clone(),
            weights: None,
        })
    }
}
