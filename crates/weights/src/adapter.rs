//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

use crate::Error;
use crate::mapped::read_json;
use crate::quant;
use crate::renamed::Renamed;
use crate::safetensors::{Body, SafetensorsSource};
use crate::source::{TensorMeta, TensorSource};
use crate::staged::StagedDir;
use crate::torch_bin::TorchBinSource;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What PEFT puts before the name of every module.
const PREFIX: &str = "base_model.model.";
/// Largest `adapter_config.json` read.
const CONFIG_LIMIT: u64 = 16 << 20;

/// A low-rank adapter: each target weight becomes `W + scale · B·A`.
pub struct Adapter {
    /// Where it was opened from.
    pub path: PathBuf,
    /// Default rank.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Divide by `√rank` instead of `rank` (rsLoRA).
    pub rslora: bool,
    /// Dropout the adapter was trained with.
    pub dropout: f64,
    /// Target modules as configured, e.g. `q_proj`.
    pub targets: Vec<String>,
    /// Canonical names of the adapted modules, e.g. `model.layers.0.self_attn.q_proj`, sorted.
    pub modules: Vec<String>,
    /// `<module>.lora_A.weight` `[rank, in]` and `<module>.lora_B.weight` `[out, rank]`.
    pub tensors: Box<dyn TensorSource>,
}

impl Adapter {
    /// What `B·A` is multiplied by for a module of this rank.
    pub fn scale(&self, rank: usize) -> f64 {
        let rank = rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// Opens an adapter that PEFT or hearth wrote.
///
/// # Errors
/// [`Error::Adapter`] for kinds of adapter hearth does not compute and for tensors that do not fit together.
pub fn open_adapter(path: &Path) -> Result<Adapter, Error> {
    let config_path = path.join("adapter_config.json");
    if !config_path.exists() {
        return Err(Error::adapter(
            path,
            "it has no adapter_config.json, so it is not a LoRA adapter directory",
        ));
    }
    let json = read_json(&config_path, CONFIG_LIMIT)?;
    refuse_variants(&config_path, &json)?;
    let number = |key: &str| {
        json.get(key).and_then(Value::as_f64).filter(|n| n.is_finite() && *n >= 0.0).ok_or_else(|| {
            Error::adapter(&config_path, format!("{key} is missing or not a number from 0 up"))
        })
    };
    let rank = number("r")?;
    if rank < 1.0 || rank.fract() != 0.0 || rank > 65536.0 {
        return Err(Error::adapter(
            &config_path,
            format!("r is {rank}, it must be a whole number from 1 to 65536"),
        ));
    }
    let inner = open_tensors(path)?;
    let tensors = Renamed::new(inner, |name| {
        // Some writers put the adapter's name, `default`, in the middle.
        let name = name.strip_prefix(PREFIX).unwrap_or(name);
        Some(name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B."))
    });
    let modules = paired_modules(path, &tensors)?;
    Ok(Adapter {
        path: path.to_owned(),
        rank: rank as usize,
        alpha: number("lora_alpha")?,
        rslora: json.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        dropout: json.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
        targets: target_names(&json),
        modules,
        tensors: Box::new(tensors),
    })
}

fn open_tensors(path: &Path) -> Result<Box<dyn TensorSource>, Error> {
    let safetensors = path.join("adapter_model.safetensors");
    let bin = path.join("adapter_model.bin");
    if safetensors.exists() {
        return Ok(Box::new(SafetensorsSource::open(&safetensors)?));
    }
    if bin.exists() {
        return Ok(Box::new(TorchBinSource::open(&bin)?));
    }
    Err(Error::adapter(path, "it has neither adapter_model.safetensors nor adapter_model.bin"))
}

/// Refuses what would silently be computed wrong.
fn refuse_variants(path: &Path, json: &Map<String, Value>) -> Result<(), Error> {
    let refuse = |what: String| Err(Error::adapter(path, what));
    let set = |key: &str| match json.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Object(map)) => !map.is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        Some(_) => true,
    };
    match json.get("peft_type").and_then(Value::as_str) {
        Some("LORA") | None => {}
        Some(other) => return refuse(format!("peft_type is {other:?}, hearth reads LORA")),
    }
    match json.get("bias").and_then(Value::as_str) {
        Some("none") | None => {}
        Some(other) => {
            return refuse(format!("bias is {other:?}, hearth merges adapters with bias \"none\""));
        }
    }
    let variants = ["use_dora", "fan_in_fan_out", "modules_to_save", "alpha_pattern", "megatron_config"];
    match variants.into_iter().find(|key| set(key)) {
        Some(key) => refuse(format!("{key} is set, which hearth does not compute; train without it")),
        None => Ok(()),
    }
}

fn target_names(json: &Map<String, Value>) -> Vec<String> {
    match json.get("target_modules") {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        _ => vec![],
    }
}

/// Modules that have an A and a B whose shapes fit; anything else in the file is refused.
fn paired_modules(path: &Path, tensors: &dyn TensorSource) -> Result<Vec<String>, Error> {
    let mut modules = Vec::new();
    for meta in tensors.tensors() {
        let Some(module) = meta.name.strip_suffix(".lora_A.weight") else {
            if meta.name.ends_with(".lora_B.weight") {
                tensors.meta(&meta.name.replace(".lora_B.", ".lora_A."))?;
                continue;
            }
            let what = format!("tensor {} is neither a lora_A nor a lora_B weight", meta.name);
            return Err(Error::adapter(path, what));
        };
        let b = tensors.meta(&format!("{module}.lora_B.weight"))?;
        let fits = meta.shape.len() == 2 && b.shape.len() == 2 && meta.shape[0] == b.shape[1];
        if !fits || meta.shape[0] == 0 {
            let what = format!(
                "{module}: lora_A has shape {:?} and lora_B {:?}; they must be [rank, in] and [out, rank]",
                meta.shape, b.shape
            );
            return Err(Error::adapter(path, what));
        }
        modules.push(module.to_owned());
    }
    if modules.is_empty() {
        return Err(Error::adapter(path, "it holds no lora_A tensors"));
    }
    Ok(modules)
}

/// What an adapter's configuration says.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    /// Rank of every A and B.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Divide by `√rank` instead of `rank`.
    pub rslora: bool,
    /// Dropout during training.
    pub dropout: f64,
    /// Target modules, e.g. `q_proj`.
    pub targets: Vec<String>,
    /// Where the base model is, for PEFT's `from_pretrained`.
    pub base_model: String,
}

/// Writes an adapter directory that `peft` loads. `tensors` gives `(name, shape, values)` with names
/// `<module>.lora_A.weight` and `<module>.lora_B.weight`.
///
/// # Errors
/// [`Error::Exists`] or [`Error::Io`]; nothing is left behind.
pub fn write_adapter(
    destination: &Path,
    spec: &AdapterSpec,
    tensors: &[(String, Vec<usize>, Vec<f32>)],
) -> Result<(), Error> {
    let staged = StagedDir::create(destination)?;
    let plan: Vec<TensorMeta> = tensors
        .iter()
        .map(|(name, shape, _)| TensorMeta {
            name: format!("{PREFIX}{name}"),
            shape: shape.clone(),
            format: quant::F32,
        })
        .collect();
    let mut body = Body::create(&staged.path().join("adapter_model.safetensors"), &plan, &torch_metadata())?;
    for (meta, (_, _, values)) in plan.iter().zip(tensors) {
        let mut bytes = vec![0; values.len() * 4];
        meta.format.quantize(values, &mut bytes);
        body.tensor(&meta.name, &bytes)?;
    }
    body.finish()?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": false,
        "target_modules": spec.targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
    });
    staged.file("adapter_config.json", format!("{config:#}\n").as_bytes())?;
    staged.commit()
}

/// What transformers asks of a safetensors file's metadata.
pub(crate) fn torch_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}
