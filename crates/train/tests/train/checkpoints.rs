//! Checkpoints without a model: bytes, pieces, faults.

use crate::faulty_disk::{Fault, FaultyDisk};
use hearth_train::checkpoint::{
    self, BackgroundSave, Checkpoint, Facts, ModelIdentity, Partial, Piece, Progress, StateDtype, StateFile,
    StateTensor, begin, decode_outcome, encode_outcome, finish, prune, saver::CHUNK_BYTES, search, step_path,
    sweep, write_pieces,
};
use hearth_train::{Companion, Disk, Error, Files, TrainConfig};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Numbers by seed.
struct Dice(u64);

impl Dice {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }
}

const PARAMS: [(&str, &[usize]); 4] =
    [("embed", &[7, 3]), ("norm", &[5]), ("empty", &[0, 3]), ("head", &[11, 2])];

fn files(state: StateDtype) -> Vec<StateFile> {
    let tensor = |name: String, shape: &[usize], dtype| StateTensor { name, shape: shape.to_vec(), dtype };
    let masters = PARAMS.map(|(name, shape)| tensor(name.into(), shape, StateDtype::F32));
    let states = ["m", "v"].map(|s| PARAMS.map(|(name, shape)| tensor(format!("{s}.{name}"), shape, state)));
    vec![
        StateFile { name: checkpoint::MODEL_FILE.into(), tensors: masters.to_vec() },
        StateFile { name: checkpoint::OPTIMIZER_FILE.into(), tensors: states.concat() },
    ]
}

/// Number `i` of a file's data after some step: exact in bfloat16.
fn number(step: u64, file: usize, i: u64) -> f32 {
    ((step * 17 + file as u64 * 31 + i) % 251) as f32
}

/// The data of a file after some step.
fn data(step: u64, file: usize, layout: &StateFile) -> Vec<u8> {
    let numbers = |dtype: StateDtype| (0..layout.data_bytes() / dtype.bytes()).map(|i| number(step, file, i));
    match layout.tensors[0].dtype {
        StateDtype::F32 => numbers(StateDtype::F32).flat_map(f32::to_le_bytes).collect(),
        StateDtype::Bf16 => {
            let short = |x: f32| half::bf16::from_f32(x).to_le_bytes();
            numbers(StateDtype::Bf16).flat_map(short).collect()
        }
    }
}

fn reader(step: u64, layout: &[StateFile]) -> impl FnMut(&Piece, u64, &mut [u8]) -> io::Result<()> + use<> {
    let all: Vec<Vec<u8>> = layout.iter().enumerate().map(|(i, file)| data(step, i, file)).collect();
    move |piece, offset, buffer| {
        let start = (piece.offset + offset) as usize;
        buffer.copy_from_slice(&all[piece.file][start..start + buffer.len()]);
        Ok(())
    }
}

/// Cuts all data at random into pieces of `world` ranks.
fn partition(layout: &[StateFile], world: usize, dice: &mut Dice) -> Vec<Vec<Piece>> {
    let mut ranks = vec![Vec::new(); world];
    for (index, file) in layout.iter().enumerate() {
        let mut offset = 0;
        while offset < file.data_bytes() {
            let bytes = (1 + dice.next(60) as u64).min(file.data_bytes() - offset);
            ranks[dice.next(world)].push(Piece { file: index, offset, bytes });
            offset += bytes;
        }
    }
    ranks
}

fn companions() -> Vec<Companion> {
    let companion = |name: &str, bytes: &[u8]| Companion { name: name.into(), bytes: bytes.to_vec() };
    vec![companion("config.json", b"{}\n"), companion("merges.txt", b"")]
}

fn identity() -> ModelIdentity {
    let (parameters_sha256, frozen_sample_sha256) = ("p".into(), String::new());
    ModelIdentity { model_type: "llama".into(), parameters_sha256, frozen_sample_sha256 }
}

fn facts(config: &TrainConfig, step: u64, world: usize) -> Facts<'_> {
    let progress = Progress { step, updates: step, ..Progress::default() };
    Facts { progress, config, model: identity(), world, stage: 1 }
}

/// Saves the state after `step` by ranks that own `parts`.
fn save_parts(
    disk: &dyn Files,
    dir: &Path,
    step: u64,
    layout: &[StateFile],
    parts: &[Vec<Piece>],
) -> Result<PathBuf, Error> {
    let not_saved = |source| Error::NotSaved { path: step_path(dir, step), source };
    let partial = begin(disk, dir, step, layout, &companions(), false)?;
    let mut written = Vec::new();
    for pieces in parts {
        let outcome = write_pieces(disk, partial.path(), layout, pieces, &mut reader(step, layout));
        match decode_outcome(&encode_outcome(&outcome)) {
            Ok(pieces) => written.push(pieces),
            Err(source) => {
                checkpoint::abandon(disk, partial);
                return Err(not_saved(source));
            }
        }
    }
    finish(disk, partial, facts(&TrainConfig::default(), step, parts.len()), written)
}

fn save(disk: &dyn Files, dir: &Path, step: u64, world: usize, seed: u64) -> Result<PathBuf, Error> {
    let layout = files(StateDtype::F32);
    save_parts(disk, dir, step, &layout, &partition(&layout, world, &mut Dice(seed)))
}

/// Every file but the manifest.
fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path());
    let named = entries.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), path));
    named
        .filter(|(name, _)| name != checkpoint::MANIFEST_FILE)
        .map(|(name, path)| (name, std::fs::read(path).unwrap()))
        .collect()
}

/// Whether a checkpoint holds the state after its step, bit for bit.
fn assert_state(found: &Checkpoint) {
    for (index, file) in files(StateDtype::F32).iter().enumerate() {
        let mut reader = found.reader(file).expect("is there");
        let mut bytes = vec![0; reader.len() as usize];
        reader.read(0, &mut bytes).expect("reads");
        assert!(bytes == data(found.manifest.progress.step, index, file), "{}", file.name);
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_ranks_that_wrote_them() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in [StateDtype::F32, StateDtype::Bf16] {
        let layout = files(dtype);
        let one = |world: usize, seed| {
            let run = dir.path().join(format!("{dtype:?}-{world}-{seed}"));
            let parts = partition(&layout, world, &mut Dice(seed));
            save_parts(&Disk, &run, 3, &layout, &parts).expect("saves")
        };
        let reference = contents(&one(1, 0));
        assert_eq!(reference.len(), 4);
        for seed in 1..20 {
            let path = one(1 + seed as usize % 5, seed);
            assert!(contents(&path) == reference, "seed {seed}");
            let manifest = Checkpoint::open(&path).expect("is complete").manifest;
            assert_eq!((manifest.world, manifest.stage), (1 + seed as usize % 5, 1));
        }
    }
}

#[test]
fn bytes_that_no_rank_or_two_ranks_wrote_are_named_and_nothing_is_saved() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let whole = |file: usize| Piece { file, offset: 0, bytes: layout[file].data_bytes() };
    let message = |parts: &[Vec<Piece>]| {
        save_parts(&Disk, dir.path(), 1, &layout, parts).expect_err("is refused").to_string()
    };
    let head = Piece { file: 1, offset: 0, bytes: 40 };
    let tail = |offset| Piece { file: 1, offset, bytes: layout[1].data_bytes() - offset };
    let cases = [
        (message(&[vec![whole(0)]]), "optimizer.safetensors: no piece covers bytes 4096..4480"),
        (message(&[vec![whole(0), head], vec![tail(44)]]), "no piece covers bytes 4136..4140"),
        (message(&[vec![whole(0), head], vec![tail(36)]]), "two pieces cover bytes 4132..4136"),
        (message(&[vec![whole(0), whole(1)], vec![whole(1)]]), "two pieces cover bytes 4096..4480"),
    ];
    for (message, part) in cases {
        assert!(message.contains(part) && message.contains("step-1 was not saved"), "{message}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A disk without a fault, and without the wait for one that spins.
fn calm() -> FaultyDisk {
    FaultyDisk::new(Fault::Dies, usize::MAX)
}

/// A directory with a complete step-1 and a damaged step-2.
fn damaged_run() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    save(&calm(), dir.path(), 1, 2, 1).expect("saves");
    let path = save(&calm(), dir.path(), 2, 2, 1).expect("saves").join(checkpoint::OPTIMIZER_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
    dir
}

/// Saves step-2 anew and step-3 by three ranks, pruning after each. Returns the newest step whose save came back well.
fn go_on(disk: &dyn Files, dir: &Path) -> u64 {
    let mut newest = 1;
    for step in 2..=3 {
        if save(disk, dir, step, 3, step).is_err() {
            break;
        }
        newest = step;
        if prune(disk, dir, 1).is_err() {
            break;
        }
    }
    newest
}

/// What has to hold after [`go_on`] met a fault: the newest complete checkpoint is found and holds the state of its
/// step, those that are not are named, and a run goes on from there.
fn assert_recovers(disk: &FaultyDisk, fault: Fault, dir: &Path, saved: u64, dice: &mut Dice, case: &str) {
    disk.cut_power(|| dice.next(2) == 0);
    let found = search(dir).expect("reads");
    let newest = found.newest.unwrap_or_else(|| panic!("{case}: nothing is left: {:?}", found.skipped));
    let step = newest.manifest.progress.step;
    assert_state(&newest);
    for skipped in &found.skipped {
        let name = skipped.path.file_name().unwrap().to_string_lossy();
        assert!(name.contains("step-") && !skipped.why.is_empty(), "{case}: {skipped:?}");
    }
    match fault {
        // What was written wrong is found when it is read.
        Fault::Flips => {
            assert!(step == saved || found.skipped.len() as u64 >= saved - step, "{case}: {step} of {saved}")
        }
        _ => assert!(step >= saved, "{case}: step {step} is left, {saved} was saved"),
    }
    sweep(&Disk, dir).expect("sweeps");
    let again = search(dir).expect("reads").newest.expect("sweeping takes no complete checkpoint");
    assert_eq!(again.manifest, newest.manifest, "{case}");
    save(&calm(), dir, step + 1, 2, 9).expect("the disk is well again");
    let next = search(dir).expect("reads").newest.expect("the one just written");
    assert!(next.manifest.progress.step > step, "{case}");
    assert_state(&next);
}

/// Operations of [`go_on`] when nothing fails.
fn operations() -> usize {
    let (dir, disk) = (damaged_run(), calm());
    assert_eq!(go_on(&disk, dir.path()), 3);
    assert_eq!(search(dir.path()).unwrap().newest.unwrap().manifest.progress.step, 3);
    disk.operations()
}

#[test]
fn every_operation_of_a_save_may_fail_or_be_the_last_one() {
    let operations = operations();
    assert!(operations > 80, "{operations} operations");
    for at in 0..operations {
        for fault in [Fault::Dies, Fault::Fails, Fault::Fills, Fault::Short, Fault::Flips] {
            let (dir, disk) = (damaged_run(), FaultyDisk::new(fault, at));
            let saved = go_on(&disk, dir.path());
            if fault == Fault::Short {
                assert_eq!(saved, 3, "a short write at operation {at} goes on where it stopped");
            }
            let case = format!("{fault:?} at operation {at}");
            assert_recovers(&disk, fault, dir.path(), saved, &mut Dice(at as u64), &case);
        }
    }
}

#[test]
fn a_run_survives_faults_at_random_points_of_random_layouts() {
    let faults = [Fault::Dies, Fault::Fills, Fault::Short, Fault::Flips];
    for seed in 0..240 {
        let mut dice = Dice(seed);
        let (dir, fault) = (tempfile::tempdir().unwrap(), faults[dice.next(4)]);
        save(&calm(), dir.path(), 1, 1, seed).expect("saves");
        let disk = FaultyDisk::new(fault, dice.next(150));
        let mut saved = 1;
        for step in 2..6 {
            let world = 1 + dice.next(6);
            if save(&disk, dir.path(), step, world, seed + step).is_err() {
                break;
            }
            saved = step;
            if prune(&disk, dir.path(), 1 + dice.next(2)).is_err() {
                break;
            }
        }
        assert_recovers(&disk, fault, dir.path(), saved, &mut dice, &format!("{fault:?}, seed {seed}"));
    }
}

#[test]
fn a_disk_too_small_is_known_before_a_rank_writes() {
    let (dir, layout) = (damaged_run(), files(StateDtype::F32));
    let disk = FaultyDisk::new(Fault::Fills, 2);
    let error = begin(&disk, dir.path(), 3, &layout, &[], false).expect_err("has no room").to_string();
    assert!(error.contains("step-3 was not saved: no space left on device"), "{error}");
    assert!(!checkpoint::partial_path(dir.path(), 3).exists());
}

#[test]
fn saving_a_step_again_by_other_ranks_leaves_the_first_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = |path: &Path| Checkpoint::open(path).expect("complete").manifest;
    let first = manifest(&save(&Disk, dir.path(), 4, 1, 1).expect("saves"));
    assert_eq!(manifest(&save(&Disk, dir.path(), 4, 3, 2).expect("saves")), first);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_killed_saves_left_is_removed_by_a_clean_begin() {
    let dir = damaged_run();
    begin(&Disk, dir.path(), 7, &files(StateDtype::F32), &companions(), false).expect("begins");
    std::fs::rename(step_path(dir.path(), 2), dir.path().join(".step-2.replaced")).unwrap();
    begin(&Disk, dir.path(), 8, &files(StateDtype::F32), &[], true).expect("begins");
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [".step-8.partial", "step-1", "step-2"]);
}

#[test]
fn a_save_in_the_background_writes_the_same_and_reports_what_failed() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let parts = partition(&layout, 2, &mut Dice(5));
    let partial = begin(&Disk, dir.path(), 1, &layout, &companions(), false).expect("begins");
    let ranks: Vec<_> = parts.iter().map(|p| in_background(&partial, p, reader(1, &layout))).collect();
    let written = ranks.into_iter().map(|rank| rank.join().expect("writes")).collect();
    let broken = in_background(&partial, &parts[0], |_, _, _| Err(io::Error::other("nvme tier: torn")));
    assert_eq!(broken.join().expect_err("fails").to_string(), "nvme tier: torn");
    let panicked = in_background(&partial, &parts[0], |_, _, _| panic!("a bug"));
    assert!(panicked.join().expect_err("fails").to_string().contains("panicked"));
    finish(&Disk, partial, facts(&TrainConfig::default(), 1, 2), written).expect("saves");
    assert_state(&Checkpoint::open(&step_path(dir.path(), 1)).expect("is complete"));
}

fn in_background(
    partial: &Partial,
    pieces: &[Piece],
    read: impl FnMut(&Piece, u64, &mut [u8]) -> io::Result<()> + Send + 'static,
) -> BackgroundSave {
    let path = partial.path().to_owned();
    BackgroundSave::spawn(Arc::new(Disk), path, files(StateDtype::F32), pieces.to_vec(), read)
        .expect("a thread")
}

#[test]
fn a_dropped_background_save_stops_before_what_it_reads_is_gone() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let partial = begin(&Disk, dir.path(), 1, &layout, &[], false).expect("begins");
    let pieces: Vec<_> = (0..95).map(|i| Piece { file: 1, offset: 4 * i, bytes: 4 }).collect();
    let (asked, source) = (Arc::new(AtomicUsize::new(0)), Arc::new(()));
    let (count, held) = (asked.clone(), source.clone());
    let (proceed, wait) = std::sync::mpsc::channel::<()>();
    let save = in_background(&partial, &pieces, move |_, _, _| {
        let _held = &held;
        count.fetch_add(1, Ordering::SeqCst);
        wait.recv().map_err(io::Error::other)
    });
    proceed.send(()).unwrap();
    drop(proceed);
    drop(save);
    assert_eq!(Arc::strong_count(&source), 1, "the thread has let go of what it read");
    assert!(asked.load(Ordering::SeqCst) <= 2);
}

#[test]
fn long_pieces_are_read_in_aligned_chunks_and_hashed_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = StateTensor { name: "w".into(), shape: vec![17 << 20], dtype: StateDtype::F32 };
    let layout = vec![StateFile { name: checkpoint::MODEL_FILE.into(), tensors: vec![tensor] }];
    let bytes = layout[0].data_bytes();
    let pieces =
        [Piece { file: 0, offset: 0, bytes: 1000 }, Piece { file: 0, offset: 1000, bytes: bytes - 1000 }];
    let partial = begin(&Disk, dir.path(), 1, &layout, &[], false).expect("begins");
    let mut read = |piece: &Piece, offset: u64, buffer: &mut [u8]| {
        let (start, end) = (piece.offset + offset, piece.offset + offset + buffer.len() as u64);
        assert_eq!(start / CHUNK_BYTES, (end - 1) / CHUNK_BYTES, "{start}..{end}");
        buffer.fill((start / CHUNK_BYTES) as u8);
        Ok(())
    };
    let written = write_pieces(&Disk, partial.path(), &layout, &pieces, &mut read).expect("writes");
    let lengths: Vec<u64> = written.iter().map(|written| written.piece.bytes).collect();
    assert_eq!(lengths, [1000, (64 << 20) - 1000, 4 << 20]);
    let path = finish(&Disk, partial, facts(&TrainConfig::default(), 1, 1), vec![written]).expect("saves");
    let mut reader = Checkpoint::open(&path).expect("is complete").reader(&layout[0]).expect("is there");
    let mut around = [0; 8];
    reader.read(5 * CHUNK_BYTES - 4, &mut around).expect("reads");
    assert_eq!(around, [4, 4, 4, 4, 5, 5, 5, 5]);
}

#[test]
fn any_range_is_read_in_the_dtype_that_is_wanted() {
    for stored in [StateDtype::F32, StateDtype::Bf16] {
        let (dir, layout) = (tempfile::tempdir().unwrap(), files(stored));
        let parts = partition(&layout, 2, &mut Dice(3));
        let path = save_parts(&Disk, dir.path(), 2, &layout, &parts).expect("saves");
        let found = Checkpoint::open(&path).expect("is complete");
        for wanted in [StateDtype::F32, StateDtype::Bf16] {
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

#[test]
fn a_manifest_that_lies_about_pieces_or_names_is_damaged_and_never_a_panic() {
    let lies: [(&str, &dyn Fn(&mut Value)); 6] = [
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
