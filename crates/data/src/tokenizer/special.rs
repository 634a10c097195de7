//! Which ids begin, end and pad a sequence.

use crate::error::Error;
use serde_json::{Map, Value, json};
use std::path::Path;
use tokenizers::Tokenizer as Backend;

/// Ids with a role.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) pad: Option<u32>,
}

/// Looks the roles up beside `tokenizer.json`, the most specific file first.
pub(super) fn from_folder(folder: &Path, backend: &Backend) -> Result<SpecialIds, Error> {
    let named = [folder.join("tokenizer_config.json"), folder.join("special_tokens_map.json")]
        .iter()
        .map(|path| read_object(path))
        .collect::<Result<Vec<_>, _>>()?;
    let model = read_object(&folder.join("config.json"))?;
    let find = |role: &str| {
        named
            .iter()
            .filter_map(|file| token_text(file.get(&format!("{role}_token"))?))
            .find_map(|token| backend.token_to_id(token))
            .or_else(|| first_id(model.get(&format!("{role}_token_id"))?))
    };
    Ok(SpecialIds { bos: find("bos"), eos: find("eos"), unk: find("unk"), pad: find("pad") })
}

fn read_object(path: &Path) -> Result<Map<String, Value>, Error> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(Error::io(path)(error)),
    };
    serde_json::from_slice(&bytes).map_err(|e| Error::TokenizerFile {
        path: path.to_path_buf(),
        reason: format!("not a JSON object: {e}"),
    })
}

/// A token is written as a string or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// An id, or the first of a list of ids.
fn first_id(value: &Value) -> Option<u32> {
    let value = value.as_array().map_or(Some(value), |list| list.first())?;
    u32::try_from(value.as_u64()?).ok()
}

/// `tokenizer_config.json` as `transformers` reads it.
pub(super) fn config(
    ids: &SpecialIds,
    chat_template: Option<&str>,
    token: impl Fn(u32) -> Option<String>,
) -> Value {
    let mut out = Map::new();
    out.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    for (role, id) in [("bos", ids.bos), ("eos", ids.eos), ("unk", ids.unk), ("pad", ids.pad)] {
        if let Some(text) = id.and_then(&token) {
            out.insert(format!("{role}_token"), json!(text));
        }
    }
    // Decoding must give back the very text: no removal of spaces before punctuation.
    out.insert("clean_up_tokenization_spaces".into(), json!(false));
    if let Some(template) = chat_template {
        out.insert("chat_template".into(), json!(template));
    }
    Value::Object(out)
}
