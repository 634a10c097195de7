//! A tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file.

use super::pretokenizer::{self, PreTokenizer};
use super::special::SpecialIds;
use crate::error::Error;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer as Backend,
};

/// `tokenizer.ggml.*` metadata, unchanged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer.
    pub pre: Option<String>,
    /// Token strings by id.
    pub tokens: Vec<String>,
    /// Scores by id (SentencePiece).
    pub scores: Vec<f32>,
    /// Token types by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// BPE merges, `"left right"`.
    pub merges: Vec<String>,
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// Unknown.
    pub unk: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether encoding starts with BOS.
    pub add_bos: Option<bool>,
    /// Whether encoding ends with EOS.
    pub add_eos: Option<bool>,
    /// Whether SentencePiece puts a space first.
    pub add_space_prefix: Option<bool>,
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The backend, the ids with a role, and what was guessed.
pub(super) type Built = (Backend, SpecialIds, Vec<String>);

/// Builds the tokenizer.
pub(super) fn build(vocab: &GgufVocab) -> Result<Built, Error> {
    check(vocab)?;
    let mut warnings = Vec::new();
    let ids = unique_tokens(vocab, &mut warnings);
    let (mut backend, default_add_bos) = match vocab.model.as_str() {
        "gpt2" => byte_level(vocab, &ids, &mut warnings)?,
        "llama" => (sentencepiece(vocab, &ids)?, true),
        other => {
            return Err(Error::GgufVocabulary(format!(
                "tokenizer.ggml.model is {other:?}; \"gpt2\" and \"llama\" can be read"
            )));
        }
    };
    add_special_tokens(&mut backend, vocab, &ids);
    let special = SpecialIds { bos: vocab.bos, eos: vocab.eos, unk: vocab.unk, pad: vocab.pad };
    let bos = special.bos.filter(|_| vocab.add_bos.unwrap_or(default_add_bos));
    let eos = special.eos.filter(|_| vocab.add_eos.unwrap_or(false));
    if let Some(processor) = surround(&ids, bos, eos)? {
        backend.with_post_processor(Some(processor));
    }
    Ok((backend, special, warnings))
}

fn check(vocab: &GgufVocab) -> Result<(), Error> {
    let count = vocab.tokens.len();
    let fail = |reason: String| Err(Error::GgufVocabulary(reason));
    if count == 0 {
        return fail("tokenizer.ggml.tokens is empty".into());
    }
    for (name, len) in [("scores", vocab.scores.len()), ("token_type", vocab.token_types.len())] {
        if len != 0 && len != count {
            return fail(format!(
                "tokenizer.ggml.{name} has {len} entries, tokenizer.ggml.tokens has {count}"
            ));
        }
    }
    for (role, id) in [("bos", vocab.bos), ("eos", vocab.eos), ("unknown", vocab.unk), ("padding", vocab.pad)]
    {
        if let Some(id) = id.filter(|&id| id as usize >= count) {
            return fail(format!("the {role} token is {id}, but there are only {count} tokens"));
        }
    }
    Ok(())
}

/// The vocabulary with every string once: a repeated or empty one keeps its id under a name nothing encodes to.
fn unique_tokens(vocab: &GgufVocab, warnings: &mut Vec<String>) -> Vec<String> {
    let mut seen: HashMap<&str, usize> = HashMap::with_capacity(vocab.tokens.len());
    let mut out = Vec::with_capacity(vocab.tokens.len());
    for (id, token) in vocab.tokens.iter().enumerate() {
        match seen.entry(token) {
            Entry::Vacant(slot) if !token.is_empty() => {
                slot.insert(id);
                out.push(token.clone());
            }
            Entry::Vacant(_) => out.push(format!("[EMPTY_{id}]")),
            Entry::Occupied(first) => {
                warnings.push(format!(
                    "token {token:?} has the ids {} and {id}; {id} is never produced",
                    first.get()
                ));
                out.push(format!("[DUPLICATE_{id}]"));
            }
        }
    }
    out
}

fn token_type(vocab: &GgufVocab, id: usize) -> i32 {
    vocab.token_types.get(id).copied().unwrap_or(NORMAL)
}

fn id_map(tokens: &[String]) -> Vocab {
    tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect()
}

// ---- byte-level BPE ----

fn byte_level(
    vocab: &GgufVocab,
    tokens: &[String],
    warnings: &mut Vec<String>,
) -> Result<(Backend, bool), Error> {
    let pre = pre_tokenizer(vocab.pre.as_deref(), warnings);
    let model = BPE::builder()
        .vocab_and_merges(id_map(tokens), parse_merges(&vocab.merges)?)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|e| Error::GgufVocabulary(format!("tokenizer.ggml.merges: {e}")))?;
    let mut backend = Backend::new(model);
    let mut steps: Vec<Value> = pre
        .patterns
        .iter()
        .map(|p| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false}))
        .collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    steps.push(bytes.clone());
    backend.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(
        json!({"type": "Sequence", "pretokenizers": steps}),
    )?));
    backend.with_decoder(Some(part::<DecoderWrapper>(bytes)?));
    Ok((backend, pre.add_bos))
}

fn pre_tokenizer(name: Option<&str>, warnings: &mut Vec<String>) -> PreTokenizer {
    let name = name.unwrap_or("default");
    pretokenizer::find(name).unwrap_or_else(|| {
        let known: Vec<&str> = pretokenizer::names().collect();
        warnings.push(format!(
            "unknown pre-tokenizer {name:?} (tokenizer.ggml.pre): GPT-2's is used, some texts may be cut differently; \
             known names: {}",
            known.join(", ")
        ));
        pretokenizer::fallback()
    })
}

fn parse_merges(lines: &[String]) -> Result<Merges, Error> {
    lines
        .iter()
        .enumerate()
        .map(|(i, line)| match line.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok((left.into(), right.into())),
            _ => Err(Error::GgufVocabulary(format!(
                "merge {i} is {line:?}; two tokens with a space between are expected"
            ))),
        })
        .collect()
}

// ---- SentencePiece BPE ----

fn sentencepiece(vocab: &GgufVocab, tokens: &[String]) -> Result<Backend, Error> {
    if vocab.scores.len() != tokens.len() {
        return Err(Error::GgufVocabulary(format!(
            "tokenizer.ggml.scores has {} entries, a SentencePiece vocabulary of {} tokens needs as many",
            vocab.scores.len(),
            tokens.len()
        )));
    }
    let unknown =
        vocab.unk.or_else(|| (0..tokens.len() as u32).find(|&id| token_type(vocab, id as usize) == UNKNOWN));
    let mut builder = BPE::builder()
        .vocab_and_merges(id_map(tokens), merges_from_scores(vocab, tokens))
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(id) = unknown {
        builder = builder.unk_token(tokens[id as usize].clone());
    }
    let model = builder.build().map_err(|e| Error::GgufVocabulary(e.to_string()))?;
    let mut backend = Backend::new(model);
    let prefix = vocab.add_space_prefix.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    backend.with_normalizer(Some(part::<NormalizerWrapper>(
        json!({"type": "Sequence", "normalizers": normalizers}),
    )?));
    backend.with_decoder(Some(part::<DecoderWrapper>(json!({"type": "Sequence", "decoders": decoders}))?));
    Ok(backend)
}

/// SentencePiece merges whichever pair makes the piece of the highest score: as ranked merges, all ways to cut a
/// piece in two pieces, by falling score.
fn merges_from_scores(vocab: &GgufVocab, tokens: &[String]) -> Merges {
    let mergeable = |id: usize| matches!(token_type(vocab, id), NORMAL | USER_DEFINED);
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|(id, _)| mergeable(*id)).map(|(id, t)| (t.as_str(), id)).collect();
    let mut ranked: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| mergeable(*id)) {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                ranked.push((vocab.scores[id], l, r, left, right));
            }
        }
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    ranked.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}

// ---- both ----

/// Control tokens are special; user-defined ones are cut out of the text before anything else but stay text.
fn add_special_tokens(backend: &mut Backend, vocab: &GgufVocab, tokens: &[String]) {
    let of_type = |wanted: &'static [i32]| {
        (0..tokens.len())
            .filter(move |&id| wanted.contains(&token_type(vocab, id)))
            .map(|id| tokens[id].clone())
    };
    let control: Vec<AddedToken> =
        of_type(&[CONTROL, UNKNOWN]).map(|t| AddedToken::from(t, true).normalized(false)).collect();
    let user: Vec<AddedToken> =
        of_type(&[USER_DEFINED]).map(|t| AddedToken::from(t, false).normalized(false)).collect();
    backend.add_special_tokens(&control);
    backend.add_tokens(&user);
}

/// A post-processor that puts BOS before and EOS after.
fn surround(
    tokens: &[String],
    bos: Option<u32>,
    eos: Option<u32>,
) -> Result<Option<PostProcessorWrapper>, Error> {
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let special = |id: u32, part: u32| json!({"SpecialToken": {"id": tokens[id as usize], "type_id": part}});
    let around = |name: &str, part: u32| {
        let text = json!({"Sequence": {"id": name, "type_id": part}});
        let parts = [bos.map(|id| special(id, part)), Some(text), eos.map(|id| special(id, part))];
        parts.into_iter().flatten().collect::<Vec<Value>>()
    };
    let mut named = serde_json::Map::new();
    for id in [bos, eos].into_iter().flatten() {
        let token = &tokens[id as usize];
        named.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let pair: Vec<Value> = around("A", 0).into_iter().chain(around("B", 1)).collect();
    part(json!({
        "type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": named
    }))
    .map(Some)
}

/// One part of a tokenizer from its `tokenizer.json` form: the wrappers' own constructors are not all public.
fn part<T: DeserializeOwned>(description: Value) -> Result<T, Error> {
    serde_json::from_value(description).map_err(|e| Error::GgufVocabulary(e.to_string()))
}
