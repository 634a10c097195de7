//! Where blocks get their layers from.

use crate::Error;
use crate::arch::Architecture;
use crate::layers::{Linear, Matrix};
use burn::tensor::{Device, Tensor};

/// Hands out layers by canonical (Hugging Face) name. Names come without the final `.weight` / `.bias`:
/// `model.layers.0.self_attn.q_proj`.
pub trait WeightSource {
    /// A linear layer `[out, in]`, with `{name}.bias` of length `out` if asked for.
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Error>;
    /// A norm's gain, `{name}.weight` of length `len`.
    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error>;
    /// A norm's bias, `{name}.bias` of length `len`.
    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error>;
    /// An embedding or tied head, `{name}.weight`: `[vocab, d_model]`.
    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, Error>;
}

/// Which step of the block loop uses a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// The token embedding.
    Embedding,
    /// Transformer block `i`.
    Block(usize),
    /// Final norm and output head.
    Head,
}

/// A parameter of an architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Full canonical name, with `.weight` or `.bias`.
    pub name: String,
    /// `[out, in]`, `[vocab, d_model]` or `[len]`.
    pub shape: Vec<usize>,
    /// First group that uses it. A tied head uses the embedding's parameter again.
    pub group: Group,
    /// Whether it is a linear layer's weight (what LoRA targets and quantizers may touch).
    pub linear: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Every parameter of an architecture in execution order, each once.
///
/// The architecture is asked for all its parts by a source that only writes down names: the list cannot
/// disagree with what a forward pass uses.
pub fn params(arch: &dyn Architecture) -> Vec<ParamSpec> {
    let mut recorder = Recorder { specs: Vec::new(), group: Group::Embedding };
    let infallible = "recording a name cannot fail";
    arch.embedding(&mut recorder).expect(infallible);
    for i in 0..arch.num_blocks() {
        recorder.group = Group::Block(i);
        arch.block(i, &mut recorder).expect(infallible);
    }
    recorder.group = Group::Head;
    arch.head(&mut recorder).expect(infallible);
    recorder.specs
}

/// Every parameter that one step of the block loop uses, with a tied head's embedding.
pub fn uses(arch: &dyn Architecture, group: Group) -> Vec<ParamSpec> {
    let mut recorder = Recorder { specs: Vec::new(), group };
    let infallible = "recording a name cannot fail";
    match group {
        Group::Embedding => drop(arch.embedding(&mut recorder).expect(infallible)),
        Group::Block(i) => drop(arch.block(i, &mut recorder).expect(infallible)),
        Group::Head => drop(arch.head(&mut recorder).expect(infallible)),
    }
    recorder.specs
}

struct Recorder {
    specs: Vec<ParamSpec>,
    group: Group,
}

impl Recorder {
    fn record(&mut self, name: String, shape: Vec<usize>, linear: bool) {
        if self.specs.iter().all(|s| s.name != name) {
            self.specs.push(ParamSpec { name, shape, group: self.group, linear });
        }
    }
}

impl WeightSource for Recorder {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Error> {
        self.record(format!("{name}.weight"), shape.to_vec(), true);
        if bias {
            self.record(format!("{name}.bias"), vec![shape[0]], false);
        }
        Ok(Linear::new(Matrix::Shape(shape), None))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.record(format!("{name}.weight"), vec![len], false);
        Ok(Tensor::empty([0], &Device::flex()))
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, Error> {
        self.record(format!("{name}.bias"), vec![len], false);
        Ok(Tensor::empty([0], &Device::flex()))
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, Error> {
        self.record(format!("{name}.weight"), shape.to_vec(), false);
        Ok(Matrix::Shape(shape))
    }
}
