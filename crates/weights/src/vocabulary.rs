//! `tokenizer.json` → the vocabulary a GGUF file carries.
//!
//! llama.cpp knows a byte-level BPE by the *name* of its pre-tokenizer; a tokenizer whose pre-tokenizer has no
//! such name is refused rather than written with another's.

use crate::Error;
use crate::config::ModelConfig;
use crate::mapped::read_json;
use crate::source::{GgufVocabulary, ModelFiles, TokenizerFiles};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// Largest `tokenizer.json` read.
const LIMIT: u64 = 1 << 30;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What each split expression is called in llama.cpp.
static SPLITS: &[(&str, &str)] = &[
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken",
    ),
];

impl GgufVocabulary {
    /// The vocabulary to write into a GGUF file for this model; `None` when it has no tokenizer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tokenizer llama.cpp has no equivalent of; [`Error::Damaged`].
    pub fn for_gguf(model: &ModelFiles) -> Result<Option<GgufVocabulary>, Error> {
        match &model.tokenizer {
            TokenizerFiles::Gguf(vocabulary) => Ok(Some((**vocabulary).clone())),
            TokenizerFiles::Json { path } => GgufVocabulary::from_json(path, &model.config).map(Some),
            TokenizerFiles::None => Ok(None),
        }
    }

    /// Reads a `tokenizer.json`: byte-level BPE, or SentencePiece BPE with byte fallback.
    ///
    /// # Errors
    /// As [`GgufVocabulary::for_gguf`].
    pub fn from_json(path: &Path, config: &ModelConfig) -> Result<GgufVocabulary, Error> {
        let json = read_json(path, LIMIT)?;
        let reader = Reader { path, json: &json, config };
        reader.read()
    }
}

struct Reader<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
    config: &'a ModelConfig,
}

impl Reader<'_> {
    fn read(&self) -> Result<GgufVocabulary, Error> {
        let model = self.json.get("model").ok_or_else(|| self.damaged("it has no model"))?;
        match model.get("type").and_then(Value::as_str) {
            Some("BPE") | None => {}
            Some(other) => {
                return Err(self.unsupported(&format!("its model is {other}, GGUF files take BPE")));
            }
        }
        let vocab = model
            .get("vocab")
            .and_then(Value::as_object)
            .ok_or_else(|| self.damaged("its model has no vocab object"))?;
        let byte_fallback = model.get("byte_fallback").and_then(Value::as_bool).unwrap_or(false);
        let (tokens, token_types) = self.tokens(vocab, byte_fallback)?;
        let merges = self.merges(model)?;
        let unk = model.get("unk_token").and_then(Value::as_str).and_then(|t| vocab.get(t)?.as_u64());
        let mut vocabulary = GgufVocabulary {
            bos: self.config.bos_token_id,
            eos: self.config.eos_token_ids.first().copied(),
            unk: unk.map(|id| id as u32),
            pad: self.config.pad_token_id,
            add_bos: Some(self.adds_bos(&tokens)),
            add_eos: Some(false),
            tokens,
            token_types,
            ..GgufVocabulary::default()
        };
        if byte_fallback {
            vocabulary.model = "llama".into();
            vocabulary.scores = scores(&vocabulary.tokens, &merges);
            vocabulary.add_space_prefix = Some(self.adds_space());
        } else {
            vocabulary.model = "gpt2".into();
            vocabulary.pre = Some(self.pre_tokenizer()?.to_owned());
            vocabulary.merges = merges.into_iter().map(|(l, r)| format!("{l} {r}")).collect();
        }
        Ok(vocabulary)
    }

    fn damaged(&self, what: &str) -> Error {
        Error::damaged(self.path, what)
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::unsupported(self.path, format!("{what}; convert to a bundle or safetensors instead"))
    }

    /// Strings and types by id, filled up to the rows of the embedding, as llama.cpp requires.
    fn tokens(
        &self,
        vocab: &Map<String, Value>,
        byte_fallback: bool,
    ) -> Result<(Vec<String>, Vec<i32>), Error> {
        let rows = self.config.vocab_size;
        let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; rows];
        let mut put = |token: &str, id: Option<u64>, kind: i32| {
            let id = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < rows).ok_or_else(|| {
                self.damaged(&format!("token {token:?} has no id below vocab_size, which is {rows}"))
            })?;
            tokens[id] = token.to_owned();
            types[id] = kind;
            Ok::<(), Error>(())
        };
        for (token, id) in vocab {
            put(token, id.as_u64(), if byte_fallback && is_byte(token) { BYTE } else { NORMAL })?;
        }
        let unk = self.json["model"].get("unk_token").and_then(Value::as_str);
        for added in self.json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let Some(token) = added.get("content").and_then(Value::as_str) else {
                return Err(self.damaged("an added token has no content"));
            };
            let special = added.get("special").and_then(Value::as_bool).unwrap_or(false);
            let kind = match special {
                _ if byte_fallback && unk == Some(token) => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            put(token, added.get("id").and_then(Value::as_u64), kind)?;
        }
        Ok((tokens, types))
    }

    /// Pairs in order of rank, from `"left right"` or `["left", "right"]`.
    fn merges(&self, model: &Value) -> Result<Vec<(String, String)>, Error> {
        let list = model.get("merges").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        list.iter()
            .map(|merge| match merge {
                Value::String(pair) => pair.split_once(' ').map(|(l, r)| (l.to_owned(), r.to_owned())),
                Value::Array(pair) => match pair.as_slice() {
                    [Value::String(l), Value::String(r)] => Some((l.clone(), r.clone())),
                    _ => None,
                },
                _ => None,
            })
            .collect::<Option<_>>()
            .ok_or_else(|| self.damaged("a merge is not a pair of tokens"))
    }

    /// Steps of the pre-tokenizer, flattened.
    fn steps<'a>(&'a self, part: &str, inner: &str) -> Vec<&'a Value> {
        match self.json.get(part) {
            None | Some(Value::Null) => vec![],
            Some(step) => match step.get(inner).and_then(Value::as_array) {
                Some(steps) => steps.iter().collect(),
                None => vec![step],
            },
        }
    }

    fn pre_tokenizer(&self) -> Result<&'static str, Error> {
        let steps = self.steps("pre_tokenizer", "pretokenizers");
        let kinds: Vec<&str> = steps.iter().filter_map(|s| s.get("type")?.as_str()).collect();
        let regex = steps.iter().find_map(|s| s.get("pattern")?.get("Regex")?.as_str());
        let named = regex.and_then(|regex| SPLITS.iter().find(|(pattern, _)| *pattern == regex));
        match (kinds.as_slice(), named) {
            (["ByteLevel"], _) => Ok("gpt-2"),
            (["Digits", "ByteLevel"], _) => Ok("smollm"),
            (["Split", "ByteLevel"], Some((_, name))) => Ok(name),
            _ => Err(self.unsupported(&format!(
                "its pre-tokenizer ({}) is none llama.cpp has a name for that hearth knows",
                kinds.join(", ")
            ))),
        }
    }

    /// Whether encoding puts BOS first.
    fn adds_bos(&self, tokens: &[String]) -> bool {
        let Some(bos) = self.config.bos_token_id.and_then(|id| tokens.get(id as usize)) else { return false };
        self.steps("post_processor", "processors").iter().any(|step| {
            let first = step.get("single").and_then(|single| single.get(0)?.get("SpecialToken")?.get("id"));
            first.and_then(Value::as_str) == Some(bos)
        })
    }

    /// Whether SentencePiece text starts with a space.
    fn adds_space(&self) -> bool {
        let kind = |step: &Value, name: &str| step.get("type").is_some_and(|t| t == name);
        let prepends = self.steps("normalizer", "normalizers").iter().any(|s| kind(s, "Prepend"));
        let metaspace = self.steps("pre_tokenizer", "pretokenizers").into_iter().any(|s| {
            kind(s, "Metaspace") && s.get("prepend_scheme").and_then(Value::as_str) != Some("never")
        });
        prepends || metaspace
    }
}

/// `<0x00>` … `<0xFF>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}

/// SentencePiece merges the pair of the highest score: minus the rank of a token's first merge orders them the same.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    tokens.iter().map(|token| ranks.get(token).map_or(0.0, |rank| -(*rank as f32))).collect()
}
