//! hearth against Hugging Face transformers: logits, loss, every gradient and a greedy run of tiny random models.
//!
//! The models and their references lie in `fixtures/parity`, one directory per case; `fixtures/README.md` says what
//! each holds to account. Further ones are taken from the directory that `HEARTH_PARITY_DIR` names, if it is set.

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use hearth_model::context::{DocumentContext, RowPosition};
use hearth_model::rope::Rope;
use hearth_model::{Architecture, Embedding, Head, Linear, Lora, Matrix, WeightSource, architecture, device};
use hearth_weights::{Adapter, Merged, ModelConfig, ModelFiles, open_adapter};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Largest difference of a logit; logits are of order one.
const LOGITS_TOLERANCE: f64 = 1e-5;
/// Largest relative difference of the loss.
const LOSS_TOLERANCE: f64 = 1e-6;
/// Largest difference of a gradient, relative in Frobenius norm.
const GRADIENT_TOLERANCE: f64 = 1e-5;
/// Largest difference of a cosine or sine: a bit of its own, none of its angle's.
const ROTARY_TOLERANCE: f64 = 2e-7;

#[test]
fn logits_are_those_of_transformers() {
    every_case(|case| {
        let model = Model::load(&case.join("model"), false, None)?;
        let reference = Reference::read(&case.join("reference.safetensors"))?;
        check_logits(&model, &reference)
    });
}

#[test]
fn loss_and_every_gradient_are_those_of_transformers() {
    every_case(|case| {
        let model = Model::load(&case.join("model"), true, None)?;
        let reference = Reference::read(&case.join("reference.safetensors"))?;
        check_gradients(&model, &reference, |parameter| format!("grad.{parameter}"))
    });
}

#[test]
fn greedy_generation_is_that_of_transformers_token_for_token() {
    every_case(|case| {
        let model = Model::load(&case.join("model"), false, None)?;
        let reference = Reference::read(&case.join("reference.safetensors"))?;
        let (mut ids, expected) = (reference.ids("prompt_ids")?, reference.ids("generated_ids")?);
        let prompt = ids.len();
        for _ in 0..expected.len() {
            let logits = model.logits(&ids)?;
            let last = &logits[logits.len() - model.vocab()..];
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]));
            ids.push(best.context("the vocabulary is empty")? as u32);
        }
        ensure!(ids[prompt..] == expected, "generated {:?}, transformers {expected:?}", &ids[prompt..]);
        Ok(())
    });
}

#[test]
fn lora_logits_and_gradients_are_those_of_peft() {
    report(lora_cases(), |case| {
        let adapter = open_adapter(&case.join("adapter"))?;
        let reference = Reference::read(&case.join("reference.safetensors"))?;
        check_logits(&Model::load(&lora_base(), false, Some(&adapter))?, &reference)?;
        let model = Model::load(&lora_base(), true, Some(&adapter))?;
        check_gradients(&model, &reference, |parameter| format!("grad.base_model.model.{parameter}"))
    });
}

#[test]
fn merged_adapters_give_the_logits_of_peft() {
    report(lora_cases(), |case| {
        let mut files = hearth_weights::open(&lora_base())?;
        files.tensors = Box::new(Merged::new(files.tensors, open_adapter(&case.join("adapter"))?)?);
        let reference = Reference::read(&case.join("reference.safetensors"))?;
        check_logits(&Model::build(&files, false, None)?, &reference)
    });
}

#[test]
fn rotary_angles_stay_those_of_transformers_at_long_positions() {
    let path = fixtures().join("rope.json");
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for case in &cases {
        let numbers =
            |v: &serde_json::Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let positions: Vec<f64> = numbers(&case["positions"]);
        let length = case["length"].as_u64().unwrap() as u32;
        let rows: Vec<_> = positions.iter().map(|&p| RowPosition { position: p as u32, length }).collect();
        let config = ModelConfig::from_hf(case["config"].as_object().unwrap()).unwrap();
        let table = Rope::new(&config).table(&rows);
        for (name, found) in [("cos", table.cos()), ("sin", table.sin())] {
            let expected: Vec<f64> = case[name].as_array().unwrap().iter().flat_map(numbers).collect();
            assert_eq!(found.len(), expected.len(), "{:?}", config.rope);
            let pairs = found.iter().zip(&expected);
            let error = pairs.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, nan_or_max);
            assert!(error <= ROTARY_TOLERANCE, "{name} differs by {error:e}: {:?}", config.rope);
        }
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn lora_cases() -> Vec<PathBuf> {
    ["plain", "rslora"].map(|variant| fixtures().join("lora").join(variant)).into()
}

/// The model the adapters are for.
fn lora_base() -> PathBuf {
    fixtures().join("parity/llama-gqa-tied/model")
}

/// Tries a claim on every case and tells all that fail.
fn every_case(claim: fn(&Path) -> Result<()>) {
    let committed = fixtures().join("parity");
    let mut cases = directories(&committed);
    assert!(cases.len() >= 24, "{} has lost cases: {} are left", committed.display(), cases.len());
    if let Some(more) = std::env::var_os("HEARTH_PARITY_DIR") {
        cases.extend(directories(Path::new(&more)));
    }
    report(cases, claim);
}

fn report(cases: Vec<PathBuf>, claim: impl Fn(&Path) -> Result<()>) {
    let tell =
        |case: &PathBuf, error| format!("{}: {error:#}", case.file_name().unwrap_or_default().display());
    let failures: Vec<_> = cases.iter().filter_map(|c| claim(c).err().map(|e| tell(c, e))).collect();
    assert!(
        failures.is_empty(),
        "{} of {} cases fail:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

fn directories(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut paths: Vec<_> =
        entries.map(|e| e.expect("a directory entry").path()).filter(|p| p.is_dir()).collect();
    paths.sort();
    paths
}

/// Both sequences, each in a forward pass of its own.
fn check_logits(model: &Model, reference: &Reference) -> Result<()> {
    for i in 0..2 {
        let logits = model.logits(&reference.ids(&format!("input_ids.{i}"))?)?;
        let expected = reference.floats(&format!("logits.{i}"))?;
        ensure!(logits.len() == expected.len(), "{} logits, transformers {}", logits.len(), expected.len());
        let pairs = logits.iter().zip(&expected);
        let error = pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, nan_or_max);
        ensure!(error <= LOGITS_TOLERANCE, "logits of sequence {i} differ by {error:e}");
    }
    Ok(())
}

/// Both sequences in one packed forward pass, and its backward pass.
fn check_gradients(model: &Model, reference: &Reference, name: fn(&str) -> String) -> Result<()> {
    let (mut ids, mut targets, mut documents) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..2 {
        let labels = reference.integers(&format!("labels.{i}"))?;
        documents.push(labels.len());
        ids.extend(reference.ids(&format!("input_ids.{i}"))?);
        targets.extend(labels[1..].iter().map(|&label| label as i32).chain([-100]));
    }
    let trained = targets.iter().filter(|&&t| t >= 0).count();
    let nll = model.head.nll_sum(model.residual(&ids, &documents)?, targets.into());
    let loss = nll.div_scalar(trained as f32);
    let (value, expected) =
        (f64::from(loss.clone().into_scalar::<f32>()), f64::from(reference.floats("loss")?[0]));
    let error = (value / expected - 1.0).abs();
    ensure!(error <= LOSS_TOLERANCE, "loss is {value}, transformers {expected}: differs by {error:e}");

    let gradients = model.parameters.gradients(&loss.backward())?;
    let references = reference.names().filter(|n| n.starts_with("grad.")).count();
    ensure!(gradients.len() == references, "{} gradients, transformers has {references}", gradients.len());
    for (parameter, gradient) in &gradients {
        let expected = reference.floats(&name(parameter))?;
        ensure!(
            gradient.len() == expected.len(),
            "the gradient of {parameter} has {} elements",
            gradient.len()
        );
        let error = relative_frobenius(gradient, &expected);
        ensure!(error <= GRADIENT_TOLERANCE, "the gradient of {parameter} differs by {error:e}");
    }
    Ok(())
}

/// `‖a − b‖ / ‖b‖`.
fn relative_frobenius(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (difference / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

/// Unlike [`f64::max`] never drops a NaN.
fn nan_or_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// A model in parts, with the parameters it was built from.
struct Model {
    architecture: Box<dyn Architecture>,
    embedding: Embedding,
    blocks: Vec<Box<dyn hearth_model::Block>>,
    head: Head,
    rope: Rope,
    parameters: Parameters,
}

impl Model {
    /// With `tracked`, gradients are kept: of every parameter, or of the adapter's if there is one.
    fn load(path: &Path, tracked: bool, adapter: Option<&Adapter>) -> Result<Self> {
        Self::build(&hearth_weights::open(path)?, tracked, adapter)
    }

    fn build(files: &ModelFiles, tracked: bool, adapter: Option<&Adapter>) -> Result<Self> {
        let cpu = device::open("cpu")?;
        let device = if tracked { cpu.autodiff() } else { cpu };
        let mut source = Source { files, adapter, parameters: Parameters::new(device, tracked) };
        let architecture = architecture(&files.config)?;
        let embedding = architecture.embedding(&mut source)?;
        let blocks = (0..architecture.num_blocks())
            .map(|i| architecture.block(i, &mut source))
            .collect::<Result<_, _>>()?;
        let head = architecture.head(&mut source)?;
        let (rope, parameters) = (Rope::new(&files.config), source.parameters);
        Ok(Self { architecture, embedding, blocks, head, rope, parameters })
    }

    fn vocab(&self) -> usize {
        self.architecture.config().vocab_size
    }

    /// The residual stream `[ids, d_model]` after the last transformer block; `documents` are lengths.
    fn residual(&self, ids: &[u32], documents: &[usize]) -> Result<Tensor<2>> {
        ensure!(ids.iter().all(|&id| (id as usize) < self.vocab()), "a token id is outside the vocabulary");
        let mut context = DocumentContext::new(&self.rope, documents);
        let x = self.embedding.forward(ids);
        Ok(self.blocks.iter().fold(x, |x, block| block.forward(x, &mut context)))
    }

    /// Logits of one sequence, `[ids × vocab]` row by row.
    fn logits(&self, ids: &[u32]) -> Result<Vec<f32>> {
        values(self.head.logits(self.residual(ids, &[ids.len()])?))
    }
}

/// Leaf tensors by name, each made once: a tied head is the embedding's own tensor.
struct Parameters {
    device: Device,
    tracked: bool,
    matrices: BTreeMap<String, Tensor<2>>,
    vectors: BTreeMap<String, Tensor<1>>,
}

impl Parameters {
    fn new(device: Device, tracked: bool) -> Self {
        Self { device, tracked, matrices: BTreeMap::new(), vectors: BTreeMap::new() }
    }

    fn leaf<const D: usize>(&self, values: Vec<f32>, shape: [usize; D], tracked: bool) -> Tensor<D> {
        let tensor = Tensor::from_data(TensorData::new(values, shape), &self.device);
        if self.tracked && tracked { tensor.require_grad() } else { tensor }
    }

    /// Every tracked parameter's gradient.
    fn gradients(&self, gradients: &burn::tensor::Gradients) -> Result<Vec<(String, Vec<f32>)>> {
        let mut found = Vec::new();
        for (name, parameter) in self.matrices.iter().filter(|(_, p)| p.is_require_grad()) {
            found.push((name.clone(), values(parameter.grad(gradients).with_context(|| name.clone())?)?));
        }
        for (name, parameter) in self.vectors.iter().filter(|(_, p)| p.is_require_grad()) {
            found.push((name.clone(), values(parameter.grad(gradients).with_context(|| name.clone())?)?));
        }
        Ok(found)
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.into_data().try_to_vec().map_err(|e| anyhow::anyhow!("{e:?}"))
}

/// Hands out tracked tensors read from a model on disk.
struct Source<'a> {
    files: &'a ModelFiles,
    adapter: Option<&'a Adapter>,
    parameters: Parameters,
}

impl Source<'_> {
    fn matrix(&mut self, name: String, shape: [usize; 2]) -> Result<Tensor<2>, hearth_model::Error> {
        if let Some(known) = self.parameters.matrices.get(&name) {
            return Ok(known.clone());
        }
        let values = self.files.tensors.read_f32(&name)?;
        let tensor = self.parameters.leaf(values, shape, self.adapter.is_none());
        self.parameters.matrices.insert(name, tensor.clone());
        Ok(tensor)
    }

    fn vector(&mut self, name: String, len: usize) -> Result<Tensor<1>, hearth_model::Error> {
        let values = self.files.tensors.read_f32(&name)?;
        let tensor = self.parameters.leaf(values, [len], self.adapter.is_none());
        self.parameters.vectors.insert(name, tensor.clone());
        Ok(tensor)
    }

    fn lora(&mut self, name: &str, [outer, inner]: [usize; 2]) -> Result<Option<Lora>, hearth_model::Error> {
        let Some(adapter) = self.adapter else { return Ok(None) };
        if adapter.modules.iter().all(|module| module != name) {
            return Ok(None);
        }
        let mut half = |which: &str, shape| {
            let name = format!("{name}.{which}.weight");
            let tensor = self.parameters.leaf(adapter.tensors.read_f32(&name)?, shape, true);
            self.parameters.matrices.insert(name, tensor.clone());
            Ok::<_, hearth_model::Error>(tensor)
        };
        let (a, b) = (half("lora_A", [adapter.rank, inner])?, half("lora_B", [outer, adapter.rank])?);
        let [a, b] = [a, b].map(Matrix::Dense);
        Ok(Some(Lora { a, b, scale: adapter.scale(adapter.rank) as f32, dropout: None }))
    }
}

impl WeightSource for Source<'_> {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, hearth_model::Error> {
        let weight = Matrix::Dense(self.matrix(format!("{name}.weight"), shape)?);
        let bias = if bias { Some(self.vector(format!("{name}.bias"), shape[0])?) } else { None };
        let linear = Linear::new(weight, bias);
        Ok(match self.lora(name, shape)? {
            Some(lora) => linear.with_lora(lora),
            None => linear,
        })
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, hearth_model::Error> {
        self.vector(format!("{name}.weight"), len)
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, hearth_model::Error> {
        self.vector(format!("{name}.bias"), len)
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, hearth_model::Error> {
        Ok(Matrix::Dense(self.matrix(format!("{name}.weight"), shape)?))
    }
}

/// A safetensors file of reference values, read whole.
struct Reference {
    tensors: BTreeMap<String, Vec<u8>>,
}

impl Reference {
    fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        let file = SafeTensors::deserialize(&bytes)?;
        let tensors = file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
        Ok(Self { tensors })
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.tensors.get(name).map(Vec::as_slice).with_context(|| format!("the reference has no {name}"))
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.bytes(name)?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.bytes(name)?.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
    }

    fn ids(&self, name: &str) -> Result<Vec<u32>> {
        self.integers(name)?.into_iter().map(|id| Ok(u32::try_from(id)?)).collect()
    }
}
