//! Tokenizers against the ids of the libraries that made them.

use hearth_data::{GgufVocab, Tokenizer};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read<T: DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(name)).expect(name)).expect(name)
}

fn gguf(folder: &str) -> Tokenizer {
    Tokenizer::from_gguf(&read::<GgufVocab>(&format!("{folder}/gguf.json"))).expect(folder)
}

fn byte_level() -> Tokenizer {
    Tokenizer::from_file(fixture("byte_level/tokenizer.json")).expect("reads")
}

fn reloaded(tokenizer: &Tokenizer) -> Tokenizer {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    tokenizer.save(&path).expect("saves");
    let config = tokenizer.config(None).to_string();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("saves");
    Tokenizer::from_file(&path).expect("reads what was saved")
}

#[test]
fn ids_match_the_reference_from_file_from_gguf_and_after_saving() {
    for (folder, tokenizer) in [
        ("byte_level", byte_level()),
        ("byte_level", gguf("byte_level")),
        ("byte_level", reloaded(&gguf("byte_level"))),
        ("sentencepiece", gguf("sentencepiece")),
        ("sentencepiece", reloaded(&gguf("sentencepiece"))),
    ] {
        // What looks like a control token is one here, and plain text to sentencepiece: it has no such token.
        for case in read::<Vec<Text>>(&format!("{folder}/texts.json")) {
            let ids = tokenizer.encode(&case.text, false).expect("encodes");
            assert_eq!(ids, case.ids, "{folder}: {:?}", case.text);
        }
    }
}

#[test]
fn decoding_gives_the_text_back_whole_and_streamed() {
    for (folder, tokenizer) in [
        ("byte_level", byte_level()),
        ("byte_level", gguf("byte_level")),
        ("sentencepiece", gguf("sentencepiece")),
        ("sentencepiece", reloaded(&gguf("sentencepiece"))),
    ] {
        for Text { text, ids } in read::<Vec<Text>>(&format!("{folder}/texts.json")) {
            assert_eq!(tokenizer.decode(&ids, false).expect("decodes"), text, "{folder}");
            let mut stream = tokenizer.stream(false);
            let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).expect("decodes")).collect();
            pieces.push(stream.flush().expect("decodes"));
            assert_eq!(pieces.concat(), text, "{folder}");
            assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{folder}: {pieces:?}");
        }
    }
}

#[test]
fn spans_are_the_bytes_of_each_token() {
    let tokenizer = byte_level();
    let text = "Grüße<|im_end|> aus";
    let tokens = tokenizer.encode_with_spans(text, false).expect("encodes");
    for (id, span) in tokens.ids.iter().zip(tokens.spans) {
        // Tokens that are a part of a character span all of it.
        if let Ok(piece) = std::str::from_utf8(tokenizer.token_bytes(*id)) {
            assert_eq!(&text[span], piece);
        }
    }
}

#[test]
fn an_unfinished_character_waits_and_is_replaced_at_the_end() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("🙂", false).expect("encodes");
    assert!(ids.len() > 1, "the fixture has no token for the emoji");
    let mut stream = tokenizer.stream(false);
    assert_eq!(stream.push(ids[0]).expect("decodes"), "");
    assert_eq!(stream.flush().expect("decodes"), "\u{FFFD}");
    assert_eq!(tokenizer.token_text(ids[0]), "bytes:\\xf0");
}

#[test]
fn special_tokens_are_known_and_skipped_on_request() {
    let tokenizer = byte_level();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    assert_eq!(
        (tokenizer.bos_token().as_deref(), tokenizer.eos_token().as_deref()),
        (Some("<|im_start|>"), Some("<|im_end|>"))
    );
    assert_eq!((tokenizer.unk_id(), tokenizer.pad_id()), (Some(0), Some(2)));
    let ids = tokenizer.encode("a<|im_end|>b", false).expect("encodes");
    assert_eq!(tokenizer.decode(&ids, true).expect("decodes"), "ab");
    assert_eq!(tokenizer.token_text(2), "<|im_end|>");
    assert_eq!(tokenizer.id("<|im_end|>"), Some(2));
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(50));
    assert_eq!(tokenizer.token_bytes(1_000_000), b"");
    assert_eq!(tokenizer.vocab_size(), 400);
}

#[test]
fn bos_and_eos_are_added_as_the_gguf_file_says() {
    let mut vocab: GgufVocab = read("sentencepiece/gguf.json");
    let ids = |vocab: &GgufVocab| {
        let tokenizer = Tokenizer::from_gguf(vocab).expect("builds");
        let ids = tokenizer.encode("the", true).expect("encodes");
        assert_eq!(reloaded(&tokenizer).encode("the", true).expect("encodes"), ids);
        (ids.first() == vocab.bos.as_ref(), ids.last() == vocab.eos.as_ref())
    };
    assert_eq!(ids(&vocab), (true, false));
    (vocab.add_bos, vocab.add_eos) = (Some(false), Some(true));
    assert_eq!(ids(&vocab), (false, true));
}

#[test]
fn an_unknown_pre_tokenizer_leaves_a_warning() {
    let mut vocab: GgufVocab = read("byte_level/gguf.json");
    vocab.pre = Some("brand-new".into());
    let tokenizer = Tokenizer::from_gguf(&vocab).expect("builds");
    assert!(tokenizer.warnings()[0].contains("\"brand-new\""), "{:?}", tokenizer.warnings());
    assert!(gguf("byte_level").warnings().is_empty());
}

#[test]
fn repeated_and_empty_tokens_keep_their_ids() {
    let mut vocab: GgufVocab = read("byte_level/gguf.json");
    vocab.tokens.extend(["a".into(), String::new()]);
    vocab.token_types.extend([1, 1]);
    let tokenizer = Tokenizer::from_gguf(&vocab).expect("builds");
    assert_eq!(tokenizer.vocab_size(), 402);
    assert_eq!(tokenizer.warnings().len(), 1);
    assert_eq!(
        tokenizer.encode("a", false).expect("encodes"),
        gguf("byte_level").encode("a", false).expect("encodes")
    );
}

#[test]
fn lying_gguf_vocabularies_are_refused_with_a_sentence() {
    type Lie = fn(&mut GgufVocab);
    let cases: [(&str, Lie, &str); 8] = [
        ("byte_level", |v| v.model = "bert".into(), "\"bert\"; \"gpt2\" and \"llama\""),
        ("byte_level", |v| v.tokens.clear(), "tokens is empty"),
        ("byte_level", |v| v.token_types.truncate(3), "token_type has 3 entries"),
        ("byte_level", |v| v.eos = Some(400), "eos token is 400"),
        ("byte_level", |v| v.merges[1] = "ab".into(), "merge 1 is \"ab\""),
        ("byte_level", |v| v.merges[1] = "zzz yyy".into(), "merges"),
        ("sentencepiece", |v| v.scores.clear(), "scores has 0 entries"),
        ("sentencepiece", |v| v.bos = Some(u32::MAX), "bos token is 4294967295"),
    ];
    for (folder, lie, expected) in cases {
        let mut vocab: GgufVocab = read(&format!("{folder}/gguf.json"));
        lie(&mut vocab);
        let error = Tokenizer::from_gguf(&vocab).err().expect(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn scores_that_are_not_numbers_do_not_panic() {
    let mut vocab: GgufVocab = read("sentencepiece/gguf.json");
    vocab.scores[300..350].fill(f32::NAN);
    Tokenizer::from_gguf(&vocab).expect("builds");
}

#[test]
fn damaged_tokenizer_files_are_errors_that_name_the_file() {
    let whole = std::fs::read(fixture("byte_level/tokenizer.json")).expect("reads");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    let cuts = (0..whole.len()).step_by(211);
    for damaged in
        cuts.map(|cut| whole[..cut].to_vec()).chain([b"{}".to_vec(), b"[1]".to_vec(), vec![0xff; 9]])
    {
        std::fs::write(&path, &damaged).expect("written");
        let error = Tokenizer::from_file(&path).err().expect("damaged").to_string();
        assert!(error.contains("tokenizer.json: not a usable tokenizer.json"), "{error}");
    }
    let missing = Tokenizer::from_file(folder.path().join("none.json")).err().expect("missing").to_string();
    assert!(missing.contains("none.json"), "{missing}");
}

#[test]
fn parts_that_are_not_what_they_claim_are_errors_or_ignored() {
    let text = std::fs::read_to_string(fixture("byte_level/tokenizer.json")).expect("reads");
    let whole: serde_json::Value = serde_json::from_str(&text).expect("parses");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    let wrong = [json!(null), json!(7), json!("x"), json!([1]), json!({"type": "Sequence"})];
    let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    let parts = ["/normalizer", "/pre_tokenizer", "/decoder", "/post_processor", "/added_tokens", "/model"];
    let inner = ["/model/vocab", "/model/merges", "/model/merges/0", "/decoder/type", "/added_tokens/0/id"];
    for pointer in parts.iter().chain(&inner) {
        for value in wrong.iter().chain([&precompiled]) {
            let mut json = whole.clone();
            *json.pointer_mut(pointer).expect(pointer) = value.clone();
            std::fs::write(&path, json.to_string()).expect("written");
            if let Ok(tokenizer) = Tokenizer::from_file(&path) {
                let ids = tokenizer.encode("some text", true).unwrap_or_default();
                tokenizer.decode(&ids, false).expect("decodes what it encoded");
            }
        }
    }
}

#[test]
fn a_vocabulary_that_claims_a_huge_id_is_refused_before_allocating() {
    let text = std::fs::read_to_string(fixture("byte_level/tokenizer.json")).expect("reads");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("parses");
    json["model"]["vocab"]["zzzz"] = u32::MAX.into();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).expect("written");
    let error = Tokenizer::from_file(&path).err().expect("refused").to_string();
    assert!(error.contains("4294967295"), "{error}");
}
