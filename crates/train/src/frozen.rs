//! Frozen parameters, in the form they are computed with.

use crate::Error;
use crate::config::{Compute, TrainConfig, hex};
use crate::flat::{Flat, tensor};
use burn::tensor::{Device, Tensor};
use bytes::Bytes;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::{Matrix, PackedMatrix, ParamSpec};
use hearth_weights::TensorSource;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::Arc;

/// Values of a frozen tensor that enter the model's identity.
const SAMPLE: usize = 64;

enum Held {
    Matrix(Matrix),
    Vector(Tensor<1>),
}

/// The frozen parameters by name.
pub(crate) struct Frozen {
    held: HashMap<String, (Held, Charge)>,
    sample: Sha256,
    device: Device,
    compute: Compute,
    quant: Option<String>,
    ledger: Ledger,
}

impl Frozen {
    pub(crate) fn new(config: &TrainConfig, device: Device, ledger: &Ledger) -> Self {
        let quant = config.adapter.as_ref().and_then(|adapter| adapter.quant.clone());
        let (held, sample) = (HashMap::new(), Sha256::new());
        Self { held, sample, device, compute: config.compute, quant, ledger: ledger.clone() }
    }

    /// Reads and keeps a parameter.
    pub(crate) fn add(&mut self, spec: &ParamSpec, source: &dyn TensorSource) -> Result<(), Error> {
        let stored = source.meta(&spec.name)?.format.name();
        let bytes = held_bytes(spec, stored, self.compute, self.quant.as_deref());
        let charge = self.ledger.charge(Tier::Device, Kind::Weights, bytes)?;
        let held = match *spec.shape {
            [rows, columns] => Held::Matrix(self.matrix(spec, rows, columns, source)?),
            _ => {
                let values = source.read_f32(&spec.name)?;
                self.sample(&spec.name, &values);
                let len = values.len();
                Held::Vector(self.tensor(values, [len]))
            }
        };
        self.held.insert(spec.name.clone(), (held, charge));
        Ok(())
    }

    /// On the CPU a matrix is packed once, in its own storage format where that has a panel layout, so that it takes
    /// no more memory than on disk; elsewhere it is a tensor.
    fn matrix(
        &mut self,
        spec: &ParamSpec,
        rows: usize,
        columns: usize,
        source: &dyn TensorSource,
    ) -> Result<Matrix, Error> {
        let (name, stored) = (&spec.name, source.meta(&spec.name)?.format.name());
        let format = held_format(spec, stored, self.compute, self.quant.as_deref());
        if self.device == Device::flex()
            && format == stored
            && let Some(packed) = PackedMatrix::from_format(rows, columns, format, &source.bytes(name)?)
        {
            let mut row = vec![0.0; columns];
            packed.read_row(0, &mut row);
            self.sample(name, &row);
            return Ok(Matrix::Packed(Arc::new(packed)));
        }
        let values = source.read_f32(name)?;
        self.sample(name, &values);
        if self.device != Device::flex() {
            return Ok(Matrix::Dense(self.tensor(values, [rows, columns])));
        }
        Ok(Matrix::Packed(Arc::new(match format {
            "f32" => PackedMatrix::from_f32(rows, columns, &values),
            "bf16" | "f16" => {
                let mut rounded = Flat::zeros(self.compute, values.len());
                rounded.write(0, &values);
                PackedMatrix::from_format(rows, columns, format, rounded.as_bytes())
                    .expect("16-bit formats have a panel layout")
            }
            quantized => self.quantize(name, quantized, rows, columns, &values)?,
        })))
    }

    /// A linear layer's weight in the quantized format of a QLoRA run.
    fn quantize(
        &self,
        name: &str,
        quant: &str,
        rows: usize,
        columns: usize,
        values: &[f32],
    ) -> Result<PackedMatrix, Error> {
        let refuse = |why: &str| {
            Error::Config(format!(
                "adapter.quant = {quant:?}: {name} of [{rows}, {columns}] {why}; use q8_0, q4_0 or q4_1, or adapter.kind = \"lora\""
            ))
        };
        let format = hearth_weights::quant::by_name(quant).map_err(|_| refuse("has no such format"))?;
        let Some(len) = hearth_weights::quant::byte_len(format, &[rows, columns]) else {
            return Err(refuse(&format!("has rows that are not whole blocks of {}", format.block_len())));
        };
        let mut bytes = vec![0; len];
        if !format.quantize(values, &mut bytes) {
            return Err(refuse("can only be read in this format"));
        }
        PackedMatrix::from_format(rows, columns, quant, &bytes)
            .ok_or_else(|| refuse("cannot be trained over"))
    }

    fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        let mut flat = Flat::zeros(self.compute, values.len());
        flat.write(0, &values);
        tensor(Bytes::from_owner(flat), shape, self.compute, &self.device)
    }

    fn sample(&mut self, name: &str, values: &[f32]) {
        self.sample.update(name);
        for value in &values[..values.len().min(SAMPLE)] {
            self.sample.update(value.to_le_bytes());
        }
    }

    pub(crate) fn matrix_named(&self, name: &str) -> Option<Matrix> {
        match &self.held.get(name)?.0 {
            Held::Matrix(matrix) => Some(matrix.clone()),
            Held::Vector(_) => None,
        }
    }

    pub(crate) fn vector_named(&self, name: &str) -> Option<Tensor<1>> {
        match &self.held.get(name)?.0 {
            Held::Vector(vector) => Some(vector.clone()),
            Held::Matrix(_) => None,
        }
    }

    /// Bytes as they are held.
    pub(crate) fn bytes(&self) -> u64 {
        self.held.values().map(|(_, charge)| charge.bytes()).sum()
    }

    /// sha256 of a sample of every tensor; empty when there is none.
    pub(crate) fn sample_sha256(&self) -> String {
        if self.held.is_empty() { String::new() } else { hex(&self.sample.clone().finalize()) }
    }
}

/// The format a frozen matrix is held in on the CPU: a QLoRA run's own for linear layers; else the stored one if it has
/// a panel layout and is not a wider float than the run computes with; else a float.
fn held_format(
    spec: &ParamSpec,
    stored: &'static str,
    compute: Compute,
    quant: Option<&str>,
) -> &'static str {
    let whole = spec.shape.last().is_some_and(|columns| columns.is_multiple_of(32));
    match (quant, stored) {
        (Some(quant), _) if spec.linear => {
            hearth_weights::quant::by_name(quant).map_or("f32", |format| format.name())
        }
        (_, "q8_0" | "q4_0" | "q4_1") if whole => stored,
        (_, "f32" | "f16" | "bf16") if compute == Compute::F32 => stored,
        _ => compute.name(),
    }
}

/// Bytes a frozen parameter takes.
pub(crate) fn held_bytes(
    spec: &ParamSpec,
    stored: &'static str,
    compute: Compute,
    quant: Option<&str>,
) -> u64 {
    let bytes = match *spec.shape {
        [rows, columns] => PackedMatrix::bytes_for(rows, columns, held_format(spec, stored, compute, quant)),
        _ => spec.len() * compute.bytes(),
    };
    bytes as u64
}
