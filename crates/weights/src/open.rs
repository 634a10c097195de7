//! A path → [`ModelFiles`]: HF directory, GGUF file or bundle.

use crate::Error;
use crate::bundle::{self, Layout};
use crate::config::{self, ModelConfig};
use crate::gguf::{Gguf, GgufSource};
use crate::mapped::{read_json, read_text};
use crate::renamed::Renamed;
use crate::safetensors::SafetensorsSource;
use crate::source::{GgufVocabulary, ModelFiles, TensorSource, TokenizerFiles};
use crate::torch_bin::TorchBinSource;
use serde_json::{Map, Value};
use std::path::Path;

/// Largest configuration or template read.
const TEXT_LIMIT: u64 = 64 << 20;

/// Opens a model: a Hugging Face directory, a `.gguf` file, or a bundle directory. Tensors are read when asked for.
///
/// # Errors
/// One sentence naming the file, the thing in it and what to do. Bundles with matrices in a [`Layout`] take
/// [`open_with`].
pub fn open(path: &Path) -> Result<ModelFiles, Error> {
    open_with(path, &[])
}

/// As [`fn@open`], with the layouts that a bundle's matrices may be stored in.
///
/// # Errors
/// As there.
pub fn open_with(path: &Path, layouts: &'static [Layout]) -> Result<ModelFiles, Error> {
    if !path.exists() {
        let what = "there is nothing at this path; give a Hugging Face directory, a .gguf file or a bundle";
        return Err(Error::not_a_model(path, what));
    }
    match path.is_dir() {
        true if bundle::is_bundle(path) => bundle::open_bundle(path, layouts),
        true => open_directory(path),
        false => open_file(path),
    }
}

fn open_file(path: &Path) -> Result<ModelFiles, Error> {
    if Gguf::is_gguf(path) {
        return open_gguf(path);
    }
    let what = match path.extension().and_then(|e| e.to_str()) {
        Some("gguf") => "it does not start with GGUF; it may be cut short or still a Git LFS pointer",
        Some("safetensors" | "bin" | "json") => "give the directory that holds it and config.json",
        _ => "it is neither a directory nor a GGUF file",
    };
    Err(Error::not_a_model(path, what))
}

fn open_gguf(path: &Path) -> Result<ModelFiles, Error> {
    let file = Gguf::open(path)?;
    if let Some(parts) = file.size("split.count")?.filter(|n| *n > 1) {
        let what = format!("it is one of {parts} parts; join them with llama-gguf-split --merge first");
        return Err(Error::unsupported(path, what));
    }
    let architecture = config::architecture(&file)?;
    if let Some(experts) = file.size(&format!("{}.expert_count", architecture.gguf))?.filter(|n| *n > 0) {
        let what = format!("it is a mixture of {experts} experts, hearth computes dense models");
        return Err(Error::unsupported(path, what));
    }
    let config = ModelConfig::from_gguf(&file)?;
    let tokenizer = match vocabulary(&file)? {
        Some(vocabulary) => TokenizerFiles::Gguf(Box::new(vocabulary)),
        None => TokenizerFiles::None,
    };
    let chat_template = file.string("tokenizer.chat_template")?.map(str::to_owned);
    Ok(ModelFiles {
        path: path.to_owned(),
        hf_config: config.to_hf(),
        tensors: Box::new(GgufSource::new(file, architecture, &config)?),
        config,
        tokenizer,
        chat_template,
    })
}

/// The vocabulary inside a GGUF file, if it has one.
fn vocabulary(file: &Gguf) -> Result<Option<GgufVocabulary>, Error> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let Some(model) = file.string(&key("model"))? else { return Ok(None) };
    let id = |name: &str| -> Result<Option<u32>, Error> {
        Ok(file.int(&key(name))?.and_then(|n| u32::try_from(n).ok()).filter(|n| *n != u32::MAX))
    };
    let tokens = file.strings(&key("tokens"))?;
    let vocabulary = GgufVocabulary {
        model: model.to_owned(),
        pre: file.string(&key("pre"))?.map(str::to_owned),
        scores: file.floats(&key("scores"))?.into_iter().map(|f| f as f32).collect(),
        token_types: file.ints(&key("token_type"))?.into_iter().map(|n| n as i32).collect(),
        merges: file.strings(&key("merges"))?,
        bos: id("bos_token_id")?,
        eos: id("eos_token_id")?,
        unk: id("unknown_token_id")?,
        pad: id("padding_token_id")?,
        add_bos: file.flag(&key("add_bos_token"))?,
        add_eos: file.flag(&key("add_eos_token"))?,
        add_space_prefix: file.flag(&key("add_space_prefix"))?,
        tokens,
    };
    let count = vocabulary.tokens.len();
    for (name, len) in [("scores", vocabulary.scores.len()), ("token_type", vocabulary.token_types.len())] {
        if len != 0 && len != count {
            let what = format!("tokenizer.ggml.{name} has {len} entries, there are {count} tokens");
            return Err(Error::damaged(file.path(), what));
        }
    }
    Ok(Some(vocabulary))
}

fn open_directory(path: &Path) -> Result<ModelFiles, Error> {
    let config_path = path.join("config.json");
    if !config_path.exists() {
        return Err(Error::not_a_model(path, why_no_config(path)));
    }
    let hf_config = read_json(&config_path, TEXT_LIMIT)?;
    let mut config = ModelConfig::from_hf(&hf_config).map_err(|e| e.in_file(&config_path))?;
    let generation = path.join("generation_config.json");
    if generation.exists() {
        let json = read_json(&generation, TEXT_LIMIT)?;
        config::add_generation_eos(&mut config, &json).map_err(|e| e.in_file(&generation))?;
    }
    let tokenizer = path.join("tokenizer.json");
    Ok(ModelFiles {
        path: path.to_owned(),
        tensors: canonical(open_weights(path)?),
        config,
        hf_config,
        tokenizer: if tokenizer.is_file() {
            TokenizerFiles::Json { path: tokenizer }
        } else {
            TokenizerFiles::None
        },
        chat_template: chat_template(path)?,
    })
}

fn why_no_config(path: &Path) -> String {
    if path.join("adapter_config.json").exists() {
        return "it holds a LoRA adapter; give the base model, and the adapter with --adapter".into();
    }
    let gguf = std::fs::read_dir(path)
        .ok()
        .and_then(|entries| entries.flatten().find(|e| e.path().extension().is_some_and(|x| x == "gguf")));
    match gguf {
        Some(file) => {
            format!("it has no config.json; for the GGUF file in it give {}", file.path().display())
        }
        None => "it has no config.json".into(),
    }
}

/// Models saved without their output head lack the `model.` in front of every name.
fn canonical(source: Box<dyn TensorSource>) -> Box<dyn TensorSource> {
    let has = |name| crate::source::position(source.tensors(), name).is_some();
    if has("embed_tokens.weight") && !has("model.embed_tokens.weight") {
        return Box::new(Renamed::new(source, |name| match name {
            "lm_head.weight" => Some(name.to_owned()),
            _ => Some(format!("model.{name}")),
        }));
    }
    source
}

/// The weights of a Hugging Face directory, safetensors preferred.
fn open_weights(path: &Path) -> Result<Box<dyn TensorSource>, Error> {
    let index = path.join("model.safetensors.index.json");
    let single = path.join("model.safetensors");
    if index.exists() {
        return Ok(Box::new(SafetensorsSource::open_index(&index)?));
    }
    if single.exists() {
        return Ok(Box::new(SafetensorsSource::open(&single)?));
    }
    let index = path.join("pytorch_model.bin.index.json");
    let single = path.join("pytorch_model.bin");
    if index.exists() {
        return Ok(Box::new(TorchBinSource::open_index(&index)?));
    }
    if single.exists() {
        return Ok(Box::new(TorchBinSource::open(&single)?));
    }
    Err(Error::not_a_model(
        path,
        "it has config.json but no weights: model.safetensors, model.safetensors.index.json, pytorch_model.bin or \
         pytorch_model.bin.index.json",
    ))
}

/// `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`: a string or a list of named ones.
fn chat_template(path: &Path) -> Result<Option<String>, Error> {
    let own = path.join("chat_template.jinja");
    if own.exists() {
        return read_text(&own, TEXT_LIMIT).map(Some);
    }
    let tokenizer_config = path.join("tokenizer_config.json");
    if !tokenizer_config.exists() {
        return Ok(None);
    }
    Ok(template_of(&read_json(&tokenizer_config, TEXT_LIMIT)?))
}

fn template_of(tokenizer_config: &Map<String, Value>) -> Option<String> {
    match tokenizer_config.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => {
            let named_default = named.iter().find(|t| t.get("name").is_some_and(|n| n == "default"));
            named_default.or(named.first())?.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}
