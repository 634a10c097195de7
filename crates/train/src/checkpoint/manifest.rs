//! `checkpoint.json`: what a checkpoint is and the hashes of its files. Written last: a directory without a manifest
//! that matches is not a checkpoint. (Not `manifest.json`, by which a bundle is known: a checkpoint of a full fine-tune
//! opens as a Hugging Face directory.)
//!
//! The file is `{"sha256":"<hash of the body's bytes>","body":<body>}`, so that a flipped bit in it is seen too.

use crate::config::{TrainConfig, hex};
use hearth_data::Cursor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Version of the layout this crate writes.
const VERSION: u32 = 1;
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
    /// Hash of its content.
    pub sha256: String,
}

impl Manifest {
    /// A manifest of the present version.
    pub(crate) fn new(
        progress: Progress,
        config: &TrainConfig,
        model: ModelIdentity,
        files: Vec<FileEntry>,
    ) -> Self {
        let (config, config_sha256) = (config.clone(), config.hash());
        Self { version: VERSION, progress, config, config_sha256, model, files }
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
        let manifest: Manifest = serde_json::from_str(body)
            .map_err(|e| format!("checkpoint.json of another hearth version: {e}"))?;
        if manifest.version != VERSION {
            return Err(format!(
                "checkpoint.json has version {}, this hearth reads {VERSION}",
                manifest.version
            ));
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_is_seen() {
        let model = ModelIdentity {
            model_type: "llama".into(),
            parameters_sha256: "p".into(),
            frozen_sample_sha256: "f".into(),
        };
        let manifest = Manifest::new(Progress::default(), &TrainConfig::default(), model, Vec::new());
        let bytes = manifest.encode();
        assert_eq!(Manifest::decode(&bytes).expect("intact"), manifest);
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[i] ^= 1 << bit;
                assert!(Manifest::decode(&damaged).is_err(), "bit {bit} of byte {i}");
            }
            assert!(Manifest::decode(&bytes[..i]).is_err(), "cut at {i}");
        }
    }
}
