//! The vocabulary a GGUF file needs, out of a `tokenizer.json`.
//!
//! GGUF names its pre-tokenizers and knows two kinds of byte-pair vocabularies. Which name and which flags describe
//! a given tokenizer is found out by trying: the candidate that cuts a set of difficult texts into the same ids is
//! the one. A tokenizer that no candidate describes is refused rather than written almost right.

use crate::open::Model;
use anyhow::{Context, bail};
use hearth_data::{GgufVocab, Tokenizer};
use hearth_weights::GgufVocabulary;
use hearth_weights::source::TokenizerFiles;
use serde_json::Value;
use std::collections::HashMap;

/// Names of pre-tokenizers that cover the models in use.
const PRE_TOKENIZERS: [&str; 9] =
    ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3", "qwen35", "default"];

/// Texts on which pre-tokenizers differ.
const PROBES: [&str; 8] = [
    "Hello world! It's 2024, isn't it? I'LL see you're WE'VE",
    "  two  spaces\tand\ttabs \n\n\nlines\r\n  end  ",
    "1 22 333 4444 55555 3.14159 1,000,000",
    "naïve café Straße 東京は日本の首都です Привет мир مرحبا हिन्दी",
    "🦀🔥 emoji 👩‍👩‍👧 e\u{301}",
    "fn main() { println!(\"{}\", x_1 + y2); } // camelCase HTTPServer /path/to",
    " leading space",
    "a",
];

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The model's vocabulary for a GGUF file; `None` for a model without tokenizer.
///
/// # Errors
/// A tokenizer that GGUF cannot describe.
pub fn of(model: &Model) -> anyhow::Result<Option<GgufVocabulary>> {
    let path = match &model.files.tokenizer {
        TokenizerFiles::None => return Ok(None),
        TokenizerFiles::Gguf(vocabulary) => return Ok(Some((**vocabulary).clone())),
        TokenizerFiles::Json { path } => path,
    };
    let tokenizer = model.need_tokenizer("it was there a moment ago")?;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let json: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let draft = draft(&json, tokenizer, model.files.config.vocab_size)
        .with_context(|| format!("{} cannot be written as a GGUF vocabulary", path.display()))?;
    match candidates(draft).find(|candidate| describes(candidate, tokenizer)) {
        Some(vocabulary) => Ok(Some(vocabulary)),
        None => bail!(
            "{} cuts texts in a way that GGUF has no name for; use --to safetensors or --to bundle",
            path.display()
        ),
    }
}

/// Everything but what must be tried.
fn draft(json: &Value, tokenizer: &Tokenizer, vocab_size: usize) -> anyhow::Result<GgufVocabulary> {
    let model = &json["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") {
        bail!("its kind is {}, GGUF files are written with BPE vocabularies", model["type"]);
    }
    let merges = merges(model)?;
    let mut tokens = vec![String::new(); vocab_size.max(tokenizer.vocab_size())];
    let mut token_types = vec![UNUSED; tokens.len()];
    let vocab = model["vocab"].as_object().context("it has no vocabulary")?;
    for (token, id) in vocab {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < tokens.len());
        let id = id.with_context(|| format!("the id of {token:?} is out of range"))?;
        tokens[id] = token.clone();
        token_types[id] = if is_byte(token) { BYTE } else { NORMAL };
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(id), Some(token)) = (added["id"].as_u64(), added["content"].as_str()) else { continue };
        let Some(slot) = tokens.get_mut(id as usize) else { continue };
        *slot = token.to_owned();
        token_types[id as usize] = if added["special"] == true { CONTROL } else { USER_DEFINED };
    }
    for (id, token) in tokens.iter_mut().enumerate().filter(|(_, token)| token.is_empty()) {
        *token = format!("[PAD{id}]");
    }
    let sentencepiece = model["byte_fallback"] == true;
    if let Some(id) = tokenizer.unk_id().filter(|_| sentencepiece) {
        token_types[id as usize] = UNKNOWN;
    }
    let probe = tokenizer.encode("a", true)?;
    Ok(GgufVocabulary {
        model: if sentencepiece { "llama" } else { "gpt2" }.into(),
        scores: if sentencepiece { scores(&tokens, &merges) } else { Vec::new() },
        merges: if sentencepiece {
            Vec::new()
        } else {
            merges.iter().map(|(a, b)| format!("{a} {b}")).collect()
        },
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_id(),
        unk: tokenizer.unk_id(),
        pad: tokenizer.pad_id(),
        add_bos: Some(tokenizer.bos_id().is_some() && probe.first().copied() == tokenizer.bos_id()),
        add_eos: Some(tokenizer.eos_id().is_some() && probe.last().copied() == tokenizer.eos_id()),
        tokens,
        token_types,
        ..GgufVocabulary::default()
    })
}

/// Merges, written as `"a b"` in older files and as `["a", "b"]` in newer ones.
fn merges(model: &Value) -> anyhow::Result<Vec<(String, String)>> {
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
        Value::Array(pair) => match &pair[..] {
            [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
            _ => None,
        },
        _ => None,
    };
    let list = model["merges"].as_array().context("it has no merges")?;
    list.iter().map(|merge| pair(merge).with_context(|| format!("merge {merge} is not a pair"))).collect()
}

/// SentencePiece merges the pair with the best score first: a piece's score is the rank of its first merge.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    tokens.iter().map(|token| ranks.get(token).map_or(0.0, |rank| -(*rank as f32 + 1.0))).collect()
}

/// `<0x0A>`.
fn is_byte(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
}

fn candidates(draft: GgufVocabulary) -> Box<dyn Iterator<Item = GgufVocabulary>> {
    if draft.model == "llama" {
        let with = move |prefix| GgufVocabulary { add_space_prefix: Some(prefix), ..draft.clone() };
        return Box::new([true, false].into_iter().map(with));
    }
    Box::new(
        PRE_TOKENIZERS.into_iter().map(move |pre| GgufVocabulary { pre: Some(pre.into()), ..draft.clone() }),
    )
}

/// Whether the vocabulary gives the tokenizer's ids on every probe.
fn describes(vocabulary: &GgufVocabulary, tokenizer: &Tokenizer) -> bool {
    let converted: GgufVocab = crate::open::gguf_vocab(vocabulary);
    let Ok(candidate) = Tokenizer::from_gguf(&converted) else { return false };
    PROBES.iter().all(|text| match (candidate.encode(text, true), tokenizer.encode(text, true)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    })
}
