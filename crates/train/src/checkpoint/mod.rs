//! Checkpoints: everything a run needs to go on as if it had never stopped, complete or invisible.
//!
//! # Layout
//! - [`layout`]: the safetensors files of the training state, before a byte is written; [`pieces`]: who writes what.
//! - [`saver`]: writing by many ranks in the background; `reveal`: names given and taken.
//! - `manifest`: `checkpoint.json`; `load`: finding and verifying; `reader`: reading any range into any layout.
//! - `export`: a Hugging Face directory out of a checkpoint, a few MiB in memory at a time.
//! - [`files`]: the operations on the disk, so that tests can let each fail.
//!
//! # Layout on disk
//! ```text
//! DIR/step-N/                     after N steps
//!   model.safetensors             full fine-tuning: f32 masters under Hugging Face names …
//!   config.json, tokenizer.json … … and the model's other files: the directory is a Hugging Face model
//!   adapter_model.safetensors     LoRA: f32 masters under PEFT's names …
//!   adapter_config.json           … and PEFT's configuration: the directory is a PEFT adapter
//!   optimizer.safetensors         `m.<name>` of every parameter, then `v.<name>`: the optimizer's states
//!   checkpoint.json               progress, configuration, model identity, sha256 of every piece; written last
//! DIR/.step-N.partial/            being written; never read
//! DIR/.step-N.replaced/           was step-N until its successor has that name; read when there is no step-N
//! ```
//!
//! # Invariants
//! - The bytes of a checkpoint depend on the state alone, not on the ranks, stages and tiers that held it: any layout
//!   resumes from any other, and `sha256sum` compares two runs. Only the manifest says who wrote which piece.
//! - Files are written and synced under the partial name, the manifest last; then the directory is renamed and its
//!   parent synced. A kill at any point leaves the earlier checkpoints as they were.

pub mod files;
pub mod layout;
pub mod pieces;
pub mod saver;

mod export;
mod load;
mod manifest;
mod reader;
mod reveal;

pub use export::export;
pub use files::{Disk, Files, WriteAt};
pub use layout::{StateDtype, StateFile, StateTensor};
pub use load::{Checkpoint, Search, Skipped, search, steps};
pub use manifest::{Facts, FileEntry, Manifest, ModelIdentity, PieceEntry, Progress};
pub use pieces::{Piece, WrittenPiece, decode_outcome, encode_outcome};
pub use reader::StateReader;
pub use reveal::{prune, sweep};
pub use saver::{BackgroundSave, Companion, Partial, ReadPiece, abandon, begin, finish, write_pieces};

use std::path::{Path, PathBuf};

/// File of the optimizer's states.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// File of masters when every parameter is trained.
pub const MODEL_FILE: &str = "model.safetensors";
/// File of masters when an adapter is trained.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// Written last: its presence and its hashes make a directory a checkpoint.
pub const MANIFEST_FILE: &str = "checkpoint.json";

/// Where the checkpoint of a step is.
pub fn step_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step}"))
}

/// Where the checkpoint of a step is while it is written.
pub fn partial_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!(".step-{step}.partial"))
}

/// Where the checkpoint of a step is while another takes its name.
fn replaced_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!(".step-{step}.replaced"))
}

/// The step of a checkpoint directory's name.
fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let replaced = || name.strip_prefix(".step-")?.strip_suffix(".replaced");
    name.strip_prefix("step-").or_else(replaced)?.parse().ok()
}
