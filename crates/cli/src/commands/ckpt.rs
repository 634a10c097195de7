//! `hearth ckpt`: looking at, checking, exporting and thinning out checkpoints.

use crate::commands::convert::{self, ConvertArgs, Target};
use crate::exit::usage;
use crate::ui::{Report, Ui, bytes, table};
use hearth_memory::Size;
use hearth_train::checkpoint::{self, Checkpoint, Disk, Skipped, StateDtype};
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
    /// Format of the weights [default: f32 as trained; an adapter's base keeps its own]
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
    /// Largest weights file, unless one tensor is larger
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub shard_size: Size,
    /// Base model of an adapter [default: the one its configuration names]
    #[arg(long, value_name = "MODEL")]
    pub base: Option<PathBuf>,
}

/// Format of exported weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// 32-bit IEEE.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE.
    F16,
}

impl Dtype {
    fn stored(self) -> StateDtype {
        match self {
            Dtype::F32 => StateDtype::F32,
            Dtype::Bf16 => StateDtype::Bf16,
            Dtype::F16 => StateDtype::F16,
        }
    }

    /// What `hearth convert --quant` calls it.
    fn format(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        }
    }
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
        CkptCommand::Prune(args) => prune(args),
    }
}

fn inspect(dir: &Path) -> anyhow::Result<CkptReport> {
    let found = find(dir)?;
    describe(&found.checkpoint, &found.skipped)
}

/// Looks at every checkpoint, also those older than the newest complete one.
fn verify(dir: &Path) -> anyhow::Result<CkptReport> {
    let mut found = find(dir)?;
    if !is_checkpoint(dir) {
        let newest = found.checkpoint.manifest.progress.step;
        for (_, path) in checkpoint::steps(dir)?.into_iter().filter(|(step, _)| *step < newest) {
            found.skipped.extend(Checkpoint::open(&path).err().map(|error| skipped(path, error)));
        }
    }
    let report = describe(&found.checkpoint, &found.skipped)?;
    Ok(CkptReport { ok: found.skipped.is_empty(), ..report })
}

fn export(args: &ExportArgs, ui: &Ui) -> anyhow::Result<CkptReport> {
    if args.shard_size.bytes() == 0 {
        return Err(usage("--shard-size is 0; give the largest weights file, as 5GB"));
    }
    let Found { checkpoint, skipped } = find(&args.dir)?;
    for other in &skipped {
        ui.note(format!("skipped checkpoint {}: {}", other.path.display(), other.why));
    }
    if checkpoint.manifest.files.iter().any(|file| file.name == checkpoint::MODEL_FILE) {
        export_model(&checkpoint, args, ui)?;
    } else {
        export_merged(&checkpoint, args, ui)?;
    }
    Ok(CkptReport { exported: Some(args.output.clone()), ..describe(&checkpoint, &skipped)? })
}

fn export_model(checkpoint: &Checkpoint, args: &ExportArgs, ui: &Ui) -> anyhow::Result<()> {
    if let Some(base) = &args.base {
        let (base, path) = (base.display(), checkpoint.path.display());
        return Err(usage(format!(
            "--base {base}: {path} is a whole model, not an adapter; leave --base out"
        )));
    }
    let dtype = args.dtype.unwrap_or(Dtype::F32).stored();
    let bar = ui.bar(1000);
    let mut heard = |done: u64, total: u64| bar.at(done * 1000 / total.max(1), "‰ of the weights");
    checkpoint::export(&Disk, checkpoint, &args.output, dtype, args.shard_size.bytes(), &mut heard)?;
    bar.finish();
    Ok(())
}

/// An adapter goes into its base model, one tensor at a time.
fn export_merged(checkpoint: &Checkpoint, args: &ExportArgs, ui: &Ui) -> anyhow::Result<()> {
    let (source, adapter) = match &args.base {
        Some(base) => (base.clone(), Some(checkpoint.path.clone())),
        None => (checkpoint.path.clone(), None),
    };
    let convert = ConvertArgs {
        source,
        output: args.output.clone(),
        to: Target::Safetensors,
        quant: args.dtype.map_or("none", Dtype::format).into(),
        adapter,
    };
    convert::run_sharded(&convert, args.shard_size.bytes(), ui)?;
    Ok(())
}

fn prune(args: &PruneArgs) -> anyhow::Result<CkptReport> {
    if is_checkpoint(&args.dir) {
        let dir = args.dir.display();
        return Err(usage(format!(
            "{dir} is one checkpoint; give the run's folder, of which the newest stay"
        )));
    }
    let found = find(&args.dir)?;
    checkpoint::prune(&Disk, &args.dir, args.keep as usize)?;
    let left: Vec<Skipped> = found.skipped.into_iter().filter(|skipped| skipped.path.exists()).collect();
    describe(&found.checkpoint, &left)
}

/// A complete checkpoint, and newer ones that are not.
struct Found {
    checkpoint: Checkpoint,
    skipped: Vec<Skipped>,
}

fn skipped(path: PathBuf, error: hearth_train::Error) -> Skipped {
    let why = match error {
        hearth_train::Error::Damaged { why, .. } => why,
        other => other.to_string(),
    };
    Skipped { path, why }
}

fn is_checkpoint(path: &Path) -> bool {
    let named = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"));
    named && path.join(checkpoint::MANIFEST_FILE).is_file()
}

/// The checkpoint itself, or the newest complete one in a run's folder.
fn find(dir: &Path) -> anyhow::Result<Found> {
    if !dir.is_dir() {
        return Err(usage(format!("there is no folder {}", dir.display())));
    }
    if is_checkpoint(dir) {
        return Ok(Found { checkpoint: Checkpoint::open(dir)?, skipped: Vec::new() });
    }
    let found = checkpoint::search(dir)?;
    match (found.newest, found.skipped.first()) {
        (Some(checkpoint), _) => Ok(Found { checkpoint, skipped: found.skipped }),
        (None, Some(skipped)) => anyhow::bail!("{}", sentence(skipped)),
        (None, None) => Err(usage(format!("{} holds no checkpoint (no step-N folder)", dir.display()))),
    }
}

fn sentence(skipped: &Skipped) -> String {
    format!("checkpoint {}: {}", skipped.path.display(), skipped.why)
}

fn describe(checkpoint: &Checkpoint, skipped: &[Skipped]) -> anyhow::Result<CkptReport> {
    let manifest = &checkpoint.manifest;
    let mut tensors = 0;
    for file in manifest.files.iter().filter(|file| file.name.ends_with(".safetensors")) {
        tensors += checkpoint.state_file(&file.name)?.tensors.len();
    }
    Ok(CkptReport {
        ok: true,
        step: manifest.progress.step,
        world: manifest.world,
        stage: manifest.stage,
        tensors,
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        path: checkpoint.path.clone(),
        damaged: skipped.iter().map(sentence).collect(),
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
            ("written by", format!("{} rank{}, ZeRO stage {}", self.world, plural(self.world), self.stage)),
            ("tensors", self.tensors.to_string()),
            ("size", bytes(self.bytes)),
            ("complete", if self.ok { "yes" } else { "not all of them" }.to_owned()),
        ];
        rows.extend(self.damaged.iter().map(|sentence| ("damaged", sentence.clone())));
        rows.extend(self.exported.iter().map(|path| ("exported to", path.display().to_string())));
        table(rows)
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}
