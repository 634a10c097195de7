//! The bytes behind each token id, so that text can be put together token by token.

use serde_json::Value;
use std::collections::HashMap;
use tokenizers::Tokenizer as Backend;

/// How the vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spelling {
    /// GPT-2's table: every byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space; with `byte_fallback`, `<0x0A>` is a byte.
    SentencePiece { byte_fallback: bool, strip_leading_space: bool },
    /// Anything else: tokens cannot be decoded one by one.
    Other,
}

/// The bytes of every token.
pub(super) struct Pieces {
    bytes: Vec<Box<[u8]>>,
    special: Vec<bool>,
    spelling: Spelling,
}

/// Ids may have gaps, but a vocabulary cannot claim many more ids than it has tokens.
const LARGEST_GAP: usize = 1 << 20;

impl Pieces {
    pub(super) fn new(backend: &Backend) -> Result<Self, String> {
        let spelling = spelling(backend);
        let vocab = backend.get_vocab(true);
        let len = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if len == 0 {
            return Err("the vocabulary is empty".into());
        }
        if len - vocab.len().min(len) > LARGEST_GAP {
            return Err(format!(
                "the largest token id is {}, but there are only {} tokens",
                len - 1,
                vocab.len()
            ));
        }
        let table = byte_level_table();
        let mut pieces = Self { bytes: vec![Box::default(); len], special: vec![false; len], spelling };
        for (token, id) in &vocab {
            pieces.bytes[*id as usize] = piece_bytes(token, spelling, &table).into_boxed_slice();
        }
        for (id, added) in backend.get_added_tokens_decoder() {
            // An added token stands for its own text, whatever the vocabulary's spelling.
            if let Some(slot) = pieces.bytes.get_mut(id as usize) {
                *slot = added.content.as_bytes().into();
                pieces.special[id as usize] = added.special;
            }
        }
        Ok(pieces)
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |b| b)
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Whether a text is its tokens' bytes one after another.
    pub(super) fn is_concatenative(&self) -> bool {
        self.spelling != Spelling::Other
    }

    /// Whether the very first space of a text is the tokenizer's own.
    pub(super) fn strips_leading_space(&self) -> bool {
        matches!(self.spelling, Spelling::SentencePiece { strip_leading_space: true, .. })
    }
}

fn spelling(backend: &Backend) -> Spelling {
    let Some(decoder) = backend.get_decoder().and_then(|d| serde_json::to_value(d).ok()) else {
        return Spelling::Other;
    };
    let steps = match decoder.get("decoders").and_then(Value::as_array) {
        Some(steps) => steps.clone(),
        None => vec![decoder],
    };
    let mut byte_level = false;
    let (mut spaces, mut byte_fallback, mut strip_leading_space) = (false, false, false);
    for step in &steps {
        match step.get("type").and_then(Value::as_str).unwrap_or_default() {
            "ByteLevel" => byte_level = true,
            "ByteFallback" => byte_fallback = true,
            "Fuse" => {}
            "Replace" if replaces_underline(step) => spaces = true,
            "Strip" if step["content"] == " " && step["stop"] == 0 => {
                strip_leading_space = step["start"] != 0
            }
            "Metaspace" => {
                spaces = step["replacement"] == "▁";
                strip_leading_space = step["prepend_scheme"] != "never";
            }
            _ => return Spelling::Other,
        }
    }
    match (byte_level, spaces || byte_fallback) {
        (true, false) => Spelling::ByteLevel,
        (false, true) => Spelling::SentencePiece { byte_fallback, strip_leading_space },
        _ => Spelling::Other,
    }
}

fn replaces_underline(step: &Value) -> bool {
    step["pattern"]["String"] == "▁" && step["content"] == " "
}

fn piece_bytes(token: &str, spelling: Spelling, table: &HashMap<char, u8>) -> Vec<u8> {
    match spelling {
        Spelling::ByteLevel => token
            .chars()
            .map(|c| table.get(&c).copied())
            .collect::<Option<Vec<u8>>>()
            .unwrap_or_else(|| token.as_bytes().to_vec()),
        Spelling::SentencePiece { byte_fallback: true, .. } if byte_piece(token).is_some() => {
            byte_piece(token).into_iter().collect()
        }
        Spelling::SentencePiece { .. } => token.replace('▁', " ").into_bytes(),
        Spelling::Other => token.as_bytes().to_vec(),
    }
}

/// `<0x0A>` → 10.
fn byte_piece(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// GPT-2's printable stand-in of every byte, inverted: printable Latin-1 stands for itself, the other 68 bytes
/// are U+0100 onwards in order.
fn byte_level_table() -> HashMap<char, u8> {
    let mut table = HashMap::with_capacity(256);
    let mut next = 0x100u32;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if printable {
            u32::from(byte)
        } else {
            next += 1;
            next - 1
        };
        if let Some(c) = char::from_u32(code) {
            table.insert(c, byte);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_table_covers_every_byte_once() {
        let table = byte_level_table();
        let bytes: std::collections::BTreeSet<u8> = table.values().copied().collect();
        assert_eq!((table.len(), bytes.len()), (256, 256));
        assert_eq!(table[&'Ġ'], b' ');
        assert_eq!(table[&'Ċ'], b'\n');
    }

    #[test]
    fn only_well_formed_byte_pieces_are_bytes() {
        assert_eq!(byte_piece("<0x0A>"), Some(10));
        assert_eq!(byte_piece("<0xA>"), None);
        assert_eq!(byte_piece("<0x+1>"), None);
        assert_eq!(byte_piece("<unk>"), None);
    }
}
