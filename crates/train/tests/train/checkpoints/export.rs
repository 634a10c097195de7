//! A checkpoint becomes a Hugging Face directory in constant memory.

use super::{contents, data, facts, files, save};
use crate::faulty_disk::{Fault, FaultyDisk};
use crate::support::{config, masters, model, trainer};
use hearth_train::checkpoint::{
    self, Checkpoint, Piece, StateDtype, StateFile, StateTensor, WriteAt, begin, export, finish,
    saver::CHUNK_BYTES, write_pieces,
};
use hearth_train::{CheckpointConfig, Disk, Files, TrainConfig};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Notes the largest write.
struct Counting(Arc<AtomicUsize>);

struct CountingFile(Box<dyn Write>, Arc<AtomicUsize>);

impl Write for CountingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.fetch_max(bytes.len(), Ordering::Relaxed);
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Files for Counting {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        Disk.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn Write>> {
        Ok(Box::new(CountingFile(Disk.create(path)?, self.0.clone())))
    }
    fn allocate(&self, path: &Path, bytes: u64) -> io::Result<()> {
        Disk.allocate(path, bytes)
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn WriteAt>> {
        Disk.open(path)
    }
    fn sync(&self, path: &Path) -> io::Result<()> {
        Disk.sync(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Disk.rename(from, to)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        Disk.remove_dir(path)
    }
}

#[test]
fn an_export_of_any_dtype_and_shard_size_is_the_model() {
    let (files, dir) = (model("llama-mha"), tempfile::tempdir().unwrap());
    let saving = CheckpointConfig { dir: dir.path().join("run"), every: 0, keep: 0 };
    let mut trainer = trainer(&files, &TrainConfig { checkpoint: Some(saving), ..config(1) });
    let path =
        trainer.run(&[], &mut (), &AtomicBool::new(false)).expect("runs").checkpoint.expect("is saved");
    let found = Checkpoint::open(&path).expect("is complete");
    for (dtype, limit, name) in [
        (StateDtype::F32, u64::MAX, "whole"),
        (StateDtype::Bf16, 9000, "shards"),
        (StateDtype::F16, 1, "each"),
    ] {
        let destination = dir.path().join(name);
        let mut heard = Vec::new();
        export(&Disk, &found, &destination, dtype, limit, &mut |done, of| heard.push((done, of)))
            .expect("is exported");
        let exported = hearth_weights::open(&destination).expect("opens as a model");
        assert_eq!(exported.config, files.config, "{name}");
        for (param, values) in masters(&trainer) {
            let rounded: Vec<f32> = values.iter().map(|value| round(*value, dtype)).collect();
            assert_eq!(exported.tensors.read_f32(&param).expect("is there"), rounded, "{name}");
        }
        assert!(heard.last().is_some_and(|(done, of)| done == of), "{heard:?}");
        let shards = contents(&destination).keys().filter(|name| name.ends_with(".safetensors")).count();
        let all = trainer.store().trained().len();
        assert!(if name == "each" { shards == all } else { (shards > 1) == (name == "shards") }, "{shards}");
        for name in contents(&destination).keys() {
            assert!(!name.contains("optimizer") && name != checkpoint::MANIFEST_FILE, "{name}");
        }
    }
    let again = export(&Disk, &found, &dir.path().join("each"), StateDtype::F32, 1, &mut |_, _| {});
    assert!(again.expect_err("is refused").to_string().contains("each"));
}

fn round(value: f32, dtype: StateDtype) -> f32 {
    match dtype {
        StateDtype::F32 => value,
        StateDtype::Bf16 => half::bf16::from_f32(value).to_f32(),
        StateDtype::F16 => half::f16::from_f32(value).to_f32(),
    }
}

#[test]
fn an_export_holds_a_chunk_and_never_a_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = StateTensor { name: "w".into(), shape: vec![5 << 20], dtype: StateDtype::F32 };
    let layout = [StateFile { name: checkpoint::MODEL_FILE.into(), tensors: vec![tensor] }];
    let piece = Piece { file: 0, offset: 0, bytes: layout[0].data_bytes() };
    let partial = begin(&Disk, dir.path(), 1, &layout, &[], false).expect("begins");
    let mut zeros = |_: &Piece, _, buffer: &mut [u8]| {
        buffer.fill(0);
        Ok(())
    };
    let written = write_pieces(&Disk, partial.path(), &layout, &[piece], &mut zeros).expect("writes");
    let path = finish(&Disk, partial, facts(&TrainConfig::default(), 1, 1), vec![written]).expect("saves");
    let (found, largest) = (Checkpoint::open(&path).expect("is complete"), Arc::new(AtomicUsize::new(0)));
    export(&Counting(largest.clone()), &found, &dir.path().join("out"), StateDtype::F32, 1, &mut |_, _| {})
        .expect("is exported");
    assert_eq!(largest.load(Ordering::Relaxed) as u64, CHUNK_BYTES);
}

#[test]
fn an_export_that_fails_is_complete_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let run = save(&Disk, &dir.path().join("run"), 1, 2, 1).expect("saves");
    let found = Checkpoint::open(&run).expect("is complete");
    let whole = data(1, 0, &files(StateDtype::F32)[0]);
    let mut absent = 0;
    for at in 0.. {
        let out = dir.path().join("out");
        let disk = FaultyDisk::new(Fault::Fails, at);
        let exported = export(&disk, &found, &out, StateDtype::F32, 100, &mut |_, _| {});
        if out.exists() {
            let shards = contents(&out);
            let data = shards.iter().filter(|(name, _)| name.ends_with(".safetensors"));
            assert_eq!(data.flat_map(|(_, bytes)| bytes[4096..].to_vec()).collect::<Vec<_>>(), whole);
            std::fs::remove_dir_all(out).unwrap();
        } else {
            absent += 1;
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "operation {at}: only the run is left");
        if exported.is_ok() {
            break;
        }
    }
    assert!(absent > 15, "{absent}");
}
