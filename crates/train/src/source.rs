//! The trainer's [`WeightSource`]: tracked tensors for trained parameters, frozen ones as they are held.

use crate::Error as TrainError;
use crate::activations::Working;
use crate::config::Compute;
use crate::copies::View;
use crate::flat::Flat;
use crate::params::ParamStore;
use crate::random::{key, word};
use burn::tensor::{Gradients, Tensor};
use hearth_model::layers::Dropout;
use hearth_model::{Error, Linear, Lora, Matrix, WeightSource};

/// Hands out weights for one forward pass of one part of the model and remembers the tracked ones.
pub(crate) struct TrainSource<'a> {
    store: &'a ParamStore,
    /// The units that were brought for it.
    views: &'a [View],
    /// Whether trained parameters are tracked.
    tape: bool,
    /// Key of this micro-batch's dropout masks; `None` outside training.
    dropout: Option<u64>,
    /// Whether linear layers come without their adapter.
    base: bool,
    leaves: Vec<Leaf>,
}

/// A tracked tensor and the trained parameter it is.
enum Leaf {
    Vector(usize, Tensor<1>),
    Matrix(usize, Tensor<2>),
}

/// The tracked tensors of one part of the model, from which gradients are taken after its backward pass.
pub(crate) struct Leaves(Vec<Leaf>);

impl<'a> TrainSource<'a> {
    pub(crate) fn new(store: &'a ParamStore, views: &'a [View], tape: bool, dropout: Option<u64>) -> Self {
        Self { store, views, tape, dropout, base: false, leaves: Vec::new() }
    }

    /// Hands out the frozen model alone, as if there were no adapter.
    pub(crate) fn without_adapter(self, base: bool) -> Self {
        Self { base, ..self }
    }

    pub(crate) fn into_leaves(self) -> Leaves {
        Leaves(self.leaves)
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, Error> {
        match self.trained_matrix(name, shape)? {
            Some(tensor) => Ok(Matrix::Dense(tensor)),
            None => self.store.frozen_matrix(name).ok_or_else(|| unknown(name)),
        }
    }

    fn trained_matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<Tensor<2>>, Error> {
        let Some(index) = self.store.position(name) else { return Ok(None) };
        expect(name, &self.store.trained()[index].shape, &shape)?;
        let tensor = self.store.tensor(index, self.views, shape);
        if !self.tape {
            return Ok(Some(tensor));
        }
        let tensor = tensor.autodiff().require_grad();
        self.leaves.push(Leaf::Matrix(index, tensor.clone()));
        Ok(Some(tensor))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        let Some(index) = self.store.position(name) else {
            return self.store.frozen_vector(name).ok_or_else(|| unknown(name));
        };
        expect(name, &self.store.trained()[index].shape, &[len])?;
        let tensor = self.store.tensor(index, self.views, [len]);
        if !self.tape {
            return Ok(tensor);
        }
        let tensor = tensor.autodiff().require_grad();
        self.leaves.push(Leaf::Vector(index, tensor.clone()));
        Ok(tensor)
    }

    fn lora(&mut self, name: &str, [out, inner]: [usize; 2]) -> Result<Option<Lora>, Error> {
        let Some(config) = self.store.lora().filter(|_| !self.base) else { return Ok(None) };
        let a = self.trained_matrix(&format!("{name}.lora_A.weight"), [config.rank, inner])?;
        let b = self.trained_matrix(&format!("{name}.lora_B.weight"), [out, config.rank])?;
        let (Some(a), Some(b)) = (a, b) else { return Ok(None) };
        let mask = |run| Dropout { p: config.dropout, key: key(&[run, word(name)]) };
        let dropout = self.dropout.filter(|_| config.dropout > 0.0).map(mask);
        let [a, b] = [a, b].map(Matrix::Dense);
        Ok(Some(Lora { a, b, scale: config.scale(), dropout }))
    }
}

impl WeightSource for TrainSource<'_> {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Error> {
        let weight = self.matrix(&format!("{name}.weight"), shape)?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), shape[0])?) } else { None };
        let linear = Linear::new(weight, bias);
        Ok(match self.lora(name, shape)? {
            Some(lora) => linear.with_lora(lora),
            None => linear,
        })
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.vector(&format!("{name}.weight"), len)
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.vector(&format!("{name}.bias"), len)
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, Error> {
        self.matrix(&format!("{name}.weight"), shape)
    }
}

/// The gradient of a trained parameter from one micro-batch, in the precision it was computed in.
pub struct Gradient(pub(crate) Flat);

impl Gradient {
    /// Its values in f32, exactly.
    pub fn into_f32(self) -> Vec<f32> {
        self.0.into_f32()
    }
}

impl Leaves {
    /// Takes each trained parameter's gradient, in the order the parameters were asked for.
    pub(crate) fn take(
        self,
        gradients: &mut Gradients,
        working: &mut Working,
        sink: &mut dyn FnMut(usize, Gradient) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        for leaf in self.0 {
            let (index, gradient) = match leaf {
                Leaf::Vector(index, tensor) => (index, values(tensor.grad_remove(gradients), tensor)),
                Leaf::Matrix(index, tensor) => (index, values(tensor.grad_remove(gradients), tensor)),
            };
            // From here on it is the sink's.
            working.give(gradient.as_bytes().len());
            sink(index, Gradient(gradient))?;
        }
        Ok(())
    }
}

/// A gradient's values; zeros for a parameter the loss does not depend on.
fn values<const D: usize>(gradient: Option<Tensor<D>>, of: Tensor<D>) -> Flat {
    match gradient {
        Some(gradient) => Flat::from_data(gradient.into_data()),
        None => Flat::zeros(Compute::of(of.dtype()), of.dims().iter().product()),
    }
}

fn expect(name: &str, found: &[usize], wanted: &[usize]) -> Result<(), Error> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::Source(format!("parameter {name} has shape {found:?}, the model asks for {wanted:?}")))
}

fn unknown(name: &str) -> Error {
    Error::Source(format!("the model asks for {name}, which is not among its parameters"))
}
