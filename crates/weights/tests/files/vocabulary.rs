//! `tokenizer.json` as the vocabulary of a GGUF file.

use crate::common::tiny_config;
use hearth_weights::{Error, GgufVocabulary, ModelConfig};
use serde_json::{Value, json};

fn convert(tokenizer: &Value, vocab_size: usize) -> Result<GgufVocabulary, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    GgufVocabulary::from_json(&path, &ModelConfig { vocab_size, ..tiny_config("llama") })
}

fn byte_level(pre_tokenizer: Value) -> Value {
    json!({
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 5, "content": "<tool>", "special": false},
        ],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "ab": 4}, "merges": [["a", "b"]]},
    })
}

#[test]
fn byte_level_vocabularies_get_the_name_of_their_pre_tokenizer() {
    let bytes = json!({"type": "ByteLevel", "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let cases = [
        (bytes.clone(), "gpt-2"),
        (sequence(vec![digits, bytes.clone()]), "smollm"),
        (sequence(vec![split(llama3), bytes.clone()]), "llama-bpe"),
        (sequence(vec![split(&llama3.replace("{1,3}", "")), bytes.clone()]), "qwen2"),
    ];
    for (pre_tokenizer, name) in cases {
        let vocabulary = convert(&byte_level(pre_tokenizer), 7).unwrap();
        assert_eq!(vocabulary.pre.as_deref(), Some(name));
        assert_eq!(vocabulary.model, "gpt2");
        assert_eq!(vocabulary.tokens, ["<unk>", "<s>", "a", "b", "ab", "<tool>", "[PAD6]"]);
        assert_eq!(vocabulary.token_types, [3, 1, 1, 1, 1, 4, 5]);
        assert_eq!(vocabulary.merges, ["a b"]);
        assert_eq!((vocabulary.bos, vocabulary.add_bos), (Some(1), Some(false)));
    }
    let unknown = sequence(vec![split(r"\w+"), bytes]);
    let message = convert(&byte_level(unknown), 7).unwrap_err().to_string();
    assert!(message.contains("(Split, ByteLevel) is none llama.cpp has a name for"), "{message}");
}

#[test]
fn sentencepiece_vocabularies_get_scores_in_merge_order() {
    let tokenizer = json!({
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 1, "content": "<s>", "special": true},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]},
        "model": {
            "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "▁": 4, "▁a": 5, "aa": 6},
            "merges": ["▁ a", "a a"],
        },
    });
    let vocabulary = convert(&tokenizer, 7).unwrap();
    assert_eq!((vocabulary.model.as_str(), &vocabulary.pre), ("llama", &None));
    assert_eq!(vocabulary.token_types, [2, 3, 6, 1, 1, 1, 1]);
    assert_eq!(vocabulary.scores, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]);
    assert_eq!((vocabulary.unk, vocabulary.add_bos), (Some(0), Some(true)));
    assert_eq!(vocabulary.add_space_prefix, Some(true));
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let bytes = json!({"type": "ByteLevel"});
    let with_model = |model: Value| json!({"pre_tokenizer": bytes, "model": model});
    let cases = [
        (json!({}), 7, "no model"),
        (with_model(json!({"type": "Unigram", "vocab": []})), 7, "its model is Unigram"),
        (with_model(json!({"type": "BPE"})), 7, "no vocab"),
        (
            with_model(json!({"type": "BPE", "vocab": {"a": 9}})),
            7,
            "\"a\" has no id below vocab_size, which is 7",
        ),
        (with_model(json!({"type": "BPE", "vocab": {"a": -1}})), 7, "no id below"),
        (with_model(json!({"type": "BPE", "vocab": {"a": 1}, "merges": ["a"]})), 7, "not a pair"),
        (byte_level(bytes.clone()), 3, "vocab_size, which is 3"),
    ];
    for (tokenizer, vocab_size, wanted) in cases {
        let message = convert(&tokenizer, vocab_size).unwrap_err().to_string();
        assert!(message.contains(wanted), "{message}");
    }
}
