//! `hearth convert`: a model in another form, one tensor in memory at a time.

use crate::exit::usage;
use crate::golden;
use crate::machine;
use crate::open::Model;
use crate::ui::{Report, Ui, bytes, table};
use anyhow::Context;
use hearth_model::panels::LAYOUTS;
use hearth_weights::quant::{self, FormatRef};
use hearth_weights::source::{ModelFiles, TensorMeta, TokenizerFiles};
use hearth_weights::{BundleWriter, GgufHeader, GgufWriter, HfWriter, hf_dir};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Converts a model: quantizes it, merges an adapter into it, writes it in another form.
#[derive(Clone, Debug, clap::Args)]
pub struct ConvertArgs {
    /// Hugging Face directory, .gguf file, bundle or checkpoint
    pub source: PathBuf,
    /// Directory or file to create
    #[arg(short, long, value_name = "DST")]
    pub output: PathBuf,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Target::Bundle)]
    pub to: Target,
    /// Format of the matrices: none (as they are), q8_0, q4_0, or another one that can be written
    #[arg(long, value_name = "FORMAT", default_value = "none")]
    pub quant: String,
    /// LoRA adapter to merge
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// What `hearth serve` likes best: hashed, aligned, in execution order.
    Bundle,
    /// A Hugging Face directory.
    Safetensors,
    /// One file for llama.cpp and its kin.
    Gguf,
}

/// What was converted.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// Size of the source's weights.
    pub bytes_in: u64,
    /// Size of everything written.
    pub bytes_out: u64,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// How long it took.
    pub wall_s: f64,
    /// Where the output is.
    pub output: PathBuf,
}

/// Converts. The output is complete or not there at all.
///
/// # Errors
/// A source that cannot be read, a format that cannot be written there, an output that exists already, a full disk.
pub fn run(args: &ConvertArgs, ui: &Ui) -> anyhow::Result<ConvertReport> {
    run_sharded(args, hf_dir::MAX_SHARD_BYTES, ui)
}

/// [`run`] with safetensors files of at most `max_shard_bytes` unless one tensor is larger.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_sharded(
    args: &ConvertArgs,
    max_shard_bytes: u64,
    ui: &Ui,
) -> anyhow::Result<ConvertReport> {
    let start = Instant::now();
    let requested = requested_format(&args.quant)?;
    let mut model = Model::open_adapted(&args.source, args.adapter.as_deref(), ui)?;
    // A vocabulary out of a GGUF file becomes a tokenizer.json, which every reader understands.
    let side = SideFiles::of(&mut model, args.to)?;
    let plan = plan(&model.files, requested, args.to)?;
    let bytes_in: u64 = plan.iter().map(|(from, _)| from.byte_len() as u64).sum();
    let plan: Vec<TensorMeta> = plan.into_iter().map(|(_, to)| to).collect();
    match args.to {
        Target::Bundle => write_bundle(&args.output, &model, &plan, ui)?,
        Target::Safetensors => write_directory(&args.output, &model.files, &plan, max_shard_bytes, ui)?,
        Target::Gguf => write_gguf(&args.output, &model, &plan, ui)?,
    }
    drop(side);
    Ok(ConvertReport {
        bytes_in,
        bytes_out: disk_bytes(&args.output)?,
        peak_rss_bytes: machine::peak_rss_bytes(),
        wall_s: start.elapsed().as_secs_f64(),
        output: args.output.clone(),
    })
}

fn requested_format(name: &str) -> anyhow::Result<Option<FormatRef>> {
    if name == "none" {
        return Ok(None);
    }
    let format = quant::by_name(name).map_err(|e| usage(e.to_string()))?;
    if !quant::is_writable(format) {
        let writable: Vec<_> =
            quant::FORMATS.iter().filter(|f| quant::is_writable(**f)).map(|f| f.name()).collect();
        return Err(usage(format!("{name} can be read but not written; use none, {}", writable.join(", "))));
    }
    Ok(Some(format))
}

/// Every tensor the architecture uses, in execution order: as the source has it, and as the output will.
fn plan(
    files: &ModelFiles,
    requested: Option<FormatRef>,
    target: Target,
) -> anyhow::Result<Vec<(TensorMeta, TensorMeta)>> {
    if let (Target::Safetensors, Some(format)) = (target, requested)
        && !quant::is_float(format)
    {
        let name = format.name();
        return Err(usage(format!(
            "safetensors cannot hold {name}; use --to bundle or --to gguf, or --quant bf16"
        )));
    }
    let architecture = hearth_model::architecture(&files.config)?;
    let mut plan = Vec::new();
    for spec in hearth_model::params(architecture.as_ref()) {
        let from = files.expect(&spec.name, &spec.shape)?.clone();
        let format = output_format(files, &from, requested, target);
        plan.push((from.clone(), TensorMeta { format, ..from }));
    }
    Ok(plan)
}

fn output_format(
    files: &ModelFiles,
    from: &TensorMeta,
    requested: Option<FormatRef>,
    target: Target,
) -> FormatRef {
    let vector = from.shape.len() < 2;
    match target {
        Target::Bundle => hearth_weights::storage_format(from, requested),
        // llama.cpp wants vectors in f32 whatever the matrices are.
        Target::Gguf if vector => quant::F32,
        Target::Gguf => hearth_weights::storage_format(from, requested),
        Target::Safetensors => match requested {
            Some(format) => format,
            None if quant::is_float(from.format) => from.format,
            None => files.float_format(),
        },
    }
}

fn write_bundle(output: &Path, model: &Model, plan: &[TensorMeta], ui: &Ui) -> anyhow::Result<()> {
    let mut writer = BundleWriter::create(output)?.with_layouts(LAYOUTS);
    writer.model_files(&model.files)?;
    write_tensors(&model.files, plan, ui, |meta, bytes| writer.tensor(meta, bytes))?;
    let golden = golden::compute(&writer.preview()?, &golden::prompts(model)?)?;
    writer.golden(&serde_json::to_vec(&golden)?)?;
    Ok(writer.finish()?)
}

fn write_directory(
    output: &Path,
    files: &ModelFiles,
    plan: &[TensorMeta],
    max_shard_bytes: u64,
    ui: &Ui,
) -> anyhow::Result<()> {
    let mut writer = HfWriter::create(output, &files.hf_config, plan, max_shard_bytes)?;
    for (name, bytes) in hf_dir::side_files(files)? {
        writer.file(&name, &bytes)?;
    }
    write_tensors(files, plan, ui, |meta, bytes| writer.tensor(&meta.name, bytes))?;
    Ok(writer.finish()?)
}

fn write_gguf(output: &Path, model: &Model, plan: &[TensorMeta], ui: &Ui) -> anyhow::Result<()> {
    let files = &model.files;
    let vocabulary = crate::gguf_vocabulary::of(model)?;
    let name = output.file_stem().map_or("model".into(), |stem| stem.to_string_lossy());
    let header = GgufHeader {
        name: &name,
        config: &files.config,
        vocabulary: vocabulary.as_ref(),
        chat_template: files.chat_template.as_deref(),
    };
    let mut writer = GgufWriter::create(output, &header, plan)?;
    write_tensors(files, plan, ui, |meta, bytes| writer.tensor(&meta.name, bytes))?;
    Ok(writer.finish()?)
}

/// Reads, encodes and hands on one tensor after another through one buffer.
fn write_tensors(
    files: &ModelFiles,
    plan: &[TensorMeta],
    ui: &Ui,
    mut write: impl FnMut(&TensorMeta, &[u8]) -> Result<(), hearth_weights::Error>,
) -> anyhow::Result<()> {
    let mut buffer = Vec::new();
    let progress = ui.bar(plan.len() as u64);
    for (done, meta) in plan.iter().enumerate() {
        buffer.clear();
        hearth_weights::encode(&*files.tensors, &meta.name, meta.format, &mut buffer)?;
        write(meta, &buffer)?;
        progress.at(done as u64 + 1, "tensors");
    }
    progress.finish();
    Ok(())
}

/// Tokenizer files made for the time of a conversion.
struct SideFiles {
    _folder: Option<tempfile::TempDir>,
}

impl SideFiles {
    fn of(model: &mut Model, target: Target) -> anyhow::Result<Self> {
        let (TokenizerFiles::Gguf(_), Some(tokenizer)) = (&model.files.tokenizer, &model.tokenizer) else {
            return Ok(Self { _folder: None });
        };
        if target == Target::Gguf {
            return Ok(Self { _folder: None });
        }
        let folder = tempfile::tempdir().context("no temporary folder for the tokenizer's files")?;
        let path = folder.path().join("tokenizer.json");
        tokenizer.save(&path)?;
        let config = tokenizer.config(model.files.chat_template.as_deref());
        std::fs::write(folder.path().join("tokenizer_config.json"), format!("{config:#}\n"))?;
        model.files.tokenizer = TokenizerFiles::Json { path };
        Ok(Self { _folder: Some(folder) })
    }
}

/// Bytes of a file, or of all files in a directory.
pub fn disk_bytes(path: &Path) -> anyhow::Result<u64> {
    let meta = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !meta.is_dir() {
        return Ok(meta.len());
    }
    let mut total = 0;
    for entry in std::fs::read_dir(path)? {
        total += disk_bytes(&entry?.path())?;
    }
    Ok(total)
}

impl Report for ConvertReport {
    fn text(&self) -> String {
        table([
            ("written", self.output.display().to_string()),
            ("weights in", bytes(self.bytes_in)),
            ("written in all", bytes(self.bytes_out)),
            ("peak memory", bytes(self.peak_rss_bytes)),
            ("time", format!("{:.1} s", self.wall_s)),
        ])
    }
}
