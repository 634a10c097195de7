//! `checkpoint.json`: what a checkpoint is and the hashes of its files. Written last: a directory without a manifest
//! that matches is not a checkpoint. (Not `manifest.json`, by which a bundle is known: a checkpoint of a full fine-tune
//! opens as a Hugging Face directory.)
//!
//! The file is `{"sha256":"<hash of the body's bytes>","body":<body>}`, so that a flipped bit in it is seen too.

use crate::config::{TrainConfig, hex};
use crate::loss_scale::LossScaler;
use hearth_data::Cursor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Version of the layout this crate writes. Version 1 hashed whole files, knew neither ranks nor stages, and is read.
const VERSION: u32 = 2;
const HEAD: &str = "{\"sha256\":\"";
const MIDDLE: &str = "\",\"body\":";

/// What a checkpoint is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Layout version.
    pub version: u32,
    /// Where the run stood.
    pub progress: Progress,
    /// What it was told.
    pub config: TrainConfig,
    /// [`TrainConfig::hash`].
    pub config_sha256: String,
    /// What it trained.
    pub model: ModelIdentity,
    /// Ranks that wrote it.
    pub world: usize,
    /// ZeRO stage of the run that wrote it.
    pub stage: u8,
    /// Everything else in the directory.
    pub files: Vec<FileEntry>,
}

/// Where a run stands between two steps. With the tensors and the configuration's seed this is all its state:
/// random numbers are counter-based.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps taken.
    pub step: u64,
    /// Optimizer updates applied (AdamW's `t`).
    pub updates: u64,
    /// Tokens processed.
    pub tokens: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// Where the next step's data begins.
    pub cursor: Cursor,
    /// The dynamic loss scale, if the run has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaler: Option<LossScaler>,
}

/// Tells one model from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// Hugging Face `model_type`.
    pub model_type: String,
    /// sha256 of the names and shapes of all parameters, trained ones marked.
    pub parameters_sha256: String,
    /// sha256 of a sample of the frozen weights; empty when every parameter is trained.
    pub frozen_sample_sha256: String,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Name within the directory.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Its bytes in order, as they were written: each of them in exactly one piece.
    pub pieces: Vec<PieceEntry>,
}

/// Bytes of a file that were written, and are verified, at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PieceEntry {
    /// Where it begins in the file.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// Hash of its content.
    pub sha256: String,
}

impl FileEntry {
    /// A file that is one piece.
    pub(super) fn whole(name: &str, bytes: u64, sha256: String) -> Self {
        Self { name: name.into(), bytes, pieces: vec![PieceEntry { offset: 0, bytes, sha256 }] }
    }
}

/// Version 1 of [`Manifest`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestV1 {
    version: u32,
    progress: Progress,
    config: TrainConfig,
    config_sha256: String,
    model: ModelIdentity,
    files: Vec<FileEntryV1>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntryV1 {
    name: String,
    bytes: u64,
    sha256: String,
}

impl From<ManifestV1> for Manifest {
    fn from(old: ManifestV1) -> Self {
        let ManifestV1 { version, progress, config, config_sha256, model, files } = old;
        let files = files.into_iter().map(|f| FileEntry::whole(&f.name, f.bytes, f.sha256)).collect();
        Self { version, progress, config, config_sha256, model, world: 1, stage: 0, files }
    }
}

/// What is read before the rest, to know what the rest is.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// What a manifest says beside its files.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Where the run stands.
    pub progress: Progress,
    /// What it was told.
    pub config: &'a TrainConfig,
    /// What it trains.
    pub model: ModelIdentity,
    /// Ranks that train it.
    pub world: usize,
    /// Their ZeRO stage.
    pub stage: u8,
}

impl Manifest {
    /// A manifest of the present version.
    pub(crate) fn new(facts: Facts<'_>, files: Vec<FileEntry>) -> Self {
        let Facts { progress, config, model, world, stage } = facts;
        let (config, config_sha256) = (config.clone(), config.hash());
        Self { version: VERSION, progress, config, config_sha256, model, world, stage, files }
    }

    /// Whether both are the same state of the same run. Ranks, stages and pieces may differ: the bytes do not
    /// depend on them.
    pub(crate) fn is_same_state(&self, other: &Self) -> bool {
        let files = |manifest: &Self| -> Vec<(String, u64)> {
            let mut files: Vec<_> = manifest.files.iter().map(|f| (f.name.clone(), f.bytes)).collect();
            files.sort();
            files
        };
        self.progress == other.progress
            && self.config_sha256 == other.config_sha256
            && self.model == other.model
            && files(self) == files(other)
    }

    /// The bytes of `checkpoint.json`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = serde_json::to_string_pretty(self).expect("a plain struct serialises");
        format!("{HEAD}{}{MIDDLE}{body}}}\n", hex(&Sha256::digest(&body))).into_bytes()
    }

    /// Reads `checkpoint.json`.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "checkpoint.json is not UTF-8".to_owned())?;
        let rest = text.strip_prefix(HEAD).ok_or("checkpoint.json does not begin with its hash")?;
        let (hash, rest) = rest.split_once(MIDDLE).ok_or("checkpoint.json is cut short")?;
        let body = rest.strip_suffix("}\n").ok_or("checkpoint.json is cut short")?;
        if hex(&Sha256::digest(body)) != hash {
            return Err("checkpoint.json does not match its own sha256".into());
        }
        let other = |e: serde_json::Error| format!("checkpoint.json of another hearth version: {e}");
        let Version { version } = serde_json::from_str(body).map_err(other)?;
        match version {
            1 => Ok(serde_json::from_str::<ManifestV1>(body).map_err(other)?.into()),
            VERSION => serde_json::from_str(body).map_err(other),
            _ => Err(format!("checkpoint.json has version {version}, this hearth reads 1 and {VERSION}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(body: &str) -> Vec<u8> {
        format!("{HEAD}{}{MIDDLE}{body}}}\n", hex(&Sha256::digest(body))).into_bytes()
    }

    fn manifest() -> Manifest {
        let model = ModelIdentity {
            model_type: "llama".into(),
            parameters_sha256: "p".into(),
            frozen_sample_sha256: "f".into(),
        };
        let config = TrainConfig::default();
        let facts = Facts { progress: Progress::default(), config: &config, model, world: 3, stage: 2 };
        Manifest::new(facts, vec![FileEntry::whole("model.safetensors", 5, "aa".into())])
    }

    #[test]
    fn any_flipped_bit_is_seen() {
        let bytes = manifest().encode();
        assert_eq!(Manifest::decode(&bytes).expect("intact"), manifest());
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[i] ^= 1 << bit;
                assert!(Manifest::decode(&damaged).is_err(), "bit {bit} of byte {i}");
            }
            assert!(Manifest::decode(&bytes[..i]).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn a_manifest_of_version_1_is_one_rank_and_a_piece_per_file() {
        let Manifest { progress, config, config_sha256, model, .. } = manifest();
        let files = vec![FileEntryV1 { name: "model.safetensors".into(), bytes: 5, sha256: "aa".into() }];
        let old = ManifestV1 { version: 1, progress, config, config_sha256, model, files };
        let read = Manifest::decode(&sealed(&serde_json::to_string(&old).unwrap())).expect("is read");
        assert_eq!(read, Manifest { version: 1, world: 1, stage: 0, ..manifest() });
    }

    #[test]
    fn another_version_is_named() {
        let error = Manifest::decode(&sealed("{\"version\":3}")).expect_err("is refused");
        assert_eq!(error, "checkpoint.json has version 3, this hearth reads 1 and 2");
    }
}
