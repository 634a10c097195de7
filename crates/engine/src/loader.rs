//! Weights from disk into panel layout, each matrix once, within the device's budget. What does not fit is streamed if
//! the budget names host memory or disk for it.

use crate::adapter::AdapterLoader;
use crate::error::Error;
use crate::footprint;
use crate::placement::{Aim, Placement};
use crate::streaming::{Counters, Prepared, Stream, Streamed, Table, WeightPlan, may_stream};
use burn::tensor::{Device, Tensor};
use hearth_kernels::cpu::pages::{Arena, Image, Loan};
use hearth_kernels::paged::KvType;
use hearth_kernels::{Activations, PackedMatrix};
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::panels::PANELS;
use hearth_model::rope::Rope;
use hearth_model::{
    Architecture, Block, Embedding, Error as ModelError, Head, Linear, Matrix, ParamSpec, WeightSource,
    architecture, params,
};
use hearth_weights::{FormatRef, ModelConfig, ModelFiles};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a model computes with where the weights leave a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// What quantized weights multiply.
    pub activations: Activations,
    /// What the KV cache stores. `None` = halves where activations are rounded anyway, f32 elsewhere.
    pub kv_type: Option<KvType>,
}

impl From<Activations> for Arithmetic {
    fn from(activations: Activations) -> Self {
        Self { activations, kv_type: None }
    }
}

/// How far loading is, in bytes as held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes packed so far.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Weights by name, ready to be put into layers. Frozen.
#[derive(Default)]
pub(crate) struct Held {
    matrices: HashMap<String, Arc<PackedMatrix>>,
    /// The embedding, if it is not among them.
    elsewhere: Option<String>,
    vectors: HashMap<String, Tensor<1>>,
}

impl Held {
    pub(crate) fn keep(&mut self, name: String, weight: Weight) {
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

impl WeightSource for Held {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, ModelError> {
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), shape[0])?) } else { None };
        Ok(Linear::new(self.matrix(name, shape)?, bias).named(name))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.vector(&format!("{name}.weight"), len)
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.vector(&format!("{name}.bias"), len)
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, ModelError> {
        match &self.elsewhere {
            Some(elsewhere) if *elsewhere == format!("{name}.weight") => Ok(Matrix::Shape(shape)),
            _ => self.matrix(name, shape),
        }
    }
}

/// Weights held in memory for as long as it lives.
pub struct ResidentWeights {
    held: Held,
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
        let parts = Part::all(arch, files)?;
        let total = parts.iter().map(|p| p.bytes).sum();
        footprint::check_weights(arch.config(), kv_type(&parts, activations.into()), total, ledger)?;
        Self::read(parts, files, activations, ledger, progress)
    }

    fn read(
        parts: Vec<Part>,
        files: &ModelFiles,
        activations: Activations,
        ledger: &Ledger,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Self, Error> {
        let total = parts.iter().map(|p| p.bytes).sum();
        let charge = ledger.charge(Tier::Device, Kind::Weights, total)?;
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
        let mut held = Held::default();
        for (part, weight) in native.iter().chain(&decoded).zip(weights) {
            held.keep(part.spec.name.clone(), weight);
        }
        Ok(Self { held, charge })
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.charge.bytes()
    }
}

impl WeightSource for ResidentWeights {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, ModelError> {
        self.held.linear(name, shape, bias)
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.held.norm(name, len)
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.held.norm_bias(name, len)
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, ModelError> {
        self.held.embedding(name, shape)
    }
}

/// An architecture that asks for what it did not list is broken; say which.
fn not_listed(name: &str, shape: &[usize]) -> ModelError {
    ModelError::Source(format!("{name} {shape:?} is not among the parameters the architecture listed"))
}

pub(crate) enum Weight {
    Matrix(Arc<PackedMatrix>),
    Vector(Vec<f32>),
}

/// A parameter to be read, checked.
pub(crate) struct Part {
    pub(crate) spec: ParamSpec,
    pub(crate) format: FormatRef,
    /// As held.
    pub(crate) bytes: u64,
}

impl Part {
    /// Every parameter of an architecture, in execution order.
    pub(crate) fn all(arch: &dyn Architecture, files: &ModelFiles) -> Result<Vec<Self>, Error> {
        params(arch).into_iter().map(|spec| Part::new(spec, files)).collect()
    }

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
        let (name, format) = (&self.spec.name, self.format.name());
        let weight = match (&self.spec.shape[..], files.tensors.image(name).filter(|i| i.layout == PANELS)) {
            ([rows, columns], Some(image)) => {
                let matrix = PackedMatrix::from_panels_in(Some(arena), *rows, *columns, format, image.bytes);
                matrix_of(matrix, activations)
            }
            ([rows, columns], None) => {
                let stored = files.tensors.bytes(name)?;
                let matrix = match is_native(self.format) {
                    true => PackedMatrix::from_format_in(Some(arena), *rows, *columns, format, &stored),
                    false => {
                        let floats = hearth_weights::source::decode(self.format, &stored);
                        PackedMatrix::from_f32_in(Some(arena), *rows, *columns, &floats)
                    }
                };
                matrix_of(matrix, activations)
            }
            _ => Weight::Vector(files.tensors.read_f32(name)?),
        };
        report(self.bytes);
        Ok(weight)
    }

    /// The parameter from its bytes in a bundle: a matrix in panels stays where it is.
    pub(crate) fn borrow(
        &self,
        memory: &Arc<dyn Deref<Target = [u8]> + Send + Sync>,
        range: Range<usize>,
        activations: Activations,
    ) -> Weight {
        let [rows, columns] = self.spec.shape[..] else {
            return Weight::Vector(hearth_weights::source::decode(self.format, &memory[range]));
        };
        let image = Loan::new(memory.clone(), range).map(Image::Lent);
        let matrix =
            image.and_then(|image| PackedMatrix::from_image(rows, columns, self.format.name(), image));
        matrix_of(matrix, activations)
    }
}

/// # Panics
/// Without a matrix: the bytes were given another length than the plan, the arena or the bundle's manifest says.
fn matrix_of(matrix: Option<PackedMatrix>, activations: Activations) -> Weight {
    let matrix = matrix.expect("lengths are checked before bytes are read");
    Weight::Matrix(Arc::new(matrix.with_activations(activations)))
}

/// What the KV cache of such weights stores.
pub(crate) fn kv_type(parts: &[Part], arithmetic: Arithmetic) -> KvType {
    let rounds =
        arithmetic.activations == Activations::Int8 && parts.iter().any(|p| p.format.block_len() > 1);
    arithmetic.kv_type.unwrap_or(if rounds { KvType::F16 } else { KvType::F32 })
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
    embedding: Embedding,
    /// `None` where a block is streamed.
    blocks: Vec<Option<Box<dyn Block>>>,
    pub(crate) head: Head,
    pub(crate) rope: Rope,
    kv_type: KvType,
    ledger: Ledger,
    /// Held for the bytes it stands for.
    weights: Option<ResidentWeights>,
    stream: Option<Stream>,
    /// The embedding's rows, where they stay on disk.
    table: Option<Table>,
    /// Bytes of weights in host memory and on disk that every pass uses.
    streamed: [u64; 2],
    placement: Option<Placement>,
}

impl LoadedModel {
    /// Loads a model's weights, charging the ledger. `progress` may be called from several threads.
    ///
    /// # Errors
    /// As [`ResidentWeights::load`], and for an unknown architecture.
    pub fn load(
        files: &ModelFiles,
        arithmetic: impl Into<Arithmetic>,
        ledger: &Ledger,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Self, Error> {
        Self::load_aimed(files, arithmetic, Aim::Latency, ledger, progress)
    }

    /// The same; `aim` decides what the device holds where it does not hold everything.
    ///
    /// # Errors
    /// As [`LoadedModel::load`].
    pub fn load_aimed(
        files: &ModelFiles,
        arithmetic: impl Into<Arithmetic>,
        aim: Aim,
        ledger: &Ledger,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Self, Error> {
        let arithmetic = arithmetic.into();
        let activations = arithmetic.activations;
        let arch = architecture(&files.config)?;
        let parts = Part::all(arch.as_ref(), files)?;
        let kv_type = kv_type(&parts, arithmetic);
        let total = parts.iter().map(|p| p.bytes).sum();
        match footprint::check_weights(arch.config(), kv_type, total, ledger) {
            Err(Error::TooSmall(_)) if may_stream(ledger) => {
                let prepared = Prepared::new(parts, kv_type, aim, files, ledger)?;
                return Self::load_streamed(arch, prepared, files, activations, ledger, progress);
            }
            fits => fits?,
        }
        let mut weights = ResidentWeights::read(parts, files, activations, ledger, progress)?;
        let mut parts = Parts::build(arch.as_ref(), &|_| true, &mut weights, ledger)?;
        parts.weights = Some(weights);
        parts.kv_type = kv_type;
        Ok(Self(Arc::new(parts)))
    }

    fn load_streamed(
        arch: Box<dyn Architecture>,
        prepared: Prepared,
        files: &ModelFiles,
        activations: Activations,
        ledger: &Ledger,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Self, Error> {
        let Prepared { plan, resident, streamed, table, file } = prepared;
        let WeightPlan { placement, blocks, kv_type, look_ahead: ahead, .. } = plan;
        let mut weights = ResidentWeights::read(resident, files, activations, ledger, progress)?;
        weights.held.elsewhere = table.as_ref().map(|table| table.part.spec.name.clone());
        let is_resident = |i: usize| placement.tiers[i] == Tier::Device;
        let mut parts = Parts::build(arch.as_ref(), &is_resident, &mut weights, ledger)?;
        parts.weights = Some(weights);
        parts.kv_type = kv_type;
        parts.table = table.map(|table| Table::new(table, &file, ledger)).transpose()?;
        let stream = Stream::start(arch, file, streamed, activations, ahead, ledger)?;
        parts.stream = Some(stream);
        parts.streamed = [Tier::Host, Tier::Nvme].map(|tier| placement.bytes(tier, &blocks));
        parts.placement = Some(placement);
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
        Ok(Self(Arc::new(Parts::build(arch, &|_| true, source, ledger)?)))
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
        self.0.kv_type
    }

    /// Where its blocks lie, if not all of them are on the device.
    pub fn placement(&self) -> Option<&Placement> {
        self.0.placement.as_ref()
    }

    /// What was streamed so far; nothing when all weights are on the device.
    pub fn streamed(&self) -> Streamed {
        self.0.stream.as_ref().map_or(Streamed::default(), |s| s.counters().read())
    }

    /// Bytes of weights that every pass uses: all of them, and those that come from disk.
    pub fn bytes_per_pass(&self) -> (u64, u64) {
        let [host, disk] = self.0.streamed;
        (self.weight_bytes() + host + disk, disk)
    }

    /// Loads adapters for it.
    ///
    /// # Errors
    /// An unknown architecture.
    pub fn adapter_loader(&self) -> Result<AdapterLoader, Error> {
        Ok(AdapterLoader::new(architecture(self.config())?.as_ref(), self.ledger()))
    }

    pub(crate) fn stream_counters(&self) -> Option<Arc<Counters>> {
        self.0.stream.as_ref().map(|s| s.counters().clone())
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
    fn build(
        arch: &dyn Architecture,
        is_resident: &dyn Fn(usize) -> bool,
        source: &mut dyn WeightSource,
        ledger: &Ledger,
    ) -> Result<Self, Error> {
        let mut block = |i| if is_resident(i) { arch.block(i, source).map(Some) } else { Ok(None) };
        let blocks = (0..arch.num_blocks()).map(&mut block).collect::<Result<_, _>>()?;
        Ok(Self {
            config: arch.config().clone(),
            embedding: arch.embedding(source)?,
            blocks,
            head: arch.head(source)?,
            rope: Rope::new(arch.config()),
            kv_type: KvType::default(),
            ledger: ledger.clone(),
            weights: None,
            stream: None,
            table: None,
            streamed: [0; 2],
            placement: None,
        })
    }

    /// Token ids → `[ids, d_model]`.
    ///
    /// # Errors
    /// [`Error::Table`] when rows that stay on disk could not be read.
    pub(crate) fn embed(&self, ids: &[u32]) -> Result<Tensor<2>, Error> {
        match &self.table {
            None => Ok(self.embedding.forward(ids)),
            Some(table) => {
                table.rows(&self.embedding, ids).map_err(|cause| Error::Table { cause: Box::new(cause) })
            }
        }
    }

    /// The block loop: hands every block over in order, streamed ones as they come.
    ///
    /// # Errors
    /// [`Error::Streaming`] when a streamed block could not be read: those before it were handed over.
    pub(crate) fn each_block(&self, mut each: impl FnMut(usize, &dyn Block)) -> Result<(), Error> {
        let mut pass = self.stream.as_ref().map(Stream::pass);
        for (i, block) in self.blocks.iter().enumerate() {
            match (block, &mut pass) {
                (Some(block), _) => each(i, block.as_ref()),
                (None, Some(pass)) => pass
                    .with(i, &mut |block| each(i, block))
                    .map_err(|cause| Error::Streaming { block: i, cause: Box::new(cause) })?,
                (None, None) => unreachable!("a block that is not resident is streamed"),
            }
        }
        Ok(())
    }
}
