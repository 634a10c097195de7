//! Blocks that the device does not hold: the same bits as resident ones, within every budget, each read once a step.

use crate::fixtures::*;
use crate::formats::{Held, converted};
use hearth_engine::api::{Event, Request};
use hearth_engine::forecast::Speeds;
use hearth_engine::{
    Activations, Aim, Crowd, Engine, EngineConfig, LoadedModel, Scorer, WeightPlan, footprint,
};
use hearth_kernels::paged::KvType;
use hearth_memory::{Budget, Ledger, Size, Tier};
use hearth_model::panels::LAYOUTS;
use hearth_weights::{BundleWriter, FormatRef, ModelConfig, ModelFiles, TensorMeta, TokenizerFiles, quant};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Transformer blocks of the model below.
const BLOCKS: usize = 12;

/// The tiny model with its two blocks six times over.
fn deep() -> ModelFiles {
    let files = open("tiny-chat");
    let mut held = Held { metas: Vec::new(), bytes: BTreeMap::new() };
    let mut add = |name: String, meta: &TensorMeta| {
        let bytes = files.tensors.bytes(&meta.name).expect("readable").into_owned();
        held.metas.push(TensorMeta { name: name.clone(), ..meta.clone() });
        held.bytes.insert(name, bytes);
    };
    for meta in files.tensors.tensors() {
        let Some(rest) = meta.name.strip_prefix("model.layers.") else {
            add(meta.name.clone(), meta);
            continue;
        };
        let (layer, rest) = rest.split_once('.').expect("a layer's number");
        let layer: usize = layer.parse().expect("a layer's number");
        for i in (layer..BLOCKS).step_by(2) {
            add(format!("model.layers.{i}.{rest}"), meta);
        }
    }
    held.metas.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hf_config = files.hf_config.clone();
    hf_config.insert("num_hidden_layers".into(), BLOCKS.into());
    ModelFiles {
        config: ModelConfig::from_hf(&hf_config).expect("as before, but deeper"),
        path: files.path,
        hf_config,
        tensors: Box::new(held),
        tokenizer: TokenizerFiles::None,
        chat_template: None,
    }
}

fn bundle(format: FormatRef, directory: &Path) -> ModelFiles {
    written(&converted(&deep(), format, false), directory)
}

/// As a bundle, opened.
fn written(files: &ModelFiles, directory: &Path) -> ModelFiles {
    let path = directory.join("bundle");
    let mut writer = BundleWriter::create(&path).expect("a new directory").with_layouts(LAYOUTS);
    writer.model_files(files).expect("writable");
    for spec in hearth_model::params(hearth_model::architecture(&files.config).expect("known").as_ref()) {
        let bytes = files.tensors.bytes(&spec.name).expect("there");
        writer.tensor(files.tensors.meta(&spec.name).expect("there"), &bytes).expect("writable");
    }
    writer.finish().expect("complete");
    let written = hearth_model::open(&path).expect("just written");
    for meta in files.tensors.tensors() {
        let rows = |files: &ModelFiles| files.tensors.bytes(&meta.name).expect("there").into_owned();
        assert!(rows(&written) == rows(files), "{}", meta.name);
        assert_eq!(written.tensors.image(&meta.name).is_some(), meta.shape.len() == 2, "{}", meta.name);
    }
    written
}

/// Blocks in host memory that are enough for the deepest ring, and not for all.
const MORE_THAN_RING: u64 = 10;

/// Device bytes under which no block is resident, and the bytes of one packed and stored.
struct Sizes {
    device: u64,
    packed: u64,
    stored: u64,
}

fn sizes(files: &ModelFiles) -> Sizes {
    let plan = WeightPlan::new(files, Activations::F32, &Ledger::default()).expect("no budget");
    assert!(plan.placement.is_resident());
    let packed = plan.blocks[0].packed;
    let needs = footprint::streaming_needs(&files.config, KvType::F32, plan.blocks, plan.fixed, 1);
    let device = plan.fixed + needs.working + needs.least_kv.0;
    let probe = Budget { device: Some(Size(device)), host: Some(Size(1 << 30)), nvme: None };
    let stored = WeightPlan::new(files, Activations::F32, &Ledger::new(probe))
        .expect("host memory holds all")
        .blocks[0]
        .stored;
    Sizes { device, packed, stored }
}

fn within(files: &ModelFiles, device: u64, host: u64) -> LoadedModel {
    let budget = Budget { device: Some(Size(device)), host: Some(Size(host)), nvme: None };
    LoadedModel::load(files, Activations::F32, &Ledger::new(budget), &|_| ()).expect("it fits")
}

fn tiers(model: &LoadedModel) -> [usize; 3] {
    let placement = model.placement().expect("it is streamed");
    Tier::ALL.map(|tier| placement.count(tier))
}

fn logits(model: LoadedModel) -> Vec<u32> {
    let mut rows = Vec::new();
    let tokens: Vec<u32> = (0..40).map(|i| (i * 11 % 320) as u32).collect();
    let mut scorer = Scorer::new(model, 40).expect("it fits");
    for _ in 0..2 {
        scorer.score(&tokens, 0..40, |_, row| rows.extend(row.iter().map(|x| x.to_bits()))).expect("valid");
    }
    rows
}

#[test]
fn streamed_logits_are_bit_equal_to_resident_ones_in_every_format_and_placement() {
    for format in quant::FORMATS.iter().filter(|f| quant::is_writable(**f)) {
        let directory = tempfile::tempdir().expect("writable");
        let files = bundle(*format, directory.path());
        let resident = logits(load(&files));
        let Sizes { device, packed, stored } = sizes(&files);
        for (device, host, expected) in [
            (device, 12 * stored, Some([0, 12, 0])),
            // Half of what is left goes to the KV cache.
            (device + 2 * packed, 11 * stored, Some([1, 11, 0])),
            (device, MORE_THAN_RING * stored, None),
            (device + 2 * packed, MORE_THAN_RING * stored, None),
        ] {
            let model = within(&files, device, host);
            let ledger = model.ledger().clone();
            let found = tiers(&model);
            assert_eq!(found.iter().sum::<usize>(), BLOCKS);
            assert!(expected.map_or(found[2] > 0, |e| e == found), "{format:?}: {found:?} of {expected:?}");
            assert!(logits(model) == resident, "{format:?} {found:?}");
            assert!(ledger.peak(Tier::Device) <= device && ledger.peak(Tier::Host) <= host);
            assert_eq!((ledger.used(Tier::Device), ledger.used(Tier::Host)), (0, 0));
        }
    }
}

/// The same model with a head of its own, which has the embedding's values.
fn untied(format: FormatRef, directory: &Path) -> ModelFiles {
    let tied = converted(&deep(), format, false);
    let mut held = Held { metas: tied.tensors.tensors().to_vec(), bytes: BTreeMap::new() };
    for meta in tied.tensors.tensors() {
        held.bytes.insert(meta.name.clone(), tied.tensors.bytes(&meta.name).expect("readable").into_owned());
    }
    let head = tied.tensors.meta("model.embed_tokens.weight").expect("there").clone();
    held.bytes.insert("lm_head.weight".into(), held.bytes[&head.name].clone());
    held.metas.push(TensorMeta { name: "lm_head.weight".into(), ..head });
    held.metas.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hf_config = tied.hf_config.clone();
    hf_config.insert("tie_word_embeddings".into(), false.into());
    let config = ModelConfig::from_hf(&hf_config).expect("as before, but untied");
    written(&ModelFiles { config, hf_config, tensors: Box::new(held), ..tied }, directory)
}

#[test]
fn an_embedding_on_disk_makes_room_for_blocks_and_changes_no_bit() {
    for format in quant::FORMATS.iter().filter(|f| quant::is_writable(**f)) {
        let directory = tempfile::tempdir().expect("writable");
        let files = untied(*format, directory.path());
        let resident = logits(load(&files));
        let Sizes { device, packed, stored } = sizes(&files);
        // Host memory that holds all, and host memory that does not.
        let model = within(&files, device, 12 * stored);
        assert_eq!(tiers(&model)[2], 0);
        assert!(logits(model) == resident, "{format:?}: nothing is read from disk");
        // Beyond the least that works, until the embedding's place is what another block lacks.
        // Rows pass through a buffer, nearly a block of this small model, which must not cost one.
        let host = (MORE_THAN_RING + 1) * stored - 1024;
        let try_plan = |device: u64| {
            let budget = Budget { device: Some(Size(device)), host: Some(Size(host)), nvme: None };
            WeightPlan::new(&files, Activations::F32, &Ledger::new(budget))
        };
        let plan = |device: u64| try_plan(device).expect("it fits");
        let error = try_plan(1 << 10).expect_err("nothing fits 1 KiB").to_string();
        let least = error.split(' ').find_map(|word| word.parse::<u64>().ok()).expect("what it needs");
        assert!(least < device && plan(least).table.is_some(), "{format:?}: {error}");
        let lacks = |device: &u64| plan(*device).table.is_some();
        let device = (device..device + 12 * packed).step_by(packed as usize / 8).find(lacks);
        let device = device.unwrap_or_else(|| panic!("{format:?}: the embedding never leaves the device"));
        let plan = plan(device);
        let model = within(&files, device, host);
        let ledger = model.ledger().clone();
        let table = plan.table.map_or(0, |table| table.stored);
        let nvme = plan.placement.bytes(Tier::Nvme, &plan.blocks) + table;
        assert_eq!(ledger.used(Tier::Nvme), nvme, "{format:?}: predicted is measured");
        let weights = plan.fixed + plan.placement.bytes(Tier::Device, &plan.blocks);
        assert_eq!(ledger.used(Tier::Device), weights);
        assert!(logits(model) == resident, "{format:?}");
        assert!(ledger.peak(Tier::Device) <= device && ledger.peak(Tier::Host) <= host);
        assert_eq!((ledger.used(Tier::Device), ledger.used(Tier::Host), ledger.used(Tier::Nvme)), (0, 0, 0));
    }
}

#[test]
fn one_fetch_of_each_block_serves_every_sequence_of_a_step() {
    let directory = tempfile::tempdir().expect("writable");
    let files = bundle(quant::Q8_0, directory.path());
    let Sizes { device, stored, .. } = sizes(&files);
    let requests: Vec<Request> =
        (0..5).map(|i| Request { logprobs: Some(1), ..greedy(&[i, 7, i + 9], 20) }).collect();
    let run = |model: LoadedModel| {
        let config = EngineConfig { max_seqs: 5, max_batch_tokens: 64, ..EngineConfig::default() };
        let engine = Engine::start(model, config).expect("it fits");
        let running: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("fits")).collect();
        let events: Vec<Vec<Event>> = running.into_iter().map(events).collect();
        engine.drain();
        (events, engine.stats())
    };
    let (expected, resident) = run(load(&files));
    assert_eq!(resident.streamed, hearth_engine::Streamed::default());
    let (found, stats) = run(within(&files, device, MORE_THAN_RING * stored));
    assert_eq!(found, expected);
    let streamed = stats.streamed;
    assert_eq!(streamed.passes, stats.steps);
    assert!(streamed.nvme_bytes > 0 && streamed.gb_s() > 0.0 && streamed.wait_s <= streamed.pass_s);
    let total = streamed.nvme_bytes + streamed.host_bytes;
    assert!(total <= (streamed.passes + 1) * BLOCKS as u64 * stored, "{streamed:?}");
}

#[test]
fn a_placement_for_throughput_holds_more_sequences_and_gives_the_same_bits() {
    let directory = tempfile::tempdir().expect("writable");
    let files = bundle(quant::F32, directory.path());
    let Sizes { device, packed, stored } = sizes(&files);
    // Host memory holds all blocks, so that nothing depends on the disk.
    let budget = (device + 3 * packed, BLOCKS as u64 * stored);
    let speeds = Speeds { nvme: None, memory: 1e9, flops: 1e15 };
    let crowd = Crowd { max_seqs: 16, max_batch_tokens: footprint::MIN_BATCH_TOKENS, context: 16, speeds };
    let load = |aim| {
        let budget = Budget { device: Some(Size(budget.0)), host: Some(Size(budget.1)), nvme: Some(Size(0)) };
        let ledger = Ledger::new(budget);
        LoadedModel::load_aimed(&files, Activations::F32, aim, &ledger, &|_| ()).expect("it fits")
    };
    let kv_bytes = |model: LoadedModel| {
        let config = EngineConfig { max_seqs: 16, max_batch_tokens: 64, ..EngineConfig::default() };
        Engine::start(model, config).expect("it fits").stats().kv_bytes
    };
    let (latency, throughput) = (load(Aim::Latency), load(Aim::Throughput(crowd)));
    // Eight sequences find room in the smallest cache; of three blocks' places beyond, latency gives one to a block, and
    // throughput all to three sequences more.
    assert_eq!((tiers(&latency)[0], tiers(&throughput)[0]), (1, 0));
    assert!(logits(throughput) == logits(latency));
    assert!(kv_bytes(load(Aim::Throughput(crowd))) > kv_bytes(load(Aim::Latency)));
}

#[test]
fn weights_that_fit_are_not_streamed() {
    let directory = tempfile::tempdir().expect("writable");
    let model = within(&bundle(quant::F32, directory.path()), 64 << 20, 1 << 20);
    assert!(model.placement().is_none() && model.ledger().used(Tier::Host) == 0);
}

#[test]
fn what_cannot_be_streamed_is_refused_with_what_to_do() {
    let directory = tempfile::tempdir().expect("writable");
    let files = bundle(quant::F32, directory.path());
    let Sizes { device, stored, .. } = sizes(&files);
    let refused = |files: &ModelFiles, device, host, nvme: Option<u64>| {
        let budget = Budget { device: Some(Size(device)), host: Some(Size(host)), nvme: nvme.map(Size) };
        let ledger = Ledger::new(budget);
        let error = LoadedModel::load(files, Activations::F32, &ledger, &|_| ()).err().expect("refused");
        assert_eq!(
            (ledger.peak(Tier::Device), ledger.peak(Tier::Host)),
            (0, 0),
            "before anything is allocated"
        );
        error.to_string()
    };
    let error = refused(&deep(), device, 1 << 20, None);
    assert!(error.contains("hearth convert") && error.contains("--to bundle"), "{error}");
    let error = refused(&files, device - 1, 1 << 30, None);
    assert!(
        error.starts_with("device tier: needs") && error.contains("smallest budget that works"),
        "{error}"
    );
    let error = refused(&files, device, 4096, None);
    assert!(
        error.starts_with("host tier: the ring") && error.contains("smallest budget that works"),
        "{error}"
    );
    let error = refused(&files, device, 3 * stored, Some(0));
    assert!(error.starts_with("host tier: weights"), "{error}");
}

#[test]
fn a_block_that_can_no_longer_be_read_fails_the_step_and_nothing_else() {
    let directory = tempfile::tempdir().expect("writable");
    let files = bundle(quant::F32, directory.path());
    let Sizes { device, stored, .. } = sizes(&files);
    let engine = Engine::start(within(&files, device, MORE_THAN_RING * stored), EngineConfig::default())
        .expect("it fits");
    let request = || engine.submit(greedy(&[1, 2, 3], 40)).expect("fits");
    let expected = events(request());
    assert!(matches!(expected.last(), Some(Event::Finished { .. })), "{expected:?}");
    let weights = directory.path().join("bundle/weights.bin");
    let whole = std::fs::read(&weights).expect("readable");
    let file = std::fs::OpenOptions::new().write(true).open(weights).expect("it is there");
    // Twice, as what was read ahead may have failed with it.
    for _ in 0..2 {
        file.set_len(4096).expect("truncated");
        for _ in 0..2 {
            let events = events(request());
            let Some(Event::Failed(why)) = events.last() else { panic!("{events:?}") };
            assert!(why.contains("could not be streamed"), "{why}");
        }
        file.write_all_at(&whole[4096..], 4096).expect("writable");
        let said = |events: &[Event]| {
            events.iter().filter(|e| matches!(e, Event::Token { .. })).cloned().collect::<Vec<_>>()
        };
        assert_eq!(said(&events(request())), said(&expected), "the bytes are there again");
        assert_eq!(engine.fault(), None);
    }
    engine.drain();
    assert_eq!(engine.stats().kv_blocks_used, 0);
}
