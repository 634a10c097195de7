//! Truncated, altered and lying files: always an error with a sentence, never a panic.

use crate::common::{fixture, values};
use hearth_weights::bundle::BundleWriter;
use hearth_weights::{Error, Layout, TensorMeta, encode, open, open_adapter, open_with};
use sha2::Digest;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A model whose one interesting file can be replaced.
struct Victim {
    directory: TempDir,
    file: PathBuf,
    good: Vec<u8>,
}

impl Victim {
    /// `source` inside the fixtures; `target` is the name it gets in a directory that is otherwise a model.
    fn new(source: &str, target: &str) -> Victim {
        let directory = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("llama/config.json"), directory.path().join("config.json")).unwrap();
        let good = std::fs::read(fixture(source)).unwrap();
        let file = directory.path().join(target);
        Victim { directory, file, good }
    }

    /// What opening and then reading everything gives with these bytes in place of the file.
    fn try_bytes(&self, bytes: &[u8]) -> Result<(), Error> {
        std::fs::write(&self.file, bytes).unwrap();
        let gguf = self.file.extension().is_some_and(|e| e == "gguf");
        read_all(if gguf { &self.file } else { self.directory.path() })
    }
}

fn read_all(path: &Path) -> Result<(), Error> {
    let model = open(path)?;
    for meta in model.tensors.tensors() {
        model.tensors.read_f32(&meta.name)?;
    }
    Ok(())
}

fn assert_one_sentence(error: &Error) {
    let message = error.to_string();
    assert!(!message.contains('\n') && message.len() < 800, "{message}");
}

fn victims() -> Vec<Victim> {
    vec![
        Victim::new("adapter.merged.safetensors", "model.safetensors"),
        Victim::new("bin/pytorch_model.bin", "pytorch_model.bin"),
        Victim::new("llama.gguf", "m.gguf"),
    ]
}

#[test]
fn every_truncation_is_an_error() {
    for victim in victims() {
        victim.try_bytes(&victim.good).unwrap();
        let len = victim.good.len();
        let early = (0..400).step_by(7);
        let cuts = early.chain((400..len).step_by(len / 60)).chain([len - 1, len - 33]);
        for cut in cuts {
            let error = victim
                .try_bytes(&victim.good[..cut])
                .expect_err(&format!("{} cut at {cut} of {len} opens", victim.file.display()));
            assert_one_sentence(&error);
        }
    }
}

#[test]
fn flipped_header_bytes_never_panic() {
    for victim in victims() {
        // Zip keeps its table at the end.
        let len = victim.good.len();
        let places = (0..1500).step_by(7).chain((len - 1200..len).step_by(11));
        for at in places {
            for flip in [0x01, 0xff] {
                let mut bytes = victim.good.clone();
                bytes[at] ^= flip;
                if let Err(error) = victim.try_bytes(&bytes) {
                    assert_one_sentence(&error);
                }
            }
        }
    }
}

/// A GGUF file from its header fields.
fn gguf(version: u32, tensors: u64, keys: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(keys.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn gguf_string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// A key of array type whose element type and count are given.
fn gguf_array(kind: u32, count: u64) -> Vec<u8> {
    [gguf_string("k"), 9u32.to_le_bytes().to_vec(), kind.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()]
        .concat()
}

/// A tensor table row, and 64 bytes of data after it.
fn gguf_tensor(dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = [gguf_string("token_embd.weight"), (dims.len() as u32).to_le_bytes().to_vec()].concat();
    dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.extend([0; 64]);
    bytes
}

#[test]
fn lying_gguf_headers_are_named() {
    let nested = {
        let mut bytes = [gguf_string("k"), 9u32.to_le_bytes().to_vec()].concat();
        for _ in 0..1000 {
            bytes.extend([9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat());
        }
        bytes
    };
    let twice = [gguf_string("k"), 0u32.to_le_bytes().to_vec(), vec![1]].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (gguf(1, 0, 0, &[]), "GGUF version 1, hearth reads 2 and 3"),
        (gguf(3u32.swap_bytes(), 0, 0, &[]), "big-endian"),
        (gguf(3, u64::MAX, 0, &[]), "cut short"),
        (gguf(3, 0, u64::MAX, &[]), "cut short"),
        (gguf(3, 0, 1, &u64::MAX.to_le_bytes()), "cut short"),
        (gguf(3, 0, 1, &gguf_array(8, u64::MAX)), "cut short"),
        (gguf(3, 0, 1, &gguf_array(0, 1 << 60)), "cut short"),
        (gguf(3, 0, 1, &gguf_array(12, u64::MAX)), "does not fit"),
        (gguf(3, 0, 1, &gguf_array(77, 3)), "type 77 does not exist"),
        (gguf(3, 0, 1, &nested), "deeper than"),
        (gguf(3, 0, 2, &[twice.clone(), twice].concat()), "there twice"),
        (gguf(3, 1, 0, &gguf_tensor(&[], 0, 0)), "0 dimensions"),
        (gguf(3, 1, 0, &gguf_tensor(&[2; 9], 0, 0)), "9 dimensions"),
        (gguf(3, 1, 0, &gguf_tensor(&[0], 0, 0)), "has a 0"),
        (gguf(3, 1, 0, &gguf_tensor(&[17], 0, 0)), "past the end"),
        (gguf(3, 1, 0, &gguf_tensor(&[4], 0, 64)), "past the end"),
        (gguf(3, 1, 0, &gguf_tensor(&[4], 0, u64::MAX - 31)), "past the end"),
        (gguf(3, 1, 0, &gguf_tensor(&[4], 0, 3)), "not a multiple of 32"),
        (gguf(3, 1, 0, &gguf_tensor(&[1 << 40, 1 << 40], 0, 0)), "not whole blocks"),
        (gguf(3, 1, 0, &gguf_tensor(&[33], 8, 0)), "not whole blocks of q8_0"),
        (gguf(3, 1, 0, &gguf_tensor(&[4], 0, 0)), "no general.architecture"),
    ];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.gguf");
    for (bytes, wanted) in cases {
        std::fs::write(&path, bytes).unwrap();
        let message = open(&path).err().unwrap_or_else(|| panic!("opens, wanted {wanted}")).to_string();
        assert!(message.contains(wanted), "{message}, wanted {wanted}");
    }
}

#[test]
fn lying_safetensors_headers_are_named() {
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; data]);
        bytes
    };
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let cases = [
        (u64::MAX.to_le_bytes().to_vec(), ""),
        (file("", 0), ""),
        (file("{", 0), ""),
        (file(&"[".repeat(100_000), 0), ""),
        (file(&tensor("[2]", "[0,8]"), 4), ""),
        (file(&tensor("[2]", "[0,8]"), 12), ""),
        (file(&tensor("[2]", "[8,0]"), 8), ""),
        (file(&tensor("[3]", "[0,8]"), 8), ""),
        (file(&tensor("[18446744073709551615,2]", "[0,8]"), 8), ""),
        (file(&tensor("[-1]", "[0,8]"), 8), ""),
        (file(&tensor("[2]", "[0,99999999999999999999]"), 8), ""),
        (file(&tensor("[2]", "[0,8]").replace("F32", "F99"), 8), ""),
        (file(&tensor("[1]", "[0,8]").replace("F32", "F64"), 8), "a: it is stored as F64"),
    ];
    let victim = Victim::new("adapter.merged.safetensors", "model.safetensors");
    for (bytes, wanted) in cases {
        let shown = String::from_utf8_lossy(&bytes).chars().take(90).collect::<String>();
        std::fs::write(&victim.file, &bytes).unwrap();
        let error = open(victim.directory.path()).and_then(|m| m.tensors.read_f32("a").map(|_| ()));
        let error = error.err().unwrap_or_else(|| panic!("{shown} opens"));
        assert_one_sentence(&error);
        let message = error.to_string();
        let named = message.contains("model.safetensors is damaged") || message.contains("tensor a");
        assert!(named && message.contains(wanted), "{message}");
    }
}

#[test]
fn lying_shard_indexes_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::copy(fixture("llama/config.json"), at("config.json")).unwrap();
    std::fs::copy(fixture("adapter.merged.safetensors"), at("one.safetensors")).unwrap();
    let cases = [
        ("", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        (r#"{"weight_map": {}}"#, "weight_map is empty"),
        (r#"{"weight_map": {"a": 1}}"#, "gives 1 for a"),
        (r#"{"weight_map": {"a": "../config.json"}}"#, "not a file name"),
        (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "not a file name"),
        (r#"{"weight_map": {"a": ".."}}"#, "not a file name"),
        (r#"{"weight_map": {"a": "two.safetensors"}}"#, "two.safetensors, which is not there"),
        (r#"{"weight_map": {"a": "one.safetensors"}}"#, "tensor a is missing"),
    ];
    for (index, wanted) in cases {
        std::fs::write(at("model.safetensors.index.json"), index).unwrap();
        let message = open(directory.path()).err().unwrap_or_else(|| panic!("{index} opens")).to_string();
        assert!(message.contains(wanted), "{message}, wanted {wanted}");
    }
}

/// A PyTorch archive with this pickle and one storage of 64 bytes.
fn torch_archive(pickle: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(vec![]));
    for (name, bytes) in [("m/data.pkl", pickle), ("m/data/0", &[0; 64][..])] {
        archive.start_file(name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// `{"w": tensor}` with these numbers, as `torch.save` would pickle it.
fn torch_pickle(offset: u32, shape: &[u32], strides: &[u32], key: &str) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, s: &str| {
        out.push(b'X');
        out.extend((s.len() as u32).to_le_bytes());
        out.extend(s.as_bytes());
    };
    let int = |out: &mut Vec<u8>, n: u32| {
        out.push(b'J');
        out.extend(n.to_le_bytes());
    };
    let mut out = b"\x80\x02}".to_vec();
    text(&mut out, "w");
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(&mut out, "storage");
    out.extend(b"ctorch\nFloatStorage\n");
    text(&mut out, key);
    text(&mut out, "cpu");
    int(&mut out, 16);
    out.extend(b"tQ");
    int(&mut out, offset);
    for sizes in [shape, strides] {
        out.push(b'(');
        sizes.iter().for_each(|n| int(&mut out, *n));
        out.push(b't');
    }
    out.extend(b"\x89}tRs.");
    out
}

#[test]
fn lying_pickles_are_named() {
    let huge = i32::MAX as u32;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (torch_pickle(0, &[4, 4], &[4, 1], "1"), "data/1 is not in the archive"),
        (torch_pickle(1, &[4, 4], &[4, 1], "0"), "reach past its storage of 64 bytes"),
        (torch_pickle(0, &[4, 2], &[8, 1], "0"), "reach past"),
        (torch_pickle(0, &[17], &[1], "0"), "takes 68 bytes"),
        (torch_pickle(0, &[huge, huge, huge], &[1, 1, 1], "0"), "overflows"),
        (torch_pickle(0, &[huge], &[0], "0"), "its storage has 64"),
        (torch_pickle(huge, &[4], &[huge], "0"), "reach past"),
        (torch_pickle(u32::MAX, &[4], &[1], "0"), "not described as torch.save does"),
        (torch_pickle(0, &[0], &[1], "0"), "has a 0"),
        (torch_pickle(0, &[1; 9], &[1; 9], "0"), "not described as torch.save does"),
        (torch_pickle(0, &[4, 4], &[4], "0"), "not described as torch.save does"),
        (b"\x80\x02cos\nsystem\n.".to_vec(), "asks for os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.".to_vec(), "asks for builtins.eval"),
        (b"\x80\x02ctorch\nload\n.".to_vec(), "asks for torch.load"),
        (b"\x80\x02i os\nsystem\n".to_vec(), "opcode 0x69"),
        (b"\x80\x00.".to_vec(), "pickle protocol 0"),
        (b"\x80\x02.".to_vec(), "the stack is empty"),
        (b"\x80\x02h\x05.".to_vec(), "never remembered"),
        (b"\x80\x02t.".to_vec(), "no mark"),
        (b"\x80\x02X\xff\xff\xff\xff".to_vec(), "cut short"),
        (b"\x80\x02cnever".to_vec(), "a line has no end"),
        (b"\x80\x02]q\x00h\x00a.".to_vec(), "not a dictionary"),
        (b"\x80\x02}q\x00h\x00h\x00s.".to_vec(), "no named tensors"),
        (b"\x80\x02(K\x01(K\x02R.".to_vec(), "the stack is empty"),
        (b"\x80\x02}.".to_vec(), "no named tensors"),
    ];
    let victim = Victim::new("bin/pytorch_model.bin", "pytorch_model.bin");
    victim.try_bytes(&torch_archive(&torch_pickle(0, &[4, 4], &[4, 1], "0"))).unwrap();
    victim.try_bytes(&torch_archive(&torch_pickle(3, &[3], &[7], "0"))).unwrap_err();
    victim.try_bytes(&torch_archive(&torch_pickle(3, &[3], &[6], "0"))).unwrap();
    for (pickle, wanted) in cases {
        let error = victim
            .try_bytes(&torch_archive(&pickle))
            .expect_err(&format!("{} opens", String::from_utf8_lossy(&pickle)));
        assert_one_sentence(&error);
        assert!(error.to_string().contains(wanted), "{error}, wanted {wanted}");
    }
    let not_archives: [(&[u8], &str); 3] = [
        (b"\x80\x02\x8a\x0a", "before PyTorch 1.6"),
        (b"version https://git-lfs", "git lfs pull"),
        (b"xx", "does not start"),
    ];
    for (bytes, wanted) in not_archives {
        assert!(victim.try_bytes(bytes).unwrap_err().to_string().contains(wanted));
    }
}

#[test]
fn random_pickles_never_panic() {
    let victim = Victim::new("bin/pytorch_model.bin", "pytorch_model.bin");
    let opcodes = b"\x80\x02}])(tsuaebRQNKJMXqhrj.\x85\x86\x87\x88\x8a\x94\x93c\n\x00\x01";
    for seed in 0..400 {
        let picks = values(60, seed);
        let pickle: Vec<u8> = picks
            .iter()
            .map(|v| opcodes[((v + 1.0) / 2.0 * opcodes.len() as f32) as usize % opcodes.len()])
            .collect();
        assert_one_sentence(&victim.try_bytes(&torch_archive(&pickle)).unwrap_err());
    }
}

fn bundle() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let model = open(&fixture("llama.gguf")).unwrap();
    let mut writer = BundleWriter::create(&directory.path().join("b")).unwrap();
    writer.model_files(&model).unwrap();
    for meta in model.tensors.tensors() {
        let mut bytes = vec![];
        encode(&*model.tensors, &meta.name, meta.format, &mut bytes).unwrap();
        let meta = TensorMeta { ..meta.clone() };
        writer.tensor(&meta, &bytes).unwrap();
    }
    writer.golden(b"{}").unwrap();
    writer.finish().unwrap();
    directory
}

#[test]
fn any_altered_byte_of_a_bundle_is_noticed_and_its_part_named() {
    let directory = bundle();
    let path = directory.path().join("b");
    for part in ["config.json", "vocabulary.json", "chat_template.jinja", "weights.bin", "golden.json"] {
        let file = path.join(part);
        let good = std::fs::read(&file).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&file, bad).unwrap();
            let error = open(&path).err().unwrap_or_else(|| panic!("{part} altered at {at} opens"));
            assert!(matches!(&error, Error::HashMismatch { part: named, .. } if named == part), "{error}");
        }
        for bad in [&good[..good.len() - 1], &[]] {
            std::fs::write(&file, bad).unwrap();
            let message = open(&path).err().unwrap().to_string();
            assert!(message.contains(part) && message.contains("the manifest says"), "{message}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(open(&path).err().unwrap().to_string().contains(part));
        std::fs::write(&file, &good).unwrap();
    }
    open(&path).unwrap();
}

/// A manifest changed by somebody who also puts its hash right.
fn forge(bundle: &Path, change: impl Fn(&mut serde_json::Value)) {
    let file = bundle.join("manifest.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("sha256");
    change(&mut json);
    let hash = sha2::Sha256::digest(json.to_string());
    json["sha256"] = hash.iter().map(|b| format!("{b:02x}")).collect::<String>().into();
    std::fs::write(&file, json.to_string()).unwrap();
}

#[test]
fn a_layout_that_is_unknown_or_does_not_apply_is_refused_by_name() {
    let directory = bundle();
    let path = directory.path().join("b");
    forge(&path, |json| json["tensors"][1]["layout"] = "panels99".into());
    let message = open(&path).err().unwrap().to_string();
    assert!(message.contains("\"panels99\"") && message.contains("convert the model again"), "{message}");
    forge(&path, |json| json["tensors"][1]["layout"] = "none".into());
    static NONE: [Layout; 1] = [Layout {
        name: "none",
        bytes: |_| None,
        pack: |_, rows| rows.to_vec(),
        unpack: |_, rows| rows.to_vec(),
    }];
    let message = open_with(&path, &NONE).err().unwrap().to_string();
    assert!(message.contains("cannot be stored as none"), "{message}");
}

#[test]
fn a_tensor_that_starts_where_direct_reads_cannot_is_refused() {
    let directory = bundle();
    let path = directory.path().join("b");
    forge(&path, |json| json["tensors"][0]["offset"] = 1.into());
    let message = open(&path).err().unwrap().to_string();
    assert!(message.contains("starts at byte 1, not at a multiple of 4096"), "{message}");
}

#[test]
fn a_bundle_from_before_there_were_layouts_is_read() {
    let directory = bundle();
    let path = directory.path().join("b");
    forge(&path, |json| json["version"] = 1.into());
    assert!(!open(&path).unwrap().tensors.tensors().is_empty());
}

#[test]
fn altered_manifests_are_refused() {
    let directory = bundle();
    let path = directory.path().join("b");
    let file = path.join("manifest.json");
    let good = std::fs::read_to_string(&file).unwrap();
    let edits = [
        ("\"version\": 2", "\"version\": 3", "bundle version 3, this hearth reads 1 to 2"),
        ("hearth-bundle", "other-bundle", "format is not"),
        ("\"offset\": 4096", "\"offset\": 8192", "sha256 of manifest.json"),
        ("\"f32\"", "\"f16\"", "sha256 of manifest.json"),
    ];
    for (from, to, wanted) in edits {
        assert!(good.contains(from), "{from}");
        std::fs::write(&file, good.replacen(from, to, 1)).unwrap();
        let message = open(&path).err().unwrap().to_string();
        assert!(message.contains(wanted), "{message}");
    }
    for cut in (1..good.len() - 2).step_by(good.len() / 40) {
        std::fs::write(&file, &good[..cut]).unwrap();
        assert_one_sentence(&open(&path).err().unwrap());
    }
}

#[test]
fn adapters_that_would_be_computed_wrong_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let tensors = "adapter_model.safetensors";
    std::fs::copy(fixture("adapter").join(tensors), at(tensors)).unwrap();
    let good = std::fs::read_to_string(fixture("adapter/adapter_config.json")).unwrap();
    let edits = [
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora is set"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias is \"all\""),
        ("\"peft_type\": \"LORA\"", "\"peft_type\": \"IA3\"", "peft_type is \"IA3\""),
        ("\"alpha_pattern\": {}", "\"alpha_pattern\": {\"q_proj\": 3}", "alpha_pattern is set"),
        ("\"fan_in_fan_out\": false", "\"fan_in_fan_out\": true", "fan_in_fan_out is set"),
        ("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]", "modules_to_save is set"),
        ("\"r\": 4", "\"r\": 0", "r is 0"),
        ("\"lora_alpha\": 12", "\"lora_alpha\": \"x\"", "lora_alpha"),
    ];
    for (from, to, wanted) in edits {
        assert!(good.contains(from), "{from}");
        std::fs::write(at("adapter_config.json"), good.replacen(from, to, 1)).unwrap();
        let message = open_adapter(directory.path()).err().unwrap().to_string();
        assert!(message.contains(wanted), "{message}");
    }
    std::fs::copy(fixture("adapter.merged.safetensors"), at(tensors)).unwrap();
    std::fs::write(at("adapter_config.json"), &good).unwrap();
    let message = open_adapter(directory.path()).err().unwrap().to_string();
    assert!(message.contains("neither a lora_A nor a lora_B weight"), "{message}");
}
