//! `hearth ckpt`: looking at, checking, exporting and thinning out checkpoints.

use crate::commands::convert::{self, ConvertArgs, Target};
use crate::exit::usage;
use crate::ui::{Report, Ui, bytes, table};
use hearth_train::checkpoint::{self, Checkpoint, Disk};
use hearth_weights::TensorSource;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What to do with a run's checkpoints.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum CkptCommand {
    /// Shows what the newest complete checkpoint is
    Inspect(DirArgs),
    /// Checks every file of every checkpoint against its hash
    Verify(DirArgs),
    /// Writes a Hugging Face directory; an adapter is merged into its base model
    Export(ExportArgs),
    /// Removes all but the newest checkpoints
    Prune(PruneArgs),
}

/// Which checkpoints.
#[derive(Clone, Debug, clap::Args)]
pub struct DirArgs {
    /// A run's folder, or one checkpoint in it
    pub dir: PathBuf,
}

/// Which checkpoint, and where its model goes.
#[derive(Clone, Debug, clap::Args)]
pub struct ExportArgs {
    /// A run's folder (its newest checkpoint is taken), or one checkpoint in it
    pub dir: PathBuf,
    /// Directory to create
    #[arg(short, long, value_name = "DST")]
    pub output: PathBuf,
    /// Base model of an adapter [default: the one its configuration names]
    #[arg(long, value_name = "MODEL")]
    pub base: Option<PathBuf>,
}

/// Which checkpoints stay.
#[derive(Clone, Debug, clap::Args)]
pub struct PruneArgs {
    /// A run's folder
    pub dir: PathBuf,
    /// How many of the newest stay
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub keep: u64,
}

/// What a checkpoint is.
#[derive(Clone, Debug, Serialize)]
pub struct CkptReport {
    /// Whether every file is there and unchanged.
    pub ok: bool,
    /// Steps taken.
    pub step: u64,
    /// Ranks that wrote it.
    pub world: usize,
    /// ZeRO stage of the run that wrote it.
    pub stage: u8,
    /// Tensors in it, the optimizer's included.
    pub tensors: usize,
    /// Bytes in it.
    pub bytes: u64,
    /// The checkpoint.
    pub path: PathBuf,
    /// What is wrong with others beside it, one sentence each.
    pub damaged: Vec<String>,
    /// Where the model was exported to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exported: Option<PathBuf>,
}

/// Does it.
///
/// # Errors
/// No checkpoint at the path, a damaged one, an output that exists already.
pub fn run(command: &CkptCommand, ui: &Ui) -> anyhow::Result<CkptReport> {
    match command {
        CkptCommand::Inspect(args) => inspect(&args.dir),
        CkptCommand::Verify(args) => verify(&args.dir),
        CkptCommand::Export(args) => export(args, ui),
        CkptCommand::Prune(args) => {
            let newest = newest(&args.dir)?;
            checkpoint::prune(&Disk, &args.dir, args.keep as usize)?;
            describe(&newest)
        }
    }
}

fn inspect(dir: &Path) -> anyhow::Result<CkptReport> {
    describe(&newest(dir)?)
}

fn verify(dir: &Path) -> anyhow::Result<CkptReport> {
    let mut report = inspect(dir)?;
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(dir) {
        Ok(entries) if !is_checkpoint(dir) => entries.flatten().map(|entry| entry.path()).collect(),
        _ => Vec::new(),
    };
    paths.retain(|path| is_checkpoint_name(path) && path.is_dir());
    paths.sort();
    report.damaged =
        paths.iter().filter_map(|path| Checkpoint::open(path).err()).map(|e| e.to_string()).collect();
    report.ok = report.damaged.is_empty();
    Ok(report)
}

fn export(args: &ExportArgs, ui: &Ui) -> anyhow::Result<CkptReport> {
    let checkpoint = newest(&args.dir)?;
    let (source, adapter) = match &args.base {
        Some(base) => (base.clone(), Some(checkpoint.path.clone())),
        None => (checkpoint.path.clone(), None),
    };
    let convert = ConvertArgs {
        source,
        output: args.output.clone(),
        to: Target::Safetensors,
        quant: "none".into(),
        adapter,
    };
    convert::run(&convert, ui)?;
    Ok(CkptReport { exported: Some(args.output.clone()), ..describe(&checkpoint)? })
}

fn is_checkpoint_name(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"))
}

fn is_checkpoint(path: &Path) -> bool {
    is_checkpoint_name(path) && path.join(checkpoint::MANIFEST_FILE).is_file()
}

/// The checkpoint itself, or the newest complete one in a run's folder.
fn newest(dir: &Path) -> anyhow::Result<Checkpoint> {
    if !dir.is_dir() {
        return Err(usage(format!("there is no folder {}", dir.display())));
    }
    if is_checkpoint(dir) {
        return Ok(Checkpoint::open(dir)?);
    }
    let found = checkpoint::search(dir)?;
    match (found.newest, found.skipped.first()) {
        (Some(checkpoint), _) => Ok(checkpoint),
        (None, Some(skipped)) => anyhow::bail!("checkpoint {}: {}", skipped.path.display(), skipped.why),
        (None, None) => Err(usage(format!("{} holds no checkpoint (no step-N folder)", dir.display()))),
    }
}

fn describe(checkpoint: &Checkpoint) -> anyhow::Result<CkptReport> {
    let files = &checkpoint.manifest.files;
    let mut tensors = 0;
    for file in files.iter().filter(|file| file.name.ends_with(".safetensors")) {
        tensors += checkpoint.tensors(&file.name)?.tensors().len();
    }
    Ok(CkptReport {
        ok: true,
        step: checkpoint.manifest.progress.step,
        world: 1,
        stage: 0,
        tensors,
        bytes: files.iter().map(|file| file.bytes).sum(),
        path: checkpoint.path.clone(),
        damaged: Vec::new(),
        exported: None,
    })
}

impl Report for CkptReport {
    fn ok(&self) -> bool {
        self.ok
    }

    fn text(&self) -> String {
        let mut rows = vec![
            ("checkpoint", self.path.display().to_string()),
            ("step", self.step.to_string()),
            ("tensors", self.tensors.to_string()),
            ("size", bytes(self.bytes)),
            ("complete", if self.ok { "yes" } else { "not all of them" }.to_owned()),
        ];
        rows.extend(self.damaged.iter().map(|sentence| ("damaged", sentence.clone())));
        rows.extend(self.exported.iter().map(|path| ("exported to", path.display().to_string())));
        table(rows)
    }
}
