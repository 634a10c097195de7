//! The same model out of every kind of file.

use crate::common::{f32_meta, fixture, le, values};
use hearth_weights::gguf::Gguf;
use hearth_weights::safetensors::{SafetensorsSource, SafetensorsWriter};
use hearth_weights::{Error, Merged, ModelFiles, TensorSource, TokenizerFiles, open, open_adapter};
use std::collections::BTreeMap;

fn reference() -> ModelFiles {
    open(&fixture("llama")).unwrap()
}

fn assert_same_tensors(found: &dyn TensorSource, expected: &dyn TensorSource, tolerance: f32) {
    for meta in expected.tensors() {
        assert_eq!(found.meta(&meta.name).unwrap().shape, meta.shape, "{}", meta.name);
        let (a, b) = (found.read_f32(&meta.name).unwrap(), expected.read_f32(&meta.name).unwrap());
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= tolerance && a.len() == b.len(), "{}: {worst}", meta.name);
    }
}

#[test]
fn a_sharded_directory_is_one_model() {
    let model = reference();
    assert_eq!(model.config.model_type, "llama");
    assert_eq!(model.config.eos_token_ids, [2, 3]);
    assert_eq!(model.config.rope.theta, 5000.0);
    assert_eq!(model.chat_template.as_deref(), Some("yes"));
    assert!(matches!(model.tokenizer, TokenizerFiles::None));
    assert_eq!(model.tensors.tensors().len(), 2 * 13 + 3);
    assert!(model.tensors.tensors().windows(2).all(|w| w[0].name < w[1].name));
    model.expect("model.embed_tokens.weight", &[40, 32]).unwrap();
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let model = reference();
    let message = model.expect("model.norm.wieght", &[32]).unwrap_err().to_string();
    assert!(message.contains("model.norm.wieght is missing"), "{message}");
    assert!(message.contains("nearest name there is model.norm.weight"), "{message}");
    let message = model.expect("model.norm.weight", &[33]).unwrap_err().to_string();
    assert!(message.contains("has shape [32], the configuration needs [33]"), "{message}");
}

#[test]
fn pytorch_files_give_the_same_numbers_through_views_and_shared_storages() {
    let model = open(&fixture("bin")).unwrap();
    assert_eq!(model.config, reference().config);
    // Two of its tensors are stored in half precision.
    assert_same_tensors(&*model.tensors, &*reference().tensors, 2e-4);
    let exact = ["layers.0.mlp.up_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"];
    for name in exact.map(|n| format!("model.{n}.weight")) {
        assert_eq!(model.tensors.read_f32(&name).unwrap(), reference().tensors.read_f32(&name).unwrap());
    }
    let message = model.tensors.bytes("steps").unwrap_err().to_string();
    assert!(message.contains("steps: it is stored as int64"), "{message}");
}

#[test]
fn a_sharded_pytorch_directory_is_one_model() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::copy(fixture("bin/config.json"), at("config.json")).unwrap();
    for shard in ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"] {
        std::fs::copy(fixture("bin/pytorch_model.bin"), at(shard)).unwrap();
    }
    let index = r#"{"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin",
        "model.norm.weight": "pytorch_model-00002-of-00002.bin"}}"#;
    std::fs::write(at("pytorch_model.bin.index.json"), index).unwrap();
    let model = open(directory.path()).unwrap();
    let names: Vec<_> = model.tensors.tensors().iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["lm_head.weight", "model.norm.weight"]);
    let name = "model.norm.weight";
    assert_eq!(model.tensors.read_f32(name).unwrap(), reference().tensors.read_f32(name).unwrap());
}

#[test]
fn a_model_saved_without_its_head_gets_canonical_names() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::copy(fixture("llama/config.json"), at("config.json")).unwrap();
    let plan = [f32_meta("embed_tokens.weight", &[2, 2]), f32_meta("layers.0.mlp.up_proj.weight", &[2, 2])];
    let mut writer = SafetensorsWriter::create(&at("model.safetensors"), &plan, &BTreeMap::new()).unwrap();
    for meta in &plan {
        writer.tensor(&meta.name, &le(&values(4, 1))).unwrap();
    }
    writer.finish().unwrap();
    let model = open(directory.path()).unwrap();
    assert_eq!(model.tensors.read_f32("model.layers.0.mlp.up_proj.weight").unwrap(), values(4, 1));
    model.expect("model.embed_tokens.weight", &[2, 2]).unwrap();
    assert!(model.tensors.meta("embed_tokens.weight").is_err());
}

#[test]
fn end_tokens_and_template_come_from_where_transformers_looks() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for name in ["config.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("llama").join(name), at(name)).unwrap();
    }
    std::fs::copy(fixture("adapter.merged.safetensors"), at("model.safetensors")).unwrap();
    std::fs::write(at("generation_config.json"), r#"{"eos_token_id": [9, 2]}"#).unwrap();
    std::fs::write(at("chat_template.jinja"), "own").unwrap();
    let model = open(directory.path()).unwrap();
    assert_eq!(model.config.eos_token_ids, [2, 3, 9]);
    assert_eq!(model.chat_template.as_deref(), Some("own"));
    std::fs::remove_file(at("chat_template.jinja")).unwrap();
    std::fs::write(at("tokenizer_config.json"), r#"{"chat_template": "plain"}"#).unwrap();
    assert_eq!(open(directory.path()).unwrap().chat_template.as_deref(), Some("plain"));
}

#[test]
fn released_tensors_read_the_same_again() {
    for source in ["llama", "bin", "llama.gguf"] {
        let model = open(&fixture(source)).unwrap();
        for meta in model.tensors.tensors() {
            let before = model.tensors.read_f32(&meta.name).unwrap();
            model.tensors.release(&meta.name);
            assert_eq!(model.tensors.read_f32(&meta.name).unwrap(), before, "{}", meta.name);
        }
    }
}

#[test]
fn a_pickle_that_would_run_something_is_refused_and_not_run() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("evil.bin"), directory.path().join("pytorch_model.bin")).unwrap();
    std::fs::copy(fixture("llama/config.json"), directory.path().join("config.json")).unwrap();
    let message = open(directory.path()).err().unwrap().to_string();
    assert!(message.contains("posix.system") && message.contains("nothing in it was run"), "{message}");
}

#[test]
fn gguf_tensors_come_out_in_canonical_order_and_bit_equal() {
    let model = open(&fixture("llama.gguf")).unwrap();
    let expected = SafetensorsSource::open(&fixture("llama.gguf.expected.safetensors")).unwrap();
    assert_same_tensors(&*model.tensors, &expected, 0.0);
    assert_eq!(model.tensors.tensors().len(), expected.tensors().len());
}

#[test]
fn gguf_metadata_gives_the_same_configuration() {
    let model = open(&fixture("llama.gguf")).unwrap();
    let mut expected = reference().config;
    expected.mlp_bias = false;
    assert_eq!(model.config, expected);
    assert_eq!(model.chat_template.as_deref(), Some("{{ messages }}"));
    let TokenizerFiles::Gguf(vocabulary) = &model.tokenizer else { panic!("no vocabulary") };
    assert_eq!(vocabulary.model, "llama");
    assert_eq!(vocabulary.tokens[39], "<39>");
    assert_eq!(vocabulary.scores[39], -39.0);
    assert_eq!(vocabulary.token_types[..5], [3, 3, 3, 3, 1]);
    assert_eq!((vocabulary.bos, vocabulary.eos, vocabulary.add_bos), (Some(1), Some(2), Some(true)));
}

#[test]
fn gguf_metadata_of_every_type_is_read() {
    let file = Gguf::open(&fixture("llama.gguf")).unwrap();
    let ints =
        [("u8", 200), ("i8", -5), ("u16", 60000), ("i16", -300), ("i32", -70000), ("i64", -(1i64 << 40))];
    for (key, value) in ints {
        assert_eq!(file.int(&format!("test.{key}")).unwrap(), Some(value), "{key}");
    }
    assert_eq!(file.size("test.u64").unwrap(), Some((1 << 63) + 1));
    assert_eq!(file.float("test.f64").unwrap(), Some(0.1));
    assert_eq!(file.flag("test.bool").unwrap(), Some(true));
    assert_eq!(file.floats("test.floats").unwrap(), [0.5, 1.5]);
    assert!(file.string("test.u8").is_err());
    assert_eq!(file.string("absent").unwrap(), None);
}

#[test]
fn a_merged_adapter_equals_what_peft_merges() {
    let adapter = open_adapter(&fixture("adapter")).unwrap();
    assert_eq!((adapter.rank, adapter.alpha, adapter.rslora), (4, 12.0, true));
    assert_eq!(adapter.modules.len(), 4);
    let merged = Merged::new(reference().tensors, adapter).unwrap();
    let expected = SafetensorsSource::open(&fixture("adapter.merged.safetensors")).unwrap();
    assert_same_tensors(&merged, &expected, 1e-6);
    // What is not adapted is untouched.
    let name = "model.layers.0.self_attn.k_proj.weight";
    assert_eq!(merged.bytes(name).unwrap(), reference().tensors.bytes(name).unwrap());
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let adapter = open_adapter(&fixture("adapter")).unwrap();
    let other = SafetensorsSource::open(&fixture("adapter/adapter_model.safetensors")).unwrap();
    let message = Merged::new(Box::new(other), adapter).err().unwrap().to_string();
    assert!(message.contains("it adapts model.layers.0.mlp.down_proj, which"), "{message}");
}

#[test]
fn what_is_no_model_is_answered_with_what_would_be_one() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("empty")).unwrap();
    std::fs::create_dir(at("weightless")).unwrap();
    std::fs::copy(fixture("llama/config.json"), at("weightless/config.json")).unwrap();
    std::fs::write(at("pointer.gguf"), "version https://git-lfs.github.com/spec/v1").unwrap();
    std::fs::write(at("notes.txt"), "hello").unwrap();
    std::fs::create_dir(at("around")).unwrap();
    std::fs::copy(fixture("llama.gguf"), at("around/m.gguf")).unwrap();
    let cases = [
        (at("nowhere"), "there is nothing at this path"),
        (at("empty"), "it has no config.json"),
        (at("weightless"), "no weights: model.safetensors"),
        (at("pointer.gguf"), "Git LFS"),
        (at("notes.txt"), "neither a directory nor a GGUF file"),
        (at("around"), "m.gguf"),
        (fixture("adapter"), "--adapter"),
        (fixture("adapter.merged.safetensors"), "give the directory"),
    ];
    for (path, wanted) in cases {
        let error = open(&path).err().unwrap();
        assert!(matches!(error, Error::NotAModel { .. }), "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
    }
}
