//! A path → weights, tokenizer and chat template that belong together.

use crate::exit::usage;
use crate::ui::Ui;
use anyhow::Context;
use hearth_data::{ChatTemplate, GgufVocab, Tokenizer};
use hearth_weights::{GgufVocabulary, Merged, ModelFiles, TokenizerFiles};
use std::path::{Path, PathBuf};

/// A model on disk with the words it uses.
pub struct Model {
    /// Configuration and weights.
    pub files: ModelFiles,
    /// Text ⇄ ids, if the model has a tokenizer.
    pub tokenizer: Option<Tokenizer>,
    /// How conversations are written, if the model has a chat template.
    pub template: Option<ChatTemplate>,
}

impl Model {
    /// Opens a model and lays an adapter over it, if one is given. Where `path` itself is an adapter, such as the
    /// checkpoint of a LoRA run, the base model is where its configuration says.
    ///
    /// # Errors
    /// As [`Model::open`]; an adapter that belongs to another model.
    pub fn open_adapted(path: &Path, adapter: Option<&Path>, ui: &Ui) -> anyhow::Result<Self> {
        if adapter.is_none() && is_adapter(path) {
            let base = base_of(path)?;
            ui.note(format!("{} is an adapter; its base model is {}", path.display(), base.display()));
            return Self::open_adapted(&base, Some(path), ui);
        }
        let mut model = Self::open(path, ui)?;
        if let Some(adapter) = adapter {
            if !adapter.exists() {
                return Err(usage(format!("there is no adapter at {}", adapter.display())));
            }
            let adapter = hearth_weights::open_adapter(adapter)?;
            model.files.tensors = Box::new(Merged::new(model.files.tensors, adapter)?);
        }
        Ok(model)
    }

    /// Opens a Hugging Face directory, a `.gguf` file or a bundle.
    ///
    /// # Errors
    /// One sentence naming the file and what is wrong with it.
    pub fn open(path: &Path, ui: &Ui) -> anyhow::Result<Self> {
        if !path.exists() {
            let path = path.display();
            return Err(usage(format!(
                "there is no model at {path}; give a Hugging Face directory, a .gguf file or a bundle"
            )));
        }
        let files = hearth_model::open(path)?;
        let tokenizer = tokenizer(&files.tokenizer)?;
        for warning in tokenizer.iter().flat_map(|t| t.warnings()) {
            ui.note(format!("{}: {warning}", path.display()));
        }
        let template = template(&files, tokenizer.as_ref())?;
        Ok(Self { files, tokenizer, template })
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// A sentence saying that the model has none, and what `instead` to do.
    pub fn need_tokenizer(&self, instead: &str) -> anyhow::Result<&Tokenizer> {
        let path = self.files.path.display();
        self.tokenizer.as_ref().ok_or_else(|| usage(format!("{path} has no tokenizer; {instead}")))
    }

    /// Every token that ends a generation: the configuration's and the tokenizer's.
    pub fn eos_tokens(&self) -> Vec<u32> {
        let mut ids = self.files.config.eos_token_ids.clone();
        ids.extend(self.tokenizer.as_ref().and_then(Tokenizer::eos_id));
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

fn is_adapter(path: &Path) -> bool {
    path.join("adapter_config.json").is_file() && !path.join("config.json").is_file()
}

fn base_of(adapter: &Path) -> anyhow::Result<PathBuf> {
    let path = adapter.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let json: serde_json::Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    match json.get("base_model_name_or_path").and_then(|base| base.as_str()).map(PathBuf::from) {
        Some(base) if base.exists() => Ok(base),
        _ => Err(usage(format!(
            "{} is an adapter, and its base model is not on this machine; give the model, and the adapter with --adapter",
            adapter.display()
        ))),
    }
}

/// The tokenizer behind the files.
///
/// # Errors
/// When it is damaged or of a kind that cannot be read.
pub fn tokenizer(files: &TokenizerFiles) -> Result<Option<Tokenizer>, hearth_data::Error> {
    match files {
        TokenizerFiles::Json { path } => Tokenizer::from_file(path).map(Some),
        TokenizerFiles::Gguf(vocabulary) => Tokenizer::from_gguf(&gguf_vocab(vocabulary)).map(Some),
        TokenizerFiles::None => Ok(None),
    }
}

fn template(
    files: &ModelFiles,
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<ChatTemplate>, hearth_data::Error> {
    let Some(source) = &files.chat_template else { return Ok(None) };
    let bos = tokenizer.and_then(Tokenizer::bos_token);
    let eos = tokenizer.and_then(Tokenizer::eos_token);
    ChatTemplate::new(source, bos.as_deref(), eos.as_deref()).map(Some)
}

/// The weights crate reads the metadata, the data crate makes a tokenizer of it; neither knows the other.
pub(crate) fn gguf_vocab(v: &GgufVocabulary) -> GgufVocab {
    GgufVocab {
        model: v.model.clone(),
        pre: v.pre.clone(),
        tokens: v.tokens.clone(),
        scores: v.scores.clone(),
        token_types: v.token_types.clone(),
        merges: v.merges.clone(),
        bos: v.bos,
        eos: v.eos,
        unk: v.unk,
        pad: v.pad,
        add_bos: v.add_bos,
        add_eos: v.add_eos,
        add_space_prefix: v.add_space_prefix,
    }
}
