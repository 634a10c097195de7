//! Text to token ids and back, from `tokenizer.json` or from the vocabulary inside a GGUF file.

mod gguf;
mod pieces;
mod pretokenizer;
mod special;
mod stream;

pub use gguf::GgufVocab;
pub use stream::StreamDecoder;

use crate::error::{Error, excerpt};
use pieces::Pieces;
use special::SpecialIds;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A tokenizer. Cloning is cheap: clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    backend: tokenizers::Tokenizer,
    pieces: Pieces,
    special: SpecialIds,
    warnings: Vec<String>,
}

/// A text as tokens, each with the bytes of the text it stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range in the text of each token; empty for tokens that the tokenizer adds.
    pub spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`. Fixed truncation and padding stored in the file are switched off. The BOS, EOS,
    /// UNK and PAD tokens come from `tokenizer_config.json`, `special_tokens_map.json` or `config.json` beside it.
    ///
    /// # Errors
    /// When the file cannot be read, is truncated, or names no usable model.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let fail = |reason: String| Error::TokenizerFile { path: path.to_path_buf(), reason };
        let mut backend = parse(&bytes).map_err(fail)?;
        backend.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        backend.with_padding(None);
        let special = match path.parent() {
            Some(folder) => special::from_folder(folder, &backend)?,
            None => SpecialIds::default(),
        };
        Self::new(backend, special, Vec::new()).map_err(fail)
    }

    /// Builds the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`) or SentencePiece BPE with byte
    /// fallback (`llama`). An unknown pre-tokenizer name falls back to GPT-2's and leaves a [`warning`](Self::warnings).
    ///
    /// # Errors
    /// When the vocabulary is of another kind, empty, or its parts contradict each other.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, Error> {
        let (backend, special, warnings) = gguf::build(vocab)?;
        Self::new(backend, special, warnings).map_err(Error::GgufVocabulary)
    }

    fn new(
        backend: tokenizers::Tokenizer,
        special: SpecialIds,
        warnings: Vec<String>,
    ) -> Result<Self, String> {
        let pieces = Pieces::new(&backend)?;
        Ok(Self { inner: Arc::new(Inner { backend, pieces, special, warnings }) })
    }

    /// Writes `tokenizer.json` at `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let text = self
            .inner
            .backend
            .to_string(true)
            .map_err(|e| Error::TokenizerFile { path: path.to_path_buf(), reason: e.to_string() })?;
        std::fs::write(path, text).map_err(Error::io(path))
    }

    /// The `tokenizer_config.json` that belongs beside [`save`](Self::save)'s file: special tokens and, if given,
    /// the chat template.
    pub fn config(&self, chat_template: Option<&str>) -> serde_json::Value {
        special::config(&self.inner.special, chat_template, |id| self.token(id))
    }

    /// Token ids of `text`. With `add_special`, BOS and EOS are added where the tokenizer asks for them.
    ///
    /// # Errors
    /// When the model has no token for a part of the text and no unknown token either.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self
            .inner
            .backend
            .encode_fast(text, add_special)
            .map_err(|e| Error::Encode { excerpt: excerpt(text), reason: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Like [`encode`](Self::encode), with the byte range of `text` behind each token.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_spans(&self, text: &str, add_special: bool) -> Result<Tokens, Error> {
        let encoding = self
            .inner
            .backend
            .encode(text, add_special)
            .map_err(|e| Error::Encode { excerpt: excerpt(text), reason: e.to_string() })?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok(Tokens { ids: encoding.get_ids().to_vec(), spans })
    }

    /// The text of `ids`; with `skip_special`, without special tokens. Ids outside the vocabulary are left out,
    /// bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer's own decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        if self.inner.pieces.is_concatenative() {
            let mut stream = self.stream(skip_special);
            let mut text = String::new();
            for &id in ids {
                text.push_str(&stream.push(id)?);
            }
            text.push_str(&stream.flush()?);
            return Ok(text);
        }
        self.decode_by_backend(ids, skip_special)
    }

    fn decode_by_backend(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        self.inner
            .backend
            .decode(ids, skip_special)
            .map_err(|e| Error::Decode { count: ids.len(), reason: e.to_string() })
    }

    /// A decoder that takes ids one at a time.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }

    /// The bytes one token stands for in running text; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.inner.pieces.bytes(id)
    }

    /// The text of one token. Where its bytes are not UTF-8 by themselves they are spelled as OpenAI's
    /// completions API does, `bytes:\xe2\x96`, so that nothing is lost.
    pub fn token_text(&self, id: u32) -> String {
        let bytes = self.token_bytes(id);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold(String::from("bytes:"), |out, b| format!("{out}\\x{b:02x}")),
        }
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.inner.pieces.len()
    }

    /// The id of a token written as in the vocabulary (`Ġthe`, `<|im_end|>`).
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.backend.token_to_id(token)
    }

    /// The token as written in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.backend.id_to_token(id)
    }

    /// Whether the token is special: a control token that is no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.pieces.is_special(id)
    }

    /// Beginning of sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.special.bos
    }

    /// End of sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.special.eos
    }

    /// Padding.
    pub fn pad_id(&self) -> Option<u32> {
        self.inner.special.pad
    }

    /// Unknown token.
    pub fn unk_id(&self) -> Option<u32> {
        self.inner.special.unk
    }

    /// Text of the beginning-of-sequence token, as chat templates want it.
    pub fn bos_token(&self) -> Option<String> {
        self.bos_id().and_then(|id| self.token(id))
    }

    /// Text of the end-of-sequence token, as chat templates want it.
    pub fn eos_token(&self) -> Option<String> {
        self.eos_id().and_then(|id| self.token(id))
    }

    /// What was guessed while the tokenizer was built, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.inner.warnings
    }

    pub(crate) fn strips_leading_space(&self) -> bool {
        self.inner.pieces.strips_leading_space()
    }

    pub(crate) fn is_concatenative(&self) -> bool {
        self.inner.pieces.is_concatenative()
    }
}

/// The `tokenizers` library panics on some damaged files: a cut one inside its decoder, a `Precompiled` normalizer
/// that is not what it claims. The first is told apart by parsing twice, the rest is caught.
fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|e| e.to_string())?;
    match std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes)) {
        Ok(parsed) => parsed.map_err(|e| e.to_string()),
        Err(panic) => Err(match panic.downcast_ref::<String>() {
            Some(reason) => format!("a part of it is damaged: {reason}"),
            None => "a part of it is damaged".into(),
        }),
    }
}

/// Fails on the first id that has no entry in a vocabulary of `vocab_size`; `origin` names the source.
///
/// # Errors
/// [`Error::TokenOutOfRange`].
pub fn check_range(origin: &str, ids: &[u32], vocab_size: usize) -> Result<(), Error> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(position) => {
            Err(Error::TokenOutOfRange { origin: origin.to_owned(), id: ids[position], position, vocab_size })
        }
    }
}
