//! Parameters: f32 masters as flat slices, and the frozen weights beside them.

use crate::Error;
use crate::config::{Compute, LoraConfig, TrainConfig, hex};
use crate::lora;
use burn::tensor::{AllocationProperty, Bytes, DType, Device, Tensor, TensorData};
use half::bf16;
use hearth_model::{Architecture, Group, Matrix, PackedMatrix, ParamSpec, params};
use hearth_weights::TensorSource;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::Arc;

/// Values of a frozen tensor that enter the model's identity.
const SAMPLE: usize = 64;
/// Elements one task rounds.
const ROUND_CHUNK: usize = 1 << 16;

/// A trained parameter.
pub struct Param {
    /// Canonical name; an adapter's is `<linear layer>.lora_A.weight` or `….lora_B.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First step of the block loop that uses it.
    pub group: Group,
    /// f32 master. Tensors borrow it while they live.
    values: Arc<Vec<f32>>,
}

impl Param {
    /// The master.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The master, to be changed. Tensors made before keep the old values.
    pub fn values_mut(&mut self) -> &mut Vec<f32> {
        Arc::make_mut(&mut self.values)
    }

    /// Whether a tensor still borrows the master, so that changing it would copy it.
    pub fn is_borrowed(&self) -> bool {
        Arc::strong_count(&self.values) > 1
    }
}

/// A frozen parameter, in the form it is computed with.
enum Frozen {
    Matrix(Matrix, usize),
    Vector(Tensor<1>, usize),
}

/// Every parameter of a model: the trained ones in execution order, the frozen ones by name.
pub struct ParamStore {
    trained: Vec<Param>,
    index: HashMap<String, usize>,
    frozen: HashMap<String, Frozen>,
    frozen_sample: Sha256,
    device: Device,
    compute: Compute,
    lora: Option<LoraConfig>,
}

impl ParamStore {
    /// Loads every parameter of `arch`. Without an adapter all are trained; with one only the adapter's factors are,
    /// fresh: A uniform as in PEFT, drawn by `(seed, name)`, B zero.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; [`Error::Config`] for a target that matches no linear layer.
    pub fn load(
        arch: &dyn Architecture,
        source: &dyn TensorSource,
        config: &TrainConfig,
        device: Device,
    ) -> Result<Self, Error> {
        let specs = params(arch);
        let mut store = Self {
            trained: Vec::new(),
            index: HashMap::new(),
            frozen: HashMap::new(),
            frozen_sample: Sha256::new(),
            device,
            compute: config.compute,
            lora: config.adapter.clone(),
        };
        for spec in &specs {
            check_shape(source, spec)?;
            match &config.adapter {
                None => {
                    store.add(spec.name.clone(), spec.shape.clone(), spec.group, source.read_f32(&spec.name)?)
                }
                Some(_) => store.freeze(spec, source)?,
            }
        }
        if let Some(adapter) = &config.adapter {
            for spec in lora::targets(&specs, adapter)? {
                for (name, shape, values) in lora::factors(spec, adapter.rank, config.seed) {
                    store.add(name, shape, spec.group, values);
                }
            }
        }
        Ok(store)
    }

    fn add(&mut self, name: String, shape: Vec<usize>, group: Group, values: Vec<f32>) {
        self.index.insert(name.clone(), self.trained.len());
        self.trained.push(Param { name, shape, group, values: Arc::new(values) });
    }

    fn freeze(&mut self, spec: &ParamSpec, source: &dyn TensorSource) -> Result<(), Error> {
        let frozen = match *spec.shape {
            [rows, columns] => self.frozen_matrix(&spec.name, rows, columns, source)?,
            _ => {
                let values = Arc::new(source.read_f32(&spec.name)?);
                self.sample(&spec.name, &values);
                Frozen::Vector(self.tensor(&values, [values.len()]), 4 * values.len())
            }
        };
        self.frozen.insert(spec.name.clone(), frozen);
        Ok(())
    }

    /// On the CPU a frozen matrix is packed once, in its own storage format where that has a panel layout, so that it
    /// takes no more memory than on disk; elsewhere it is a tensor.
    fn frozen_matrix(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
        source: &dyn TensorSource,
    ) -> Result<Frozen, Error> {
        let format = source.meta(name)?.format.name();
        let stored = match (self.compute, format) {
            // Rounded like a trained weight would be.
            (Compute::Bf16, "f32" | "f16") => None,
            _ => PackedMatrix::from_format(rows, columns, format, &source.bytes(name)?),
        };
        let on_cpu = self.device == Device::flex();
        if let Some(packed) = stored.filter(|_| on_cpu) {
            let mut row = vec![0.0; columns];
            packed.read_row(0, &mut row);
            self.sample(name, &row);
            let bytes = packed.bytes();
            return Ok(Frozen::Matrix(Matrix::Packed(Arc::new(packed)), bytes));
        }
        let values = Arc::new(source.read_f32(name)?);
        self.sample(name, &values);
        if !on_cpu {
            let bytes = values.len() * if self.compute == Compute::Bf16 { 2 } else { 4 };
            return Ok(Frozen::Matrix(Matrix::Dense(self.tensor(&values, [rows, columns])), bytes));
        }
        let packed = match self.compute {
            Compute::F32 => PackedMatrix::from_f32(rows, columns, &values),
            Compute::Bf16 => {
                let bytes: Vec<u8> = round(&values).into_iter().flat_map(bf16::to_le_bytes).collect();
                PackedMatrix::from_format(rows, columns, "bf16", &bytes).expect("bf16 has a panel layout")
            }
        };
        let bytes = packed.bytes();
        Ok(Frozen::Matrix(Matrix::Packed(Arc::new(packed)), bytes))
    }

    fn sample(&mut self, name: &str, values: &[f32]) {
        self.frozen_sample.update(name);
        for value in &values[..values.len().min(SAMPLE)] {
            self.frozen_sample.update(value.to_le_bytes());
        }
    }

    /// A tensor of the compute precision that borrows `values` (f32 on the CPU) or holds a rounded copy.
    fn tensor<const D: usize>(&self, values: &Arc<Vec<f32>>, shape: [usize; D]) -> Tensor<D> {
        let data = match self.compute {
            Compute::F32 => {
                let shared = bytes::Bytes::from_owner(Shared(values.clone()));
                let bytes = Bytes::from_shared(shared, AllocationProperty::Native);
                TensorData::from_bytes(bytes, shape, DType::F32)
            }
            Compute::Bf16 => TensorData::new(round(values), shape),
        };
        let dtype = data.dtype();
        Tensor::from_data(data, (&self.device, dtype))
    }

    /// Trained parameters in execution order.
    pub fn trained(&self) -> &[Param] {
        &self.trained
    }

    /// Trained parameters, to be changed.
    pub fn trained_mut(&mut self) -> &mut [Param] {
        &mut self.trained
    }

    /// Place of a trained parameter in [`ParamStore::trained`].
    pub fn position(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// A trained parameter as a tensor of the compute precision, untracked.
    pub(crate) fn trained_tensor<const D: usize>(&self, index: usize, shape: [usize; D]) -> Tensor<D> {
        self.tensor(&self.trained[index].values, shape)
    }

    /// A frozen matrix.
    pub(crate) fn frozen_matrix_named(&self, name: &str) -> Option<Matrix> {
        match self.frozen.get(name)? {
            Frozen::Matrix(matrix, _) => Some(matrix.clone()),
            Frozen::Vector(..) => None,
        }
    }

    /// A frozen vector.
    pub(crate) fn frozen_vector(&self, name: &str) -> Option<Tensor<1>> {
        match self.frozen.get(name)? {
            Frozen::Vector(vector, _) => Some(vector.clone()),
            Frozen::Matrix(..) => None,
        }
    }

    /// The adapter's configuration, if one is trained.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Arithmetic of the forward and backward pass.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Number of trained elements.
    pub fn trained_len(&self) -> usize {
        self.trained.iter().map(|p| p.values.len()).sum()
    }

    /// Bytes of the trained masters.
    pub fn trained_bytes(&self) -> usize {
        self.trained.iter().map(|p| size_of_val(p.values.as_slice())).sum()
    }

    /// Bytes of the frozen parameters as they are held.
    pub fn frozen_bytes(&self) -> usize {
        let bytes = |frozen: &Frozen| match frozen {
            Frozen::Matrix(_, bytes) | Frozen::Vector(_, bytes) => *bytes,
        };
        self.frozen.values().map(bytes).sum()
    }

    /// sha256 of names and shapes of the trained parameters.
    pub fn parameters_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for param in &self.trained {
            hash.update(format!("{} {:?}\n", param.name, param.shape));
        }
        hex(&hash.finalize())
    }

    /// sha256 of a sample of every frozen tensor; empty when there is none.
    pub fn frozen_sample_sha256(&self) -> String {
        if self.frozen.is_empty() { String::new() } else { hex(&self.frozen_sample.clone().finalize()) }
    }
}

/// Refuses a tensor of another shape before anything is read.
fn check_shape(source: &dyn TensorSource, spec: &ParamSpec) -> Result<(), Error> {
    let meta = source.meta(&spec.name)?;
    if meta.shape == spec.shape {
        return Ok(());
    }
    Err(Error::Weights(hearth_weights::Error::WrongShape {
        path: source.origin().to_owned(),
        tensor: spec.name.clone(),
        found: meta.shape.clone(),
        expected: spec.shape.clone(),
    }))
}

fn round(values: &[f32]) -> Vec<bf16> {
    let mut rounded = vec![bf16::ZERO; values.len()];
    rounded.par_chunks_mut(ROUND_CHUNK).zip(values.par_chunks(ROUND_CHUNK)).for_each(|(to, from)| {
        for (to, from) in to.iter_mut().zip(from) {
            *to = bf16::from_f32(*from);
        }
    });
    rounded
}

/// A master seen as bytes, for as long as a tensor needs it.
struct Shared(Arc<Vec<f32>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
