//! Linear layers: a matrix in whatever form it is held, perhaps a bias, perhaps a low-rank adapter.

use crate::context::AttentionContext;
use burn::tensor::{Device, Tensor};
use hearth_kernels as kernels;
use hearth_kernels::PackedMatrix;
use hearth_kernels::cpu::block::Projection;
use std::sync::Arc;

/// A weight matrix `[out, in]` in one of the forms a source may hold it.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "a tensor is a handle; a few hundred of them exist")]
pub enum Matrix {
    /// A tensor, row-major, f32 or bf16; may be tracked.
    Dense(Tensor<2>),
    /// Frozen, in panel layout, dense or quantized.
    Packed(Arc<PackedMatrix>),
    /// Only a shape: what a recorder hands out. Never computed with.
    Shape([usize; 2]),
}

impl Matrix {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Matrix::Dense(w) => w.dims(),
            Matrix::Packed(w) => [w.rows(), w.columns()],
            Matrix::Shape(shape) => *shape,
        }
    }

    /// `x·wᵀ`: `[rows, in]` → `[rows, out]`.
    pub fn project(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Matrix::Dense(w) => kernels::linear(x, w.clone()),
            Matrix::Packed(w) => kernels::linear_packed(x, w.clone()),
            Matrix::Shape(_) => unreachable!("a recorded shape has no weights"),
        }
    }

    /// Rows `ids`: `[ids, in]`.
    pub fn rows(&self, ids: &[u32]) -> Tensor<2> {
        match self {
            Matrix::Dense(w) => kernels::embedding(w.clone(), ids.into()),
            Matrix::Packed(w) => {
                let mut values = vec![0.0; ids.len() * w.columns()];
                for (row, &id) in values.chunks_exact_mut(w.columns()).zip(ids) {
                    w.read_row(id as usize, row);
                }
                Tensor::<1>::from_floats(values.as_slice(), &Device::flex()).reshape([ids.len(), w.columns()])
            }
            Matrix::Shape(_) => unreachable!("a recorded shape has no weights"),
        }
    }

    /// Sum of `−log softmax(h·wᵀ)[target]`, `[1]`.
    pub fn cross_entropy(&self, h: Tensor<2>, targets: Arc<[i32]>) -> Tensor<1> {
        match self {
            Matrix::Dense(w) => kernels::linear_cross_entropy(h, w.clone(), targets),
            Matrix::Packed(w) => kernels::linear_cross_entropy_packed(h, w.clone(), targets),
            Matrix::Shape(_) => unreachable!("a recorded shape has no weights"),
        }
    }
}

/// A vector of weights in memory.
pub(super) fn floats(x: Tensor<1>) -> Vec<f32> {
    x.into_data().convert::<f32>().try_into_vec().expect("converted")
}

/// A low-rank adapter (LoRA, arXiv 2106.09685): adds `scale · B·A·dropout(x)`.
#[derive(Clone)]
pub struct Lora {
    /// `[rank, in]`.
    pub a: Matrix,
    /// `[out, rank]`.
    pub b: Matrix,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f32,
    /// While training only.
    pub dropout: Option<Dropout>,
}

impl Lora {
    /// What it adds to the layer's output. `x`: `[rows, in]` → `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = match self.dropout {
            Some(d) => kernels::dropout(x, d.p, d.key),
            None => x,
        };
        self.b.project(self.a.project(x)) * self.scale
    }
}

/// Dropout with its mask's key: equal keys give equal masks.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Probability of dropping.
    pub p: f32,
    /// Names layer, step and sample.
    pub key: u64,
}

/// `y = x·wᵀ + b`, plus an adapter's share.
#[derive(Clone)]
pub struct Linear {
    weight: Matrix,
    bias: Option<Tensor<1>>,
    lora: Option<Lora>,
    /// What the context of a pass knows it by.
    name: Option<Arc<str>>,
}

impl Linear {
    /// Without adapter.
    pub fn new(weight: Matrix, bias: Option<Tensor<1>>) -> Self {
        Self { weight, bias, lora: None, name: None }
    }

    /// Adds an adapter.
    pub fn with_lora(mut self, lora: Lora) -> Self {
        self.lora = Some(lora);
        self
    }

    /// Lets the context of a pass add what adapters of its own say to a layer of this canonical name.
    pub fn named(mut self, name: &str) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Its matrix, if that is all it consists of and a gradient is wanted for it.
    pub(super) fn trained(&self) -> Option<Tensor<2>> {
        match self {
            Linear { weight: Matrix::Dense(w), bias: None, lora: None, name: None }
                if w.is_require_grad() =>
            {
                Some(w.clone())
            }
            _ => None,
        }
    }

    /// The layer as [`kernels::cpu::block`] takes it; `None` unless it is a matrix that multiplies 8-bit activations, without
    /// adapter.
    pub(crate) fn projection(&self) -> Option<Projection> {
        match (&self.weight, &self.lora) {
            (Matrix::Packed(matrix), None) => {
                Projection::new(matrix.clone(), self.bias.as_ref().map(|b| floats(b.clone())))
            }
            _ => None,
        }
    }

    /// `x`: `[rows, in]` → `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let mut y = self.weight.project(x.clone());
        if let Some(bias) = &self.bias {
            y = y + bias.clone().unsqueeze::<2>();
        }
        if let Some(lora) = &self.lora {
            y = y + lora.forward(x.clone());
        }
        match &self.name {
            Some(name) => context.adapt(name, x, y),
            None => y,
        }
    }
}
