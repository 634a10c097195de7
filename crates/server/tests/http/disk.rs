//! Weights that come from a disk which fails under the running server.

use crate::harness::{MODEL, Server, eventually, first_event, model_folder, rest, service};
use hearth_engine::{Activations, Engine, EngineConfig, LoadedModel, WeightPlan};
use hearth_memory::{Budget, Ledger, Size};
use hearth_model::panels::LAYOUTS;
use hearth_server::ServerConfig;
use hearth_weights::{
    BundleWriter, Error, ModelConfig, ModelFiles, TensorMeta, TensorSource, TokenizerFiles,
};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Transformer blocks of the model: the tiny one's two, over and over.
const BLOCKS: usize = 12;

struct Repeated {
    files: ModelFiles,
    metas: Vec<TensorMeta>,
}

/// The name that the tiny model has for a tensor.
fn original(name: &str) -> String {
    let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return name.into();
    };
    format!("model.layers.{}.{rest}", layer.parse::<usize>().unwrap() % 2)
}

impl TensorSource for Repeated {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        self.files.tensors.bytes(&original(name))
    }
}

/// Writes the bundle.
fn deep_bundle(path: &Path) -> ModelFiles {
    let files = hearth_weights::open(&model_folder()).unwrap();
    let mut hf_config = files.hf_config.clone();
    hf_config.insert("num_hidden_layers".into(), BLOCKS.into());
    let config = ModelConfig::from_hf(&hf_config).unwrap();
    let params = hearth_model::params(hearth_model::architecture(&config).unwrap().as_ref());
    let meta = |name: &String| {
        let meta = files.tensors.meta(&original(name)).unwrap();
        TensorMeta { name: name.clone(), ..meta.clone() }
    };
    let mut metas: Vec<TensorMeta> = params.iter().map(|spec| meta(&spec.name)).collect();
    metas.sort_by(|a, b| a.name.cmp(&b.name));
    let path_of = files.path.clone();
    let deep = ModelFiles {
        config,
        path: path_of,
        hf_config,
        tensors: Box::new(Repeated { files, metas }),
        tokenizer: TokenizerFiles::None,
        chat_template: None,
    };
    let mut writer = BundleWriter::create(path).unwrap().with_layouts(LAYOUTS);
    writer.model_files(&deep).unwrap();
    for spec in params {
        let bytes = deep.tensors.bytes(&spec.name).unwrap();
        writer.tensor(deep.tensors.meta(&spec.name).unwrap(), &bytes).unwrap();
    }
    writer.finish().unwrap();
    hearth_model::open(path).unwrap()
}

/// Within the least device budget that works, and host memory for the ring and a few blocks.
fn streamed(files: &ModelFiles) -> LoadedModel {
    let budget =
        |device, host| Ledger::new(Budget { device: Some(Size(device)), host: Some(Size(host)), nvme: None });
    let plan = |ledger: &Ledger| WeightPlan::new(files, Activations::F32, ledger);
    let resident = plan(&Ledger::default()).unwrap();
    let works = |device: &u64| plan(&budget(*device, 1 << 30)).is_ok();
    let device = (resident.fixed..).step_by(4096).find(works).unwrap();
    let stored = plan(&budget(device, 1 << 30)).unwrap().blocks[0].stored;
    LoadedModel::load(files, Activations::F32, &budget(device, 10 * stored), &|_| {}).unwrap()
}

/// The bundle's weights, of which a part can be taken away.
struct Disk {
    file: File,
    whole: Vec<u8>,
}

impl Disk {
    fn of(bundle: &Path) -> Self {
        let path = bundle.join("weights.bin");
        Self {
            whole: std::fs::read(&path).unwrap(),
            file: OpenOptions::new().write(true).open(path).unwrap(),
        }
    }

    fn fail(&self) {
        self.file.set_len(4096).unwrap();
    }

    fn recover(&self) {
        self.file.write_all_at(&self.whole[4096..], 4096).unwrap();
    }
}

fn request(stream: bool) -> Value {
    json!({"prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": true, "temperature": 0, "stream": stream})
}

#[test]
fn a_disk_that_fails_ends_requests_with_an_error_and_serving_goes_on_when_it_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let bundle = directory.path().join("bundle");
    let model = streamed(&deep_bundle(&bundle));
    let placement = model.placement().expect("it is streamed");
    assert!(placement.ring_bytes > 0, "some blocks come from disk: {placement:?}");
    let engine = Engine::start(model, EngineConfig::default()).unwrap();
    let server = Server::start(
        ServerConfig { header_timeout: Duration::from_millis(300), ..ServerConfig::new(MODEL) },
        service(engine.clone()),
    );
    let disk = Disk::of(&bundle);
    let text = |answer: &Value| answer["choices"][0]["text"].clone();
    let expected = text(&server.ok("/v1/completions", &request(false)));
    for _ in 0..2 {
        let stream = server.connect("/v1/completions", &request(true));
        first_event(&stream);
        disk.fail();
        // The stream ends with an error, the next request is one.
        let said = rest(stream);
        let last = said.rsplit("data: ").next().unwrap().split("\n").next().unwrap();
        let refused = server.post("/v1/completions", &request(false));
        assert_eq!(refused.status, 500);
        for error in [serde_json::from_str::<Value>(last).unwrap(), refused.json()] {
            assert_eq!(error["error"]["type"], "server_error", "{error}");
            let message = error["error"]["message"].as_str().unwrap();
            assert!(message.contains("could not be streamed"), "{message}");
        }
        assert!(!said.contains("[DONE]"), "{said}");
        eventually("it says so", || server.get("/health").status == 503);
        let health = server.get("/health").json();
        assert_eq!(health["status"], "failing");
        assert!(health["error"].as_str().unwrap().contains("could not be streamed"), "{health}");
        disk.recover();
        eventually("it is well again, without a request", || server.get("/health").status == 200);
        assert_eq!(text(&server.ok("/v1/completions", &request(false))), expected);
    }
    eventually("nothing is held", || {
        let stats = engine.stats();
        stats.running + stats.waiting + stats.kv_blocks_used == 0
    });
}
