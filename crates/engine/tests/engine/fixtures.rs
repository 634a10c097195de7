//! The fixtures, opened.

use hearth_engine::api::{Event, Generation, Request, Sampling};
use hearth_engine::{Activations, Engine, EngineConfig, EngineHandle, LoadedModel};
use hearth_memory::Ledger;
use hearth_weights::ModelFiles;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A fixture's model, opened.
pub fn open(name: &str) -> ModelFiles {
    hearth_weights::open(&fixtures().join(name).join("model")).expect(name)
}

/// Loaded without a budget.
pub fn load(files: &ModelFiles) -> LoadedModel {
    LoadedModel::load(files, Activations::F32, &Ledger::default(), &|_| ()).expect("fits without a budget")
}

/// Started without a budget.
pub fn start(model: &LoadedModel, max_seqs: usize, max_batch_tokens: usize) -> EngineHandle {
    let config = EngineConfig { max_seqs, max_batch_tokens, ..EngineConfig::default() };
    Engine::start(model.clone(), config).expect("fits without a budget")
}

/// Names of the parity cases.
pub fn parity_cases() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures().join("parity")).expect("the fixtures are there");
    let names = entries.map(|e| e.expect("readable").file_name().into_string().expect("UTF-8"));
    let mut cases: Vec<String> = names.map(|name| format!("parity/{name}")).collect();
    cases.sort();
    assert!(cases.len() > 10, "{cases:?}");
    cases
}

/// What transformers made of a parity case.
pub struct Reference(Vec<u8>);

impl Reference {
    pub fn of(case: &str) -> Self {
        Self(std::fs::read(fixtures().join(case).join("reference.safetensors")).expect(case))
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.chunks::<4, f32>(name, f32::from_le_bytes)
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.chunks::<8, u32>(name, |b| i64::from_le_bytes(b) as u32)
    }

    fn chunks<const N: usize, T>(&self, name: &str, read: impl Fn([u8; N]) -> T) -> Vec<T> {
        let file = SafeTensors::deserialize(&self.0).expect("well formed");
        let data = file.tensor(name).expect(name).data();
        data.chunks_exact(N).map(|b| read(b.try_into().expect("N bytes"))).collect()
    }
}

/// Greedy, nothing reported.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        logprobs: None,
        prompt_logprobs: None,
        adapter: None,
    }
}

/// Everything a generation sends.
pub fn events(mut generation: Generation) -> Vec<Event> {
    std::iter::from_fn(|| generation.next_blocking()).collect()
}

/// The token ids among events.
pub fn tokens(events: &[Event]) -> Vec<u32> {
    let token = |e: &Event| if let Event::Token { id, .. } = e { Some(*id) } else { None };
    events.iter().filter_map(token).collect()
}
