//! Checkpoints without a model: bytes, pieces, faults.

mod export;
mod faults;
mod reading;
mod saving;

use hearth_train::checkpoint::{
    self, Checkpoint, Facts, ModelIdentity, Piece, Progress, StateDtype, StateFile, StateTensor, begin,
    decode_outcome, encode_outcome, finish, step_path, write_pieces,
};
use hearth_train::{Companion, Error, Files, TrainConfig};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Numbers by seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }
}

pub const PARAMS: [(&str, &[usize]); 4] =
    [("embed", &[7, 3]), ("norm", &[5]), ("empty", &[0, 3]), ("head", &[11, 2])];

pub fn files(state: StateDtype) -> Vec<StateFile> {
    let tensor = |name: String, shape: &[usize], dtype| StateTensor { name, shape: shape.to_vec(), dtype };
    let masters = PARAMS.map(|(name, shape)| tensor(name.into(), shape, StateDtype::F32));
    let states = ["m", "v"].map(|s| PARAMS.map(|(name, shape)| tensor(format!("{s}.{name}"), shape, state)));
    vec![
        StateFile { name: checkpoint::MODEL_FILE.into(), tensors: masters.to_vec() },
        StateFile { name: checkpoint::OPTIMIZER_FILE.into(), tensors: states.concat() },
    ]
}

/// Number `i` of a file's data after some step: exact in bfloat16.
pub fn number(step: u64, file: usize, i: u64) -> f32 {
    ((step * 17 + file as u64 * 31 + i) % 251) as f32
}

/// The data of a file after some step.
pub fn data(step: u64, file: usize, layout: &StateFile) -> Vec<u8> {
    let numbers = |dtype: StateDtype| (0..layout.data_bytes() / dtype.bytes()).map(|i| number(step, file, i));
    match layout.tensors[0].dtype {
        StateDtype::F32 => numbers(StateDtype::F32).flat_map(f32::to_le_bytes).collect(),
        StateDtype::F16 => {
            numbers(StateDtype::F16).flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect()
        }
        StateDtype::Bf16 => {
            let short = |x: f32| half::bf16::from_f32(x).to_le_bytes();
            numbers(StateDtype::Bf16).flat_map(short).collect()
        }
    }
}

pub fn reader(
    step: u64,
    layout: &[StateFile],
) -> impl FnMut(&Piece, u64, &mut [u8]) -> io::Result<()> + use<> {
    let all: Vec<Vec<u8>> = layout.iter().enumerate().map(|(i, file)| data(step, i, file)).collect();
    move |piece, offset, buffer| {
        let start = (piece.offset + offset) as usize;
        buffer.copy_from_slice(&all[piece.file][start..start + buffer.len()]);
        Ok(())
    }
}

/// Cuts all data at random into pieces of `world` ranks.
pub fn partition(layout: &[StateFile], world: usize, dice: &mut Dice) -> Vec<Vec<Piece>> {
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

pub fn companions() -> Vec<Companion> {
    let companion = |name: &str, bytes: &[u8]| Companion { name: name.into(), bytes: bytes.to_vec() };
    vec![companion("config.json", b"{}\n"), companion("merges.txt", b"")]
}

pub fn identity() -> ModelIdentity {
    let (parameters_sha256, frozen_sample_sha256) = ("p".into(), String::new());
    ModelIdentity { model_type: "llama".into(), parameters_sha256, frozen_sample_sha256 }
}

pub fn facts(config: &TrainConfig, step: u64, world: usize) -> Facts<'_> {
    let progress = Progress { step, updates: step, ..Progress::default() };
    Facts { progress, config, model: identity(), world, stage: 1 }
}

/// Saves the state after `step` by ranks that own `parts`.
pub fn save_parts(
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

pub fn save(disk: &dyn Files, dir: &Path, step: u64, world: usize, seed: u64) -> Result<PathBuf, Error> {
    let layout = files(StateDtype::F32);
    save_parts(disk, dir, step, &layout, &partition(&layout, world, &mut Dice(seed)))
}

/// Every file but the manifest.
pub fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path());
    let named = entries.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), path));
    named
        .filter(|(name, _)| name != checkpoint::MANIFEST_FILE)
        .map(|(name, path)| (name, std::fs::read(path).unwrap()))
        .collect()
}

/// Whether a checkpoint holds the state after its step, bit for bit.
pub fn assert_state(found: &Checkpoint) {
    for (index, file) in files(StateDtype::F32).iter().enumerate() {
        let mut reader = found.reader(file).expect("is there");
        let mut bytes = vec![0; reader.len() as usize];
        reader.read(0, &mut bytes).expect("reads");
        assert!(bytes == data(found.manifest.progress.step, index, file), "{}", file.name);
    }
}
