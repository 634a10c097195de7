//! Checkpoints: everything a run needs to go on as if it had never stopped, complete or invisible.
//!
//! # Layout on disk
//! ```text
//! DIR/step-N/                     after N steps
//!   model.safetensors             full fine-tuning: f32 masters under Hugging Face names …
//!   config.json, tokenizer.json … … and the model's other files: the directory is a Hugging Face model
//!   adapter_model.safetensors     LoRA: f32 masters under PEFT's names …
//!   adapter_config.json           … and PEFT's configuration: the directory is a PEFT adapter
//!   optimizer.safetensors         `m.<name>`, `v.<name>`: AdamW's moments
//!   checkpoint.json                 progress, configuration, model identity, sha256 of every file; written last
//! DIR/.step-N.partial/            being written; never read
//! ```
//! Files are written and synced under the partial name, the manifest last; then the directory is renamed and its
//! parent synced. A kill at any point leaves the earlier checkpoints as they were.

mod files;
mod load;
mod manifest;
mod save;

pub use files::{Disk, Files};
pub use load::{Checkpoint, Search, Skipped, search};
pub use manifest::{FileEntry, Manifest, ModelIdentity, Progress};
pub use save::{Companion, Shard, Snapshot, prune, save, sweep};

use std::path::{Path, PathBuf};

/// File of AdamW's moments.
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

/// The step of a checkpoint directory's name.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}
