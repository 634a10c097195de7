//! What is written is complete or invisible, and reads back the same.

use crate::common::{f32_meta, fixture, le, tiny_config, values};
use hearth_weights::bundle::{self, BundleWriter};
use hearth_weights::config::Activation;
use hearth_weights::gguf::Gguf;
use hearth_weights::quant::{self, by_name};
use hearth_weights::safetensors::{SafetensorsSource, SafetensorsWriter};
use hearth_weights::{
    AdapterSpec, Error, GgufHeader, GgufVocabulary, GgufWriter, HfWriter, Layout, ModelConfig, ModelFiles,
    RopeConfig, RopeScaling, TensorMeta, TensorSource, TokenizerFiles, encode, open, open_adapter, open_with,
    storage_format, write_adapter,
};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

fn scratch() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Names in a directory, sorted.
fn listing(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn plan(source: &dyn TensorSource, format: Option<&str>) -> Vec<TensorMeta> {
    let format = format.map(|name| by_name(name).unwrap());
    let metas = source.tensors().iter();
    metas.map(|meta| TensorMeta { format: storage_format(meta, format), ..meta.clone() }).collect()
}

fn encoded(source: &dyn TensorSource, meta: &TensorMeta) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(source, &meta.name, meta.format, &mut bytes).unwrap();
    bytes
}

fn write_gguf(to: &Path, model: &ModelFiles, format: Option<&str>, vocabulary: &GgufVocabulary) {
    let plan = plan(&*model.tensors, format);
    let header = GgufHeader {
        name: "tiny",
        config: &model.config,
        vocabulary: Some(vocabulary),
        chat_template: Some("{{ messages }}"),
    };
    let mut writer = GgufWriter::create(to, &header, &plan).unwrap();
    for meta in &plan {
        writer.tensor(&meta.name, &encoded(&*model.tensors, meta)).unwrap();
    }
    writer.finish().unwrap();
}

fn write_bundle(to: &Path, model: &ModelFiles, format: Option<&str>) {
    let mut writer = BundleWriter::create(to).unwrap();
    writer.model_files(model).unwrap();
    for meta in plan(&*model.tensors, format) {
        writer.tensor(&meta, &encoded(&*model.tensors, &meta)).unwrap();
    }
    writer.golden(b"{\"prompts\": []}").unwrap();
    writer.finish().unwrap();
}

/// Matrices backwards, behind a byte of padding.
static BACKWARDS: [Layout; 1] = [Layout {
    name: "backwards",
    bytes: |meta| (meta.shape.len() == 2).then(|| meta.byte_len() + 1),
    pack: |_, rows| [0].into_iter().chain(rows.iter().rev().copied()).collect(),
    unpack: |_, stored| stored[1..].iter().rev().copied().collect(),
}];

#[test]
fn a_bundle_in_a_layout_gives_the_rows_back_and_the_image_to_those_who_ask() {
    let model = open(&fixture("llama")).unwrap();
    let directory = scratch();
    let to = directory.path().join("b");
    let mut writer = BundleWriter::create(&to).unwrap().with_layouts(&BACKWARDS);
    writer.model_files(&model).unwrap();
    for meta in model.tensors.tensors() {
        writer.tensor(meta, &model.tensors.bytes(&meta.name).unwrap()).unwrap();
    }
    assert_same(&*writer.preview().unwrap().tensors, &*model.tensors);
    writer.finish().unwrap();
    let back = open_with(&to, &BACKWARDS).unwrap();
    assert_same(&*back.tensors, &*model.tensors);
    for meta in model.tensors.tensors() {
        let (image, place) = (back.tensors.image(&meta.name), back.tensors.place(&meta.name));
        assert_eq!((image.is_some(), place.is_some()), (meta.shape.len() == 2, meta.shape.len() != 2));
        if let Some(image) = image {
            let rows = model.tensors.bytes(&meta.name).unwrap();
            assert!(image.layout == "backwards" && image.bytes[1..].iter().eq(rows.iter().rev()));
            let file = std::fs::read(&image.place.path).unwrap();
            assert!(file[image.place.range.start as usize..image.place.range.end as usize] == *image.bytes);
        }
    }
}

fn assert_same(found: &dyn TensorSource, expected: &dyn TensorSource) {
    let names = |s: &dyn TensorSource| s.tensors().iter().map(|m| m.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for name in names(expected) {
        assert_eq!(found.read_f32(&name).unwrap(), expected.read_f32(&name).unwrap(), "{name}");
    }
}

#[test]
fn a_hugging_face_directory_reads_back_the_same_in_shards_and_in_one_file() {
    let model = open(&fixture("llama")).unwrap();
    for (limit, shards) in [(u64::MAX, 1), (40_000, 2), (1, 29)] {
        let directory = scratch();
        let to = directory.path().join("out");
        let plan = plan(&*model.tensors, None);
        let mut writer = HfWriter::create(&to, &model.hf_config, &plan, limit).unwrap();
        for meta in plan.iter().rev() {
            writer.tensor(&meta.name, &model.tensors.bytes(&meta.name).unwrap()).unwrap();
        }
        writer.file("tokenizer.json", b"{}").unwrap();
        assert!(!to.exists(), "visible before it is complete");
        writer.finish().unwrap();
        let back = open(&to).unwrap();
        assert_same(&*back.tensors, &*model.tensors);
        assert_eq!(back.config, model.config);
        assert!(matches!(back.tokenizer, TokenizerFiles::Json { .. }));
        let files = listing(&to).iter().filter(|f| f.ends_with(".safetensors")).count();
        assert_eq!(files, shards);
        assert_eq!(listing(directory.path()), ["out"]);
    }
}

#[test]
fn half_and_full_precision_share_a_file_and_stay_aligned() {
    let directory = scratch();
    let path = directory.path().join("mixed.safetensors");
    let half = TensorMeta { name: "a".into(), shape: vec![3], format: by_name("bf16").unwrap() };
    let plan = [half, f32_meta("b", &[2])];
    let mut writer = SafetensorsWriter::create(&path, &plan, &BTreeMap::new()).unwrap();
    writer.tensor("a", &[0, 0x3f, 0x80, 0x3f, 0, 0x40]).unwrap();
    writer.tensor("b", &le(&[1.5, -2.0])).unwrap();
    writer.finish().unwrap();
    let back = SafetensorsSource::open(&path).unwrap();
    assert_eq!(back.read_f32("a").unwrap(), [0.5, 1.0, 2.0]);
    assert_eq!(back.read_f32("b").unwrap(), [1.5, -2.0]);
    assert_eq!(back.bytes("b").unwrap().as_ptr() as usize % 4, 0);
}

#[test]
fn gguf_files_read_back_with_configuration_vocabulary_and_row_order() {
    let mut model = open(&fixture("llama")).unwrap();
    let vocabulary = GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        tokens: (0..40).map(|i| format!("t{i}")).collect(),
        token_types: vec![1; 40],
        merges: vec!["a b".into()],
        bos: Some(1),
        eos: Some(2),
        add_bos: Some(false),
        ..GgufVocabulary::default()
    };
    let scalings = [
        RopeScaling::None,
        RopeScaling::Linear { factor: 4.0 },
        RopeScaling::Divisors(vec![1.0, 1.0, 2.5, 8.0]),
        RopeScaling::Yarn {
            factor: 4.0,
            original_max_position: 16,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            truncate: true,
        },
    ];
    for scaling in scalings {
        model.config.rope = RopeConfig { theta: 5000.0, scaling };
        let directory = scratch();
        let to = directory.path().join("m.gguf");
        write_gguf(&to, &model, None, &vocabulary);
        let back = open(&to).unwrap();
        assert_eq!(back.config, model.config);
        assert_eq!(back.chat_template.as_deref(), Some("{{ messages }}"));
        let TokenizerFiles::Gguf(found) = &back.tokenizer else { panic!("no vocabulary") };
        assert_eq!(**found, vocabulary);
        for meta in model.tensors.tensors() {
            let expected = model.tensors.read_f32(&meta.name).unwrap();
            assert_eq!(back.tensors.read_f32(&meta.name).unwrap(), expected, "{}", meta.name);
        }
        // Divisors are configuration, not a weight.
        assert_eq!(back.tensors.tensors().len(), model.tensors.tensors().len());
    }
}

#[test]
fn quantized_gguf_rows_survive_the_reordering() {
    let model = open(&fixture("llama")).unwrap();
    for format in ["q8_0", "q4_0", "q4_1", "f16", "bf16"] {
        let directory = scratch();
        let to = directory.path().join("m.gguf");
        write_gguf(
            &to,
            &model,
            Some(format),
            &GgufVocabulary { model: "llama".into(), ..Default::default() },
        );
        let back = open(&to).unwrap();
        for meta in plan(&*model.tensors, Some(format)) {
            assert_eq!(back.tensors.meta(&meta.name).unwrap(), &meta);
            assert_eq!(
                *back.tensors.bytes(&meta.name).unwrap(),
                encoded(&*model.tensors, &meta),
                "{}",
                meta.name
            );
        }
    }
}

/// Writes tensors of these shapes into a GGUF file and gives the model read back.
fn through_gguf(config: &ModelConfig, tensors: &[(&str, &[usize])]) -> (TempDir, Result<ModelFiles, Error>) {
    let directory = scratch();
    let to = directory.path().join("m.gguf");
    let plan: Vec<_> = tensors.iter().map(|(name, shape)| f32_meta(name, shape)).collect();
    let header = GgufHeader { name: "t", config, vocabulary: None, chat_template: None };
    let written = GgufWriter::create(&to, &header, &plan).and_then(|mut writer| {
        for meta in &plan {
            writer.tensor(&meta.name, &le(&values(meta.elements(), 3)))?;
        }
        writer.finish()
    });
    (directory, written.and_then(|()| open(&to)))
}

#[test]
fn gemmas_norms_are_gains_in_gguf_files_and_weights_beside_one_again_here() {
    let config = tiny_config("gemma");
    let names: [(&str, &[usize]); 3] = [
        ("model.embed_tokens.weight", &[40, 32]),
        ("model.layers.0.input_layernorm.weight", &[32]),
        ("model.norm.weight", &[32]),
    ];
    let (directory, back) = through_gguf(&config, &names);
    let back = back.unwrap();
    assert_eq!(back.config, ModelConfig { bos_token_id: None, eos_token_ids: vec![], ..config.clone() });
    let stored = Gguf::open(&directory.path().join("m.gguf")).unwrap();
    let raw = |name: &str| {
        let tensor = stored.tensors().iter().find(|t| t.name == name).unwrap();
        stored.raw(tensor).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    for (canonical, name) in [
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ] {
        let gains: Vec<f32> = values(32, 3).iter().map(|v| v + 1.0).collect();
        assert_eq!(raw(name), gains);
        // The gain that is computed with is the same to the bit.
        let weights = back.tensors.read_f32(canonical).unwrap();
        assert_eq!(weights.iter().map(|v| v + 1.0).collect::<Vec<_>>(), gains);
    }
    assert_eq!(raw("token_embd.weight"), values(40 * 32, 3));
    let untied = ModelConfig { tie_word_embeddings: false, ..config };
    let error = through_gguf(&untied, &names).1.err().unwrap().to_string();
    assert!(error.contains("tie_word_embeddings is false"), "{error}");
}

#[test]
fn starcoder2_keeps_its_biases_epsilon_and_window_through_gguf() {
    let mut config = tiny_config("starcoder2");
    (config.qkv_bias, config.attention_out_bias, config.mlp_bias) = (true, true, true);
    (config.rms_norm_eps, config.sliding_window) = (1e-3, vec![Some(5); 2]);
    let names: [(&str, &[usize]); 7] = [
        ("model.embed_tokens.weight", &[40, 32]),
        ("model.layers.0.self_attn.q_proj.bias", &[32]),
        ("model.layers.0.self_attn.o_proj.bias", &[32]),
        ("model.layers.0.input_layernorm.bias", &[32]),
        ("model.layers.0.mlp.c_fc.weight", &[64, 32]),
        ("model.layers.0.mlp.c_proj.bias", &[32]),
        ("model.norm.bias", &[32]),
    ];
    let back = through_gguf(&config, &names).1.unwrap();
    assert_eq!(back.config, ModelConfig { bos_token_id: None, eos_token_ids: vec![], ..config.clone() });
    for (name, shape) in names {
        assert_eq!(back.tensors.read_f32(name).unwrap(), values(shape.iter().product(), 3), "{name}");
    }
    config.activation = Activation::Gelu;
    let error = through_gguf(&config, &names).1.err().unwrap().to_string();
    assert!(error.contains("the activation is Gelu, GGUF files of starcoder2 mean GeluTanh"), "{error}");
}

#[test]
fn qwen_rows_are_left_alone_and_mistral_keeps_its_window() {
    for (model_type, window) in [("qwen2", None), ("qwen3", None), ("mistral", Some(16))] {
        let mut config = tiny_config(model_type);
        config.sliding_window = vec![window; 2];
        let directory = scratch();
        let to = directory.path().join("m.gguf");
        let mut plan = vec![f32_meta("model.embed_tokens.weight", &[40, 32])];
        plan.push(f32_meta("model.layers.0.self_attn.q_proj.weight", &[32, 32]));
        if config.qkv_bias {
            plan.push(f32_meta("model.layers.0.self_attn.q_proj.bias", &[32]));
        }
        if config.qk_norm {
            plan.push(f32_meta("model.layers.0.self_attn.q_norm.weight", &[8]));
        }
        let header = GgufHeader { name: "t", config: &config, vocabulary: None, chat_template: None };
        let mut writer = GgufWriter::create(&to, &header, &plan).unwrap();
        for meta in &plan {
            writer.tensor(&meta.name, &le(&values(meta.elements(), 3))).unwrap();
        }
        writer.finish().unwrap();
        let back = open(&to).unwrap();
        // A file without tokenizer has no special tokens.
        let expected = ModelConfig { bos_token_id: None, eos_token_ids: vec![], ..config };
        assert_eq!(back.config, expected);
        for meta in &plan {
            assert_eq!(
                back.tensors.read_f32(&meta.name).unwrap(),
                values(meta.elements(), 3),
                "{}",
                meta.name
            );
        }
    }
}

#[test]
fn llama3_scaling_becomes_the_divisors_llama_cpp_stores() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192,
    };
    let divisors = RopeConfig { theta: 500000.0, scaling }.divisors(128).unwrap();
    assert_eq!(divisors.len(), 64);
    assert_eq!((divisors[0], divisors[63]), (1.0, 8.0));
    assert!(divisors.windows(2).all(|w| w[0] <= w[1]));
    assert!(divisors.iter().any(|d| *d > 1.0 && *d < 8.0));
}

#[test]
fn what_gguf_cannot_say_is_refused() {
    let mut config = tiny_config("llama");
    config.rope.scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position: 64 };
    let directory = scratch();
    let header = GgufHeader { name: "t", config: &config, vocabulary: None, chat_template: None };
    let error = GgufWriter::create(&directory.path().join("m.gguf"), &header, &[]).err().unwrap();
    assert!(error.to_string().contains("\"dynamic\", which GGUF files cannot express"), "{error}");
    assert!(listing(directory.path()).is_empty());
}

#[test]
fn bundles_read_back_verified_with_tensors_aligned_in_the_order_given() {
    let directory = scratch();
    for (source, format) in
        [("llama", None), ("llama", Some("q4_0")), ("llama.gguf", None), ("bin", Some("q8_0"))]
    {
        let model = open(&fixture(source)).unwrap();
        let to = directory.path().join(format!("{source}-{format:?}"));
        write_bundle(&to, &model, format);
        let back = open(&to).unwrap();
        assert_eq!(back.config, model.config);
        assert_eq!(back.chat_template, model.chat_template);
        for meta in plan(&*model.tensors, format).iter().filter(|m| m.name != "steps") {
            assert_eq!(back.tensors.meta(&meta.name).unwrap(), meta);
            let bytes = back.tensors.bytes(&meta.name).unwrap();
            assert_eq!(*bytes, encoded(&*model.tensors, meta), "{}", meta.name);
            assert_eq!(bytes.as_ptr() as usize % 4096, 0, "{}", meta.name);
        }
        assert_eq!(bundle::golden(&to).unwrap().unwrap(), b"{\"prompts\": []}");
        if let TokenizerFiles::Gguf(vocabulary) = &model.tokenizer {
            assert!(matches!(&back.tokenizer, TokenizerFiles::Gguf(v) if v == vocabulary));
        }
    }
}

#[test]
fn a_bundle_in_the_making_shows_the_bytes_it_will_serve() {
    let directory = scratch();
    let model = open(&fixture("llama")).unwrap();
    let mut writer = BundleWriter::create(&directory.path().join("b")).unwrap();
    writer.model_files(&model).unwrap();
    let meta =
        TensorMeta { name: "lm_head.weight".into(), shape: vec![40, 32], format: by_name("q4_0").unwrap() };
    let bytes = encoded(&*model.tensors, &meta);
    writer.tensor(&meta, &bytes).unwrap();
    let preview = writer.preview().unwrap();
    assert_eq!(*preview.tensors.bytes("lm_head.weight").unwrap(), bytes);
    assert_eq!(preview.config, model.config);
}

#[test]
fn an_abandoned_or_failed_output_leaves_nothing_behind() {
    let directory = scratch();
    let to = |name: &str| directory.path().join(name);
    let model = open(&fixture("llama")).unwrap();
    let plan = plan(&*model.tensors, None);
    drop(BundleWriter::create(&to("bundle")).unwrap());
    let header = GgufHeader { name: "t", config: &model.config, vocabulary: None, chat_template: None };
    let unfinished = GgufWriter::create(&to("gguf"), &header, &plan).unwrap();
    assert!(matches!(unfinished.finish(), Err(Error::MissingTensor { .. })));
    let unfinished = HfWriter::create(&to("hf"), &model.hf_config, &plan, u64::MAX).unwrap();
    assert!(matches!(unfinished.finish(), Err(Error::MissingTensor { .. })));
    let q4 = TensorMeta { format: by_name("q4_0").unwrap(), ..plan[0].clone() };
    assert!(HfWriter::create(&to("hf"), &model.hf_config, &[q4], u64::MAX).is_err());
    let mut writer = BundleWriter::create(&to("wrong")).unwrap();
    assert!(writer.tensor(&plan[0], &[0; 3]).is_err());
    assert!(writer.file("../up", b"").is_err());
    assert!(writer.file("weights.bin", b"").is_err());
    drop(writer);
    assert_eq!(listing(directory.path()), [""; 0]);
}

#[test]
fn an_existing_destination_is_refused_untouched() {
    let directory = scratch();
    let to = directory.path().join("here");
    std::fs::write(&to, "precious").unwrap();
    let model = open(&fixture("llama")).unwrap();
    let header = GgufHeader { name: "t", config: &model.config, vocabulary: None, chat_template: None };
    let refusals = [
        BundleWriter::create(&to).err(),
        GgufWriter::create(&to, &header, &[]).err(),
        HfWriter::create(&to, &model.hf_config, &[], 1).err(),
        SafetensorsWriter::create(&to, &[], &BTreeMap::new()).err(),
        write_adapter(&to, &spec(), &[]).err(),
    ];
    for refusal in refusals {
        let message = refusal.unwrap().to_string();
        assert!(message.contains("here already exists; remove it or choose another"), "{message}");
    }
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "precious");
}

fn spec() -> AdapterSpec {
    AdapterSpec {
        rank: 2,
        alpha: 8.0,
        rslora: false,
        dropout: 0.1,
        targets: vec!["q_proj".into()],
        base_model: "base".into(),
    }
}

#[test]
fn adapters_read_back_the_same() {
    let directory = scratch();
    let to = directory.path().join("adapter");
    let module = "model.layers.0.self_attn.q_proj";
    let (a, b) = (values(2 * 32, 1), values(32 * 2, 2));
    let tensors = [
        (format!("{module}.lora_A.weight"), vec![2, 32], a.clone()),
        (format!("{module}.lora_B.weight"), vec![32, 2], b.clone()),
    ];
    write_adapter(&to, &spec(), &tensors).unwrap();
    let back = open_adapter(&to).unwrap();
    assert_eq!((back.rank, back.alpha, back.rslora, back.dropout), (2, 8.0, false, 0.1));
    assert_eq!(
        (back.targets.as_slice(), back.modules.as_slice()),
        (&["q_proj".to_owned()][..], &[module.to_owned()][..])
    );
    assert_eq!(back.tensors.read_f32(&tensors[0].0).unwrap(), a);
    assert_eq!(back.tensors.read_f32(&tensors[1].0).unwrap(), b);
    assert_eq!(back.scale(2), 4.0);
}

#[test]
fn storage_formats_follow_the_rules_of_convert() {
    let q4 = Some(by_name("q4_0").unwrap());
    let bf16 = by_name("bf16").unwrap();
    let meta =
        |name: &str, shape: &[usize]| TensorMeta { name: name.into(), shape: shape.into(), format: bf16 };
    let cases = [
        (meta("model.layers.0.mlp.up_proj.weight", &[8, 64]), q4, "q4_0"),
        (meta("model.embed_tokens.weight", &[8, 64]), q4, "q8_0"),
        (meta("lm_head.weight", &[8, 64]), q4, "q8_0"),
        (meta("lm_head.weight", &[8, 64]), Some(quant::F16), "f16"),
        (meta("model.norm.weight", &[64]), q4, "f32"),
        (meta("model.norm.weight", &[64]), None, "bf16"),
        (meta("model.layers.0.mlp.up_proj.weight", &[8, 60]), q4, "bf16"),
        (meta("model.layers.0.self_attn.q_proj.bias", &[64]), q4, "f32"),
    ];
    for (meta, requested, expected) in cases {
        assert_eq!(storage_format(&meta, requested).name(), expected, "{meta:?}");
    }
}

#[test]
fn encoding_equals_quantizing_the_decoded_tensor() {
    let model = open(&fixture("llama.gguf")).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    for format in ["f32", "bf16", "q8_0", "q5_1"] {
        let format = by_name(format).unwrap();
        let decoded = model.tensors.read_f32(name).unwrap();
        let mut expected = vec![0; quant::byte_len(format, &[32, 32]).unwrap()];
        format.quantize(&decoded, &mut expected);
        let mut found = vec![7];
        encode(&*model.tensors, name, format, &mut found).unwrap();
        assert_eq!(found[1..], expected, "{}", format.name());
    }
    let error = encode(&*model.tensors, name, by_name("q6_k").unwrap(), &mut vec![]).unwrap_err();
    assert!(error.to_string().contains("q6_k can be read but not written; use one of f32"), "{error}");
}
