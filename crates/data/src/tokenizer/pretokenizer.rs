//! The pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`: regular expressions that cut a text into words
//! before byte-level BPE. Names and expressions follow llama.cpp's `llama-vocab.cpp`.

/// A pre-tokenizer: expressions applied one after another, each cutting what the previous ones left.
#[derive(Debug, PartialEq)]
pub(super) struct PreTokenizer {
    pub(super) patterns: &'static [&'static str],
    /// A word that is in the vocabulary as a whole is one token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether encoding starts with BOS when the file does not say.
    pub(super) add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's choice where a file names none.
const DEFAULT: &[&str] = &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

/// Names, expressions, `ignore_merges`, `add_bos`.
type Entry = (&'static [&'static str], &'static [&'static str], bool, bool);

const TABLE: &[Entry] = &[
    (&["default"], DEFAULT, false, false),
    (
        &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        &[LLAMA3],
        true,
        true,
    ),
    (&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3], false, false),
    (&["glm4", "glm5"], &[LLAMA3], true, false),
    (
        &["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo"],
        &[QWEN2],
        false,
        false,
    ),
    (&["qwen35"], &[QWEN35], false, false),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[r"\p{N}", GPT2],
        false,
        false,
    ),
    (
        &["gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "exaone4", "gigachat"],
        &[GPT2],
        false,
        false,
    ),
    (
        &["jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"],
        &[GPT2],
        false,
        false,
    ),
    (&["a.x-4.0", "mellum", "modern-bert", "granite-docling"], &[GPT2], false, false),
    (&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"], false, false),
    (
        &["deepseek-coder"],
        &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\u{D7FF}]+", r"\p{N}"],
        false,
        false,
    ),
    (
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
        false,
        false,
    ),
    (&["tekken"], &[TEKKEN], true, true),
    (&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[GPT4O], false, false),
    (&["bloom", "poro-chat", "gpt3-finnish"], &[BLOOM], false, false),
    (&["viking"], &[BLOOM, r"\p{N}"], false, false),
    (&["seed-coder"], &[SEED], false, false),
];

/// The pre-tokenizer of this name.
pub(super) fn find(name: &str) -> Option<PreTokenizer> {
    TABLE
        .iter()
        .find(|(names, ..)| names.contains(&name))
        .map(|&(_, patterns, ignore_merges, add_bos)| PreTokenizer { patterns, ignore_merges, add_bos })
}

/// GPT-2's, the common ancestor: what an unknown name falls back to.
pub(super) fn fallback() -> PreTokenizer {
    PreTokenizer { patterns: &[GPT2], ignore_merges: false, add_bos: false }
}

/// Every known name.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().flat_map(|(names, ..)| names.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;

    #[test]
    fn every_expression_compiles() {
        for (names, patterns, ..) in TABLE {
            for pattern in *patterns {
                let pattern = SplitPattern::Regex((*pattern).into());
                assert!(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).is_ok(), "{names:?}");
            }
        }
    }

    #[test]
    fn no_name_stands_twice() {
        let all: Vec<_> = names().collect();
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(all.len(), distinct.len());
    }
}
