//! Any layout reads what any other wrote; what lies is named.

use super::{Dice, assert_state, data, files, number, partition, save, save_parts};
use hearth_train::checkpoint::{self, Checkpoint, StateDtype, StateFile};
use hearth_train::{Disk, Error};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;

#[test]
fn any_range_is_read_in_the_dtype_that_is_wanted() {
    for stored in [StateDtype::F32, StateDtype::Bf16, StateDtype::F16] {
        let (dir, layout) = (tempfile::tempdir().unwrap(), files(stored));
        let parts = partition(&layout, 2, &mut Dice(3));
        let path = save_parts(&Disk, dir.path(), 2, &layout, &parts).expect("saves");
        let found = Checkpoint::open(&path).expect("is complete");
        for wanted in [StateDtype::F32, StateDtype::Bf16, StateDtype::F16] {
            let layout = &files(wanted)[1];
            let (all, mut reader) = (data(2, 1, layout), found.reader(layout).expect("is there"));
            let (elements, size) = (reader.len() / wanted.bytes(), wanted.bytes() as usize);
            let mut dice = Dice(7);
            for _ in 0..200 {
                let first = dice.next(elements as usize);
                let count = dice.next(elements as usize - first + 1);
                let mut bytes = vec![0; count * size];
                reader.read((first * size) as u64, &mut bytes).expect("reads");
                assert_eq!(bytes, all[first * size..][..count * size]);
                let mut numbers = vec![0.0; count];
                reader.read_f32(first as u64, &mut numbers).expect("reads");
                let expected: Vec<f32> = (first..first + count).map(|i| number(2, 1, i as u64)).collect();
                assert_eq!(numbers, expected);
            }
        }
    }
}

#[test]
fn state_of_another_model_is_refused_by_name() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let found = Checkpoint::open(&save(&Disk, dir.path(), 1, 2, 1).expect("saves")).expect("is complete");
    let refusal = |change: &dyn Fn(&mut StateFile)| {
        let mut wanted = layout[1].clone();
        change(&mut wanted);
        found.reader(&wanted).expect_err("is refused")
    };
    let cases: [(Error, &str); 4] = [
        (refusal(&|f| f.tensors[1].shape = vec![6]), "has m.norm as [5], this run needs [6]"),
        (refusal(&|f| f.tensors[1].name = "m.other".into()), "has no m.other, which this run needs"),
        (refusal(&|f| f.tensors.truncate(4)), "has v.embed, which this run does not"),
        (refusal(&|f| f.name = "adapter_model.safetensors".into()), "it has no adapter_model.safetensors"),
    ];
    for (error, part) in cases {
        let foreign = matches!(error, Error::Foreign { .. });
        assert!(foreign || part.starts_with("it has no"), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// Rewrites a manifest's body and seals it again.
fn reseal(path: &Path, change: impl FnOnce(&mut Value)) {
    let file = path.join(checkpoint::MANIFEST_FILE);
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    change(&mut manifest["body"]);
    let body = manifest["body"].to_string();
    let hash: String = Sha256::digest(&body).iter().map(|b| format!("{b:02x}")).collect();
    std::fs::write(file, format!("{{\"sha256\":\"{hash}\",\"body\":{body}}}\n")).unwrap();
}

#[test]
fn a_checkpoint_of_version_1_is_read_and_a_damaged_one_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(&Disk, dir.path(), 6, 3, 1).expect("saves");
    reseal(&path, |body| {
        let old = body.as_object_mut().unwrap();
        old["version"] = 1.into();
        old.remove("world");
        old.remove("stage");
        for file in old["files"].as_array_mut().unwrap() {
            let bytes = std::fs::read(path.join(file["name"].as_str().unwrap())).unwrap();
            let hash: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            file.as_object_mut().unwrap().remove("pieces");
            file["sha256"] = hash.into();
        }
    });
    let found = Checkpoint::open(&path).expect("is read");
    assert_eq!((found.manifest.version, found.manifest.world, found.manifest.stage), (1, 1, 0));
    assert_state(&found);
    let model = path.join(checkpoint::MODEL_FILE);
    let mut bytes = std::fs::read(&model).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(model, bytes).unwrap();
    let error = Checkpoint::open(&path).expect_err("is damaged").to_string();
    assert!(error.contains("model.safetensors does not match its sha256"), "{error}");
}

/// What is said of a file's entry in the manifest, changed so.
type Lie<'a> = (&'a str, &'a dyn Fn(&mut Value));

#[test]
fn a_manifest_that_lies_about_pieces_or_names_is_damaged_and_never_a_panic() {
    let lies: [Lie; 6] = [
        ("no piece covers bytes 0..1", &|file| file["pieces"][0]["offset"] = 1.into()),
        ("goes beyond its end", &|file| file["pieces"][0]["bytes"] = u64::MAX.into()),
        ("no piece covers bytes", &|file| {
            file["pieces"].as_array_mut().unwrap().pop();
        }),
        ("two pieces cover bytes 0..4096", &|file| {
            let first = file["pieces"][0].clone();
            file["pieces"].as_array_mut().unwrap().insert(0, first);
        }),
        ("lists a file \"../x\"", &|file| file["name"] = "../x".into()),
        ("has 4288 bytes, checkpoint.json says 4289", &|file| {
            file["bytes"] = 4289.into();
            let pieces = file["pieces"].as_array_mut().unwrap();
            let last = pieces.last_mut().unwrap();
            last["bytes"] = (last["bytes"].as_u64().unwrap() + 1).into();
        }),
    ];
    for (part, lie) in lies {
        let dir = tempfile::tempdir().unwrap();
        let path = save(&Disk, dir.path(), 1, 3, 1).expect("saves");
        reseal(&path, |body| lie(&mut body["files"][0]));
        let error = Checkpoint::open(&path).expect_err("is damaged");
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn a_header_that_lies_is_damaged_and_never_a_panic_or_a_large_allocation() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let path = save(&Disk, dir.path(), 1, 1, 1).expect("saves");
    let found = Checkpoint::open(&path).expect("is complete");
    let file = path.join(checkpoint::MODEL_FILE);
    let bytes = std::fs::read(&file).unwrap();
    let mut dice = Dice(1);
    for _ in 0..300 {
        let mut wrong = bytes.clone();
        match dice.next(3) {
            0 => wrong.truncate(dice.next(bytes.len())),
            1 => wrong[dice.next(8)] = dice.next(256) as u8,
            _ => wrong[8 + dice.next(300)] ^= 1 << dice.next(8),
        }
        std::fs::write(&file, wrong).unwrap();
        if let Err(error) = found.reader(&layout[0]) {
            assert!(matches!(error, Error::Damaged { .. } | Error::Foreign { .. }), "{error:?}");
        }
    }
}
