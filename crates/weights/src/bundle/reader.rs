//! Opens a bundle: every part is hashed before anything is believed.

use super::layout::Layout;
use super::manifest::{Manifest, Part, TensorRow, hex};
use super::{GOLDEN, MANIFEST, WEIGHTS};
use crate::Error;
use crate::config::ModelConfig;
use crate::hf_dir::VOCABULARY_FILE;
use crate::mapped::{Mapped, read_json, read_text};
use crate::safetensors::is_plain_name;
use crate::source::{
    FileRange, Image, ModelFiles, TensorMeta, TensorSource, TokenizerFiles, missing, position,
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Largest text part read.
const TEXT_LIMIT: u64 = 1 << 30;

/// Whether the directory is a bundle. A checkpoint of a full fine-tune has a manifest of its own beside the
/// `model.safetensors` that makes it a Hugging Face directory.
pub fn is_bundle(path: &Path) -> bool {
    path.join(MANIFEST).is_file() && !path.join("model.safetensors").is_file()
}

/// Opens a bundle and verifies it. `layouts` are those that its matrices may be stored in.
///
/// # Errors
/// [`Error::HashMismatch`] naming the part; [`Error::Damaged`] for a missing part or one of another length.
pub fn open_bundle(path: &Path, layouts: &'static [Layout]) -> Result<ModelFiles, Error> {
    let manifest = Manifest::read(path)?;
    for name in ["config.json", WEIGHTS] {
        if !manifest.parts.contains_key(name) {
            return Err(Error::damaged(&path.join(MANIFEST), format!("it lists no {name}")));
        }
    }
    manifest.parts.par_iter().try_for_each(|(name, part)| verify(path, name, part))?;
    let config_path = path.join("config.json");
    let hf_config = read_json(&config_path, TEXT_LIMIT)?;
    let has = |name: &str| manifest.parts.contains_key(name);
    Ok(ModelFiles {
        path: path.to_owned(),
        config: ModelConfig::from_hf(&hf_config).map_err(|e| e.in_file(&config_path))?,
        hf_config,
        tensors: Box::new(BundleSource::new(path, &manifest.tensors, layouts)?),
        tokenizer: tokenizer(path, has)?,
        chat_template: match has("chat_template.jinja") {
            true => Some(read_text(&path.join("chat_template.jinja"), TEXT_LIMIT)?),
            false => None,
        },
    })
}

/// The golden prompts of a bundle, if it has any, verified.
///
/// # Errors
/// As [`open_bundle`].
pub fn golden(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let manifest = Manifest::read(path)?;
    let Some(part) = manifest.parts.get(GOLDEN) else { return Ok(None) };
    verify(path, GOLDEN, part)?;
    let file = path.join(GOLDEN);
    std::fs::read(&file).map(Some).map_err(Error::io(&file))
}

fn tokenizer(path: &Path, has: impl Fn(&str) -> bool) -> Result<TokenizerFiles, Error> {
    if has("tokenizer.json") {
        return Ok(TokenizerFiles::Json { path: path.join("tokenizer.json") });
    }
    if has(VOCABULARY_FILE) {
        let file = path.join(VOCABULARY_FILE);
        let text = read_text(&file, TEXT_LIMIT)?;
        let vocabulary = serde_json::from_str(&text).map_err(|e| Error::damaged(&file, e.to_string()))?;
        return Ok(TokenizerFiles::Gguf(Box::new(vocabulary)));
    }
    Ok(TokenizerFiles::None)
}

fn verify(path: &Path, name: &str, part: &Part) -> Result<(), Error> {
    if !is_plain_name(name) {
        return Err(Error::damaged(&path.join(MANIFEST), format!("part {name:?} is not a file name")));
    }
    let file = path.join(name);
    let meta = std::fs::metadata(&file).map_err(Error::io(&file))?;
    if meta.len() != part.bytes {
        let what = format!("it has {} bytes, the manifest says {}", meta.len(), part.bytes);
        return Err(Error::damaged(&file, what));
    }
    let found = hash_file(&file)?;
    if found != part.sha256 {
        return Err(Error::HashMismatch {
            path: path.to_owned(),
            part: name.to_owned(),
            expected: part.sha256.clone(),
            found,
        });
    }
    Ok(())
}

/// Read rather than mapped: hashing must not make the whole model resident.
fn hash_file(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// The tensors of a bundle.
pub struct BundleSource {
    path: PathBuf,
    weights: Mapped,
    metas: Vec<TensorMeta>,
    /// Beside `metas`.
    stored: Vec<Stored>,
}

/// Where and how a tensor lies in the file.
struct Stored {
    place: Range<usize>,
    /// `None` = row by row.
    layout: Option<&'static Layout>,
}

impl BundleSource {
    pub(super) fn new(
        path: &Path,
        rows: &[TensorRow],
        layouts: &'static [Layout],
    ) -> Result<BundleSource, Error> {
        let file = path.join(WEIGHTS);
        let weights = Mapped::open(&file)?;
        let mut table = Vec::with_capacity(rows.len());
        for row in rows {
            let (meta, layout) = row.checked(&file, weights.bytes().len() as u64, layouts)?;
            let place = row.offset as usize..(row.offset + row.bytes) as usize;
            table.push((meta, Stored { place, layout }));
        }
        table.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let (metas, stored): (Vec<TensorMeta>, Vec<_>) = table.into_iter().unzip();
        if let Some(pair) = metas.windows(2).find(|p| p[0].name == p[1].name) {
            return Err(Error::tensor(&file, &pair[0].name, "the manifest lists it twice"));
        }
        Ok(BundleSource { path: path.to_owned(), weights, metas, stored })
    }

    fn file_range(&self, place: &Range<usize>) -> FileRange {
        FileRange { path: self.path.join(WEIGHTS), range: place.start as u64..place.end as u64 }
    }
}

impl TensorSource for BundleSource {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let Some(at) = position(&self.metas, name) else {
            return Err(missing(&self.path, &self.metas, name));
        };
        let Stored { place, layout } = &self.stored[at];
        let bytes = &self.weights.bytes()[place.clone()];
        Ok(match layout {
            None => Cow::Borrowed(bytes),
            Some(layout) => Cow::Owned((layout.unpack)(&self.metas[at], bytes)),
        })
    }

    fn release(&self, name: &str) {
        if let Some(at) = position(&self.metas, name) {
            self.weights.release(self.stored[at].place.clone());
        }
    }

    fn place(&self, name: &str) -> Option<FileRange> {
        let stored = &self.stored[position(&self.metas, name)?];
        stored.layout.is_none().then(|| self.file_range(&stored.place))
    }

    fn image(&self, name: &str) -> Option<Image<'_>> {
        let Stored { place, layout } = &self.stored[position(&self.metas, name)?];
        let bytes = &self.weights.bytes()[place.clone()];
        Some(Image { layout: (*layout)?.name, bytes, place: self.file_range(place) })
    }

    fn origin(&self) -> &Path {
        &self.path
    }
}
