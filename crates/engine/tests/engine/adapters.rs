//! Adapters laid over the running model: the trainer's arithmetic, row by row, within the budget.

use crate::fixtures::*;
use crate::formats::converted;
use crate::invariance::{bits, requests};
use crate::scoring::{DenseWeights, training_logits};
use burn::tensor::Tensor;
use hearth_engine::api::{Adapter, Event, Pooling, Request, SubmitError};
use hearth_engine::sampler::logprobs::LogSoftmax;
use hearth_engine::{Activations, Engine, EngineConfig, EngineHandle, Error, LoadedModel};
use hearth_memory::{Budget, Ledger, Tier};
use hearth_model::{Error as ModelError, Linear, Lora, Matrix, WeightSource, architecture, params};
use hearth_weights::{AdapterSpec, ModelFiles, quant, write_adapter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The model the fixtures' adapters are for.
const BASE: &str = "parity/llama-gqa-tied";

fn peft(variant: &str) -> PathBuf {
    fixtures().join("lora").join(variant).join("adapter")
}

/// An adapter of every linear layer, with values that differ by `salt`.
fn everywhere(files: &ModelFiles, rank: usize, salt: usize, directory: &Path) -> PathBuf {
    let path = directory.join(format!("adapter-{rank}-{salt}"));
    let value = |i: usize| ((i * 31 + salt * 17 + i * i % 97) % 201) as f32 / 1000.0 - 0.1;
    let mut tensors = Vec::new();
    for spec in params(architecture(&files.config).expect("known").as_ref()) {
        if let Some(module) = spec.name.strip_suffix(".weight").filter(|_| spec.linear) {
            let (out, inner) = (spec.shape[0], spec.shape[1]);
            for (which, shape) in [("lora_A", vec![rank, inner]), ("lora_B", vec![out, rank])] {
                let values = (0..shape[0] * shape[1]).map(value).collect();
                tensors.push((format!("{module}.{which}.weight"), shape, values));
            }
        }
    }
    write(&path, rank, &tensors);
    path
}

fn write(path: &Path, rank: usize, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    let spec = AdapterSpec {
        rank,
        alpha: 2.0 * rank as f64,
        rslora: false,
        dropout: 0.0,
        targets: vec!["all-linear".into()],
        base_model: "base".into(),
    };
    write_adapter(path, &spec, tensors).expect("a new directory");
}

fn start_for_adapters(model: &LoadedModel, max_seqs: usize, max_batch_tokens: usize) -> EngineHandle {
    let config = EngineConfig { max_seqs, max_batch_tokens, adapter_rank: 64, ..EngineConfig::default() };
    Engine::start(model.clone(), config).expect("fits without a budget")
}

fn adapted(request: &Request, adapter: Option<&Arc<Adapter>>) -> Request {
    Request { adapter: adapter.cloned(), ..request.clone() }
}

/// Weights as the trainer holds them, with an adapter in its own layers.
struct Trained<'a>(DenseWeights<'a>, hearth_weights::Adapter);

impl WeightSource for Trained<'_> {
    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear, ModelError> {
        let linear = self.0.linear(name, shape, bias)?;
        if self.1.modules.iter().all(|module| module != name) {
            return Ok(linear);
        }
        let factor = |which: &str| {
            let name = format!("{name}.{which}.weight");
            self.1.tensors.read_f32(&name).map(|values| (values, self.1.rank))
        };
        let ((a, rank), (b, _)) = (factor("lora_A")?, factor("lora_B")?);
        let matrix = |values: Vec<f32>, shape| {
            Matrix::Dense(Tensor::<1>::from_floats(values.as_slice(), &Default::default()).reshape(shape))
        };
        let (a, b) = (matrix(a, [rank, shape[1]]), matrix(b, [shape[0], rank]));
        Ok(linear.with_lora(Lora { a, b, scale: self.1.scale(rank) as f32, dropout: None }))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.0.norm(name, len)
    }

    fn norm_bias(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.0.norm_bias(name, len)
    }

    fn embedding(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, ModelError> {
        self.0.embedding(name, shape)
    }
}

/// The prompt's log-probabilities over the whole vocabulary, as bits, each after the first.
fn served(engine: &EngineHandle, prompt: &[u32], adapter: &Arc<Adapter>, vocab: usize) -> Vec<u32> {
    let mut request = adapted(&greedy(prompt, 0), Some(adapter));
    request.prompt_logprobs = Some(vocab);
    let events = events(engine.submit(request).expect("fits"));
    let Event::Prompt(rows) = &events[0] else { panic!("{events:?}") };
    let row = |r: &hearth_engine::api::TokenLogprobs| {
        r.top.iter().flat_map(|(t, p)| [*t, p.to_bits()]).collect::<Vec<_>>()
    };
    rows.iter().flatten().flat_map(row).collect()
}

#[test]
fn a_live_adapter_gives_the_bits_of_the_training_forward() {
    let files = open(BASE);
    let vocab = files.config.vocab_size;
    let engine = start_for_adapters(&load(&files), 2, 7);
    let scratch = tempfile::tempdir().expect("a directory");
    for path in [peft("plain"), peft("rslora"), everywhere(&files, 5, 1, scratch.path())] {
        let adapter = engine.load_adapter(&path).expect("fits");
        let prompt: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % vocab as u32).collect();
        let weights = &mut Trained(DenseWeights(&files), hearth_weights::open_adapter(&path).expect("valid"));
        let logits = training_logits(&files, weights, &[&prompt]);
        let rows = logits.chunks_exact(vocab).take(prompt.len() - 1).flat_map(|row| {
            let top = LogSoftmax::new(row).expect("finite").top(vocab);
            top.into_iter().flat_map(|(t, p)| [t, p.to_bits()]).collect::<Vec<_>>()
        });
        let trained: Vec<u32> = rows.collect();
        assert_eq!(served(&engine, &prompt, &adapter, vocab), trained, "{}", path.display());
    }
}

#[test]
fn responses_are_bit_equal_in_any_mix_of_adapters() {
    let scratch = tempfile::tempdir().expect("a directory");
    for (format, activations) in [(quant::F32, Activations::F32), (quant::Q8_0, Activations::Int8)] {
        let files = open("tiny-chat");
        let paths =
            [1, 2].map(|salt| everywhere(&files, 3 + salt, salt, &scratch.path().join(format.name())));
        let model =
            LoadedModel::load(&converted(&files, format, false), activations, &Ledger::default(), &|_| ());
        let model = model.expect("no budget");
        let loader = model.adapter_loader().expect("known");
        let loaded = paths.map(|path| loader.load(&path, 64).expect("fits"));
        let kinds = [None, Some(&loaded[0]), Some(&loaded[1])];
        let requests: Vec<Request> = requests(files.config.vocab_size, 512)
            .iter()
            .flat_map(|r| kinds.map(|adapter| adapted(r, adapter)))
            .collect();
        let alone =
            |r: &Request| bits(&events(start_for_adapters(&model, 1, 1024).submit(r.clone()).expect("fits")));
        let alone: Vec<String> = requests.iter().map(alone).collect();
        let differ = alone.chunks(3).filter(|c| c[0] != c[1] && c[1] != c[2] && c[0] != c[2]).count();
        assert!(differ >= 6, "the adapters change what is said");
        for (max_seqs, max_batch_tokens) in [(1, 16), (3, 3), (21, 21), (21, 50)] {
            let engine = start_for_adapters(&model, max_seqs, max_batch_tokens);
            // Twice: the second time the prefix cache holds every prompt under each adapter.
            for round in 0..2 {
                let running: Vec<_> =
                    requests.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
                for (i, (generation, alone)) in running.into_iter().zip(&alone).enumerate() {
                    let mixed = bits(&events(generation));
                    assert_eq!(&mixed, alone, "request {i}, {max_seqs} sequences, round {round}");
                }
            }
            assert!(engine.stats().cached_tokens > 0);
        }
    }
}

#[test]
fn an_embedding_has_the_adapter_it_asks_for() {
    let files = open("tiny-chat");
    let scratch = tempfile::tempdir().expect("a directory");
    let engine = start_for_adapters(&load(&files), 2, 64);
    let adapter = engine.load_adapter(&everywhere(&files, 4, 1, scratch.path())).expect("fits");
    let vector =
        |adapter| events(engine.embed(vec![1, 2, 3], Pooling::Mean, adapter).expect("fits")).remove(0);
    let (bare, with) = (vector(None), vector(Some(adapter.clone())));
    assert_ne!(bare, with);
    assert_eq!((vector(Some(adapter)), vector(None)), (with, bare));
}

#[test]
fn bytes_are_charged_to_the_budget_and_free_when_nobody_holds_the_adapter() {
    let files = open("tiny-chat");
    let scratch = tempfile::tempdir().expect("a directory");
    let path = everywhere(&files, 8, 1, scratch.path());
    let size = {
        let model = load(&files);
        model.adapter_loader().expect("known").load(&path, 8).expect("no budget").bytes()
    };
    let start = |reserve| {
        let ledger = Ledger::new(Budget::device(4 << 20));
        let model = LoadedModel::load(&files, Activations::F32, &ledger, &|_| ()).expect("fits");
        // As many sequences as use up whatever is left.
        let config =
            EngineConfig { max_seqs: 64, adapter_rank: 8, adapter_bytes: reserve, ..EngineConfig::default() };
        (ledger, Engine::start(model, config).expect("fits"))
    };
    let (_, engine) = start(0);
    let error = engine.load_adapter(&path).expect_err("no room was kept");
    assert!(matches!(error, Error::AdapterTooLarge { bytes, .. } if bytes == size), "{error}");
    assert!(error.to_string().contains(&format!("takes {size} bytes")), "{error}");

    let (ledger, engine) = start(size);
    let used = ledger.used(Tier::Device);
    let first = engine.load_adapter(&path).expect("room was kept");
    assert_eq!(ledger.used(Tier::Device), used + size);
    engine.load_adapter(&path).expect_err("for one");
    let running = engine.submit(adapted(&greedy(&[1, 2], 40), Some(&first))).expect("fits");
    drop(first);
    assert_eq!(tokens(&events(running)).len(), 40, "who runs keeps what it runs with");
    engine.drain();
    assert!(ledger.peak(Tier::Device) <= 4 << 20);
    drop(engine);
    assert_eq!(ledger.used(Tier::Device), 0);
}

#[test]
fn an_adapter_that_does_not_belong_is_refused_with_a_sentence() {
    let files = open("tiny-chat");
    let scratch = tempfile::tempdir().expect("a directory");
    let engine = start_for_adapters(&load(&files), 2, 64);
    let refused = |path: &Path| engine.load_adapter(path).expect_err("refused").to_string();
    for (module, inner, why) in [
        ("q_proj", 33, "as [32, 33], the model has [32, 32]"),
        ("x_proj", 32, "no linear layer of this model"),
    ] {
        let name = |which: &str| format!("model.layers.0.self_attn.{module}.{which}.weight");
        let tensors = [
            (name("lora_A"), vec![1, inner], vec![0.5; inner]),
            (name("lora_B"), vec![32, 1], vec![0.5; 32]),
        ];
        let path = scratch.path().join(module);
        write(&path, 1, &tensors);
        assert!(refused(&path).contains(why), "{}", refused(&path));
    }
    assert!(refused(scratch.path()).contains("no adapter_config.json"));
    let wide = everywhere(&files, 65, 1, scratch.path());
    assert!(refused(&wide).contains("its rank is 65, at most 64"));
    let path = everywhere(&files, 2, 1, scratch.path());
    let weights = path.join("adapter_model.safetensors");
    let good = std::fs::read(&weights).expect("readable");
    let mut bytes = good.clone();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, &bytes).expect("writable");
    assert!(refused(&path).contains("holds NaN"));
    for cut in [0, 7, 100, end - 1] {
        std::fs::write(&weights, &good[..cut]).expect("writable");
        assert!(refused(&path).contains("adapter_model.safetensors"));
    }
    std::fs::write(&weights, &good).expect("writable");
    let adapter = engine.load_adapter(&path).expect("whole again");
    let error = start(&load(&files), 1, 8).submit(adapted(&greedy(&[1], 1), Some(&adapter))).err();
    assert_eq!(error, Some(SubmitError::AdapterRank { rank: 2, limit: 0 }));
}
