//! `manifest.json`: what a bundle consists of.

use super::layout::{self, Layout};
use super::{ALIGNMENT, MANIFEST};
use crate::Error;
use crate::mapped::read_json;
use crate::quant;
use crate::source::TensorMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// What `format` says.
const FORMAT: &str = "hearth-bundle";
/// The version this code writes. It also reads version 1, which had no layouts.
const VERSION: u64 = 2;
/// Largest manifest read.
const LIMIT: u64 = 256 << 20;

#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub(super) struct TensorRow {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) format: String,
    /// How a matrix is stored; absent = row by row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) layout: Option<String>,
    /// Where it starts in `weights.bin`.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: String,
    version: u64,
    created_by: String,
    pub(super) parts: BTreeMap<String, Part>,
    pub(super) tensors: Vec<TensorRow>,
}

impl Manifest {
    pub(super) fn new(parts: BTreeMap<String, Part>, tensors: Vec<TensorRow>) -> Manifest {
        let created_by = concat!("hearth ", env!("CARGO_PKG_VERSION")).to_owned();
        Manifest { format: FORMAT.into(), version: VERSION, created_by, parts, tensors }
    }

    /// The file's text: the manifest with the sha256 of itself.
    pub(super) fn to_text(&self) -> String {
        let mut json = json!(self);
        json["sha256"] = hex(&Sha256::digest(json.to_string())).into();
        format!("{json:#}\n")
    }

    /// Reads the manifest of the bundle at `path` and checks its own hash.
    pub(super) fn read(path: &Path) -> Result<Manifest, Error> {
        let file = path.join(MANIFEST);
        let mut json = read_json(&file, LIMIT)?;
        check_version(&file, &json)?;
        let claimed = match json.shift_remove("sha256") {
            Some(Value::String(hash)) => hash,
            _ => return Err(Error::damaged(&file, "it has no sha256 of itself")),
        };
        let json = Value::Object(json);
        let found = hex(&Sha256::digest(json.to_string()));
        if found != claimed {
            return Err(Error::HashMismatch {
                path: path.to_owned(),
                part: MANIFEST.into(),
                expected: claimed,
                found,
            });
        }
        serde_json::from_value(json).map_err(|e| Error::damaged(&file, e.to_string()))
    }
}

fn check_version(file: &Path, json: &Map<String, Value>) -> Result<(), Error> {
    if json.get("format").and_then(Value::as_str) != Some(FORMAT) {
        return Err(Error::damaged(
            file,
            format!("its format is not {FORMAT:?}, so it is not a bundle's manifest"),
        ));
    }
    match json.get("version").and_then(Value::as_u64) {
        Some(1..=VERSION) => Ok(()),
        other => {
            let found = other.map_or("missing".to_owned(), |v| v.to_string());
            let what =
                format!("bundle version {found}, this hearth reads 1 to {VERSION}: convert the model again");
            Err(Error::unsupported(file, what))
        }
    }
}

impl TensorRow {
    /// The row as a tensor and its layout, checked against the size of `weights.bin`.
    pub(super) fn checked(
        &self,
        file: &Path,
        weights_bytes: u64,
        layouts: &'static [Layout],
    ) -> Result<(TensorMeta, Option<&'static Layout>), Error> {
        let lies = |what: String| Error::tensor(file, &self.name, what);
        let format = quant::by_name(&self.format).map_err(|e| lies(e.to_string()))?;
        let rows = quant::byte_len(format, &self.shape)
            .ok_or_else(|| lies(format!("shape {:?} is not whole blocks of {}", self.shape, self.format)))?;
        let meta = TensorMeta { name: self.name.clone(), shape: self.shape.clone(), format };
        let (layout, bytes) = match &self.layout {
            None => (None, rows),
            Some(name) => {
                let unknown = || {
                    let what =
                        format!("it is stored as {name:?}, which is not known here; convert the model again");
                    lies(what)
                };
                let layout = layout::by_name(layouts, name).ok_or_else(unknown)?;
                let none = || lies(format!("{:?} in {} cannot be stored as {name}", self.shape, self.format));
                (Some(layout), (layout.bytes)(&meta).ok_or_else(none)?)
            }
        };
        if bytes as u64 != self.bytes || bytes == 0 {
            return Err(lies(format!(
                "{:?} in {} takes {bytes} bytes, not {}",
                self.shape, self.format, self.bytes
            )));
        }
        if !self.offset.is_multiple_of(ALIGNMENT) {
            return Err(lies(format!("it starts at byte {}, not at a multiple of {ALIGNMENT}", self.offset)));
        }
        let end = self.offset.checked_add(self.bytes);
        if end.is_none_or(|end| end > weights_bytes) {
            let what =
                format!("{} bytes at {} reach past weights.bin ({weights_bytes})", self.bytes, self.offset);
            return Err(lies(what));
        }
        Ok((meta, layout))
    }
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
