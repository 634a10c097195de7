//! From files to sequences: what is trained, what is refused.

use hearth_data::inspect::{counts, sample};
use hearth_data::{
    ChatTemplate, DataFile, Dataset, DatasetConfig, Error, IGNORE, Split, Tokenizer, TrainOn, dataset,
};
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(fixtures().join("byte_level/tokenizer.json")).expect("reads")
}

fn template(name: &str) -> ChatTemplate {
    let source = std::fs::read_to_string(fixtures().join(format!("templates/{name}.jinja"))).expect(name);
    ChatTemplate::new(&source, Some("<|im_start|>"), Some("<|im_end|>")).expect(name)
}

/// Files in a folder of their own.
struct Files {
    folder: tempfile::TempDir,
    config: DatasetConfig,
}

impl Files {
    fn new(name: &str, format: &str, contents: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let files = Self { folder, config: DatasetConfig { max_seq_len: 4096, ..Default::default() } };
        files.and(name, format, contents, Split::Train)
    }

    fn and(mut self, name: &str, format: &str, contents: &str, split: Split) -> Self {
        let path = self.folder.path().join(name);
        std::fs::write(&path, contents).expect("written");
        self.config.files.push(DataFile { path, format: format.into(), split });
        self
    }

    fn set(mut self, change: impl FnOnce(&mut DatasetConfig)) -> Self {
        change(&mut self.config);
        self
    }

    fn load(&self, template: Option<&ChatTemplate>) -> Result<Dataset, Error> {
        dataset::load(&self.config, Some(&tokenizer()), template)
    }
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "u2"}, {"role": "assistant", "content": "a2"}]}"#;

/// The trained pieces of every document.
fn trained(dataset: &Dataset) -> Vec<Vec<String>> {
    let documents = sample(&dataset.train, Some(&tokenizer()), usize::MAX).expect("decodes");
    documents
        .into_iter()
        .map(|pieces| pieces.into_iter().filter(|p| p.trained).map(|p| p.text).collect())
        .collect()
}

fn whole_text(dataset: &Dataset, index: usize) -> String {
    tokenizer().decode(&dataset.train[index].ids, false).expect("decodes")
}

fn rows(count: usize) -> String {
    (0..count).map(|i| format!("{{\"input_ids\": [{i}, {i}, 7]}}\n")).collect()
}

#[test]
fn only_what_the_assistant_says_and_its_end_of_turn_is_trained() {
    let files = Files::new("a.jsonl", "chat", CHAT);
    for (name, expected) in [
        ("smollm2", ["a1<|im_end|>", "a2<|im_end|>"]),
        ("qwen2.5", ["a1<|im_end|>", "a2<|im_end|>"]),
        // These end turns with tokens that the fixture's vocabulary does not have: plain text to it.
        ("llama-3.1", ["a1<|eot_id|>", "a2<|eot_id|>"]),
        ("mistral-nemo", ["a1<|im_end|>", "a2<|im_end|>"]),
    ] {
        let template = template(name);
        let dataset = files.load(Some(&template)).expect(name);
        assert_eq!(trained(&dataset), [expected], "{name}");
        assert_eq!(dataset.stats.warnings, Vec::<String>::new(), "{name}");
    }
}

#[test]
fn a_template_that_rewrites_history_gives_each_turn_as_it_is_generated() {
    let dataset = Files::new("a.jsonl", "chat", CHAT).load(Some(&template("qwen3"))).expect("loads");
    assert_eq!(
        trained(&dataset),
        [["<think>\n\n</think>\n\na1<|im_end|>"], ["<think>\n\n</think>\n\na2<|im_end|>"]]
    );
    let history = "<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n";
    assert!(whole_text(&dataset, 1).starts_with(history), "{}", whole_text(&dataset, 1));
    assert_eq!(dataset.stats.split_by_turn, 1);
    assert!(dataset.stats.warnings[0].contains("rewrites earlier turns"), "{:?}", dataset.stats.warnings);
}

#[test]
fn trained_tokens_equal_a_direct_count() {
    let files = Files::new("a.jsonl", "chat", CHAT);
    let dataset = files.load(Some(&template("smollm2"))).expect("loads");
    let tokenizer = tokenizer();
    let answers: usize = ["a1<|im_end|>", "a2<|im_end|>"]
        .iter()
        .map(|t| tokenizer.encode(t, false).expect("encodes").len())
        .sum();
    assert_eq!(dataset.stats.train.trained_tokens, answers);
    let all = files.set(|c| c.train_on = TrainOn::All).load(Some(&template("smollm2"))).expect("loads");
    assert_eq!(all.stats.train.trained_tokens, all.stats.train.tokens - 1);
    assert_eq!(all.train[0].ids, dataset.train[0].ids);
}

#[test]
fn sharegpt_alpaca_and_chat_say_the_same() {
    let template = template("smollm2");
    let text = |name: &str, format: &str, contents: &str| {
        let dataset = Files::new(name, format, contents).load(Some(&template)).expect(format);
        (whole_text(&dataset, 0), trained(&dataset))
    };
    let chat = text(
        "a.jsonl",
        "chat",
        r#"{"messages": [{"role": "user", "content": "q\n\nx"}, {"role": "assistant", "content": "a"}]}"#,
    );
    let sharegpt = text(
        "a.json",
        "sharegpt",
        r#"[{"conversations": [{"from": "human", "value": "q\n\nx"}, {"from": "gpt", "value": "a"}]}]"#,
    );
    let alpaca = text("a.jsonl", "alpaca", r#"{"instruction": "q", "input": "x", "output": "a"}"#);
    assert_eq!(chat, sharegpt);
    assert_eq!(chat, alpaca);
}

#[test]
fn alpaca_without_a_template_uses_the_standard_prompt_and_trains_the_end() {
    let files = Files::new("a.jsonl", "alpaca", r#"{"instruction": "Add.", "input": "", "output": "five"}"#);
    let dataset = files.load(None).expect("loads");
    assert_eq!(trained(&dataset), [["five<|im_end|>"]]);
    let text = whole_text(&dataset, 0);
    assert!(text.starts_with("Below is an instruction that describes a task. Write"), "{text}");
    assert!(text.ends_with("### Instruction:\nAdd.\n\n### Response:\nfive<|im_end|>"), "{text}");
}

#[test]
fn a_long_text_is_cut_into_windows_and_loses_nothing() {
    let text = "The quick brown fox. ".repeat(50);
    let dataset = Files::new("a.txt", "text", &text).set(|c| c.max_seq_len = 32).load(None).expect("loads");
    assert!(dataset.train.len() > 5 && dataset.train.iter().all(|s| s.len() <= 32));
    let ids: Vec<u32> = dataset.train.iter().flat_map(|s| s.ids.clone()).collect();
    assert_eq!(tokenizer().decode(&ids, false).expect("decodes"), format!("{text}<|im_end|>"));
}

#[test]
fn token_ids_need_no_tokenizer() {
    let contents = "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, 9]}\n";
    let files = Files::new("a.jsonl", "tokens", contents);
    let dataset = dataset::load(&files.config, None, None).expect("loads");
    assert_eq!(dataset.train[0].labels, [IGNORE, 6, 7]);
    assert_eq!(dataset.train[1].labels, [IGNORE, IGNORE, 9]);
    let shown = sample(&dataset.train, None, 1).expect("shows");
    assert_eq!(shown[0][0].text, "5 ");
}

#[test]
fn packing_keeps_every_token_and_document() {
    let files = Files::new("a.jsonl", "tokens", &rows(100)).set(|c| c.max_seq_len = 10);
    let plain = files.load(None).expect("loads");
    let packed = files.set(|c| c.packing = true).load(None).expect("loads");
    assert_eq!(plain.stats.train, packed.stats.train);
    assert_eq!(packed.train.len(), 34);
    assert_eq!(counts(&packed.train), packed.stats.train);
}

#[test]
fn long_examples_lose_their_end_and_untrained_ones_are_left_out() {
    let contents = format!(
        "{}\n{}\n{}\n",
        r#"{"input_ids": [1, 2, 3, 4, 5, 6]}"#,
        r#"{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, -100, -100, 5, 6]}"#,
        r#"{"input_ids": [1]}"#
    );
    let dataset =
        Files::new("a.jsonl", "tokens", &contents).set(|c| c.max_seq_len = 4).load(None).expect("loads");
    assert_eq!((dataset.stats.rows, dataset.stats.truncated, dataset.stats.dropped), (3, 2, 2));
    assert_eq!(dataset.train.len(), 1);
    assert_eq!(dataset.train[0].ids, [1, 2, 3, 4]);
    assert_eq!(dataset.stats.warnings.len(), 2);
}

#[test]
fn the_validation_split_is_disjoint_complete_and_fixed_by_the_seed() {
    let load = |count: usize, fraction: f64, seed: u64| {
        let files = Files::new("a.jsonl", "tokens", &rows(count));
        files.set(|c| (c.val_fraction, c.seed) = (fraction, seed)).load(None).expect("loads")
    };
    let first = |side: &[hearth_data::Sequence]| side.iter().map(|s| s.ids[0]).collect::<Vec<u32>>();
    for (count, fraction, expected) in [(100, 0.1, 10), (2, 0.001, 1), (3, 0.99, 2)] {
        let dataset = load(count, fraction, 5);
        assert_eq!(dataset.val.len(), expected);
        let mut all = [first(&dataset.train), first(&dataset.val)].concat();
        all.sort_unstable();
        assert_eq!(all, (0..count as u32).collect::<Vec<_>>());
        assert_eq!(dataset, load(count, fraction, 5));
    }
    assert_ne!(load(100, 0.1, 5).val, load(100, 0.1, 6).val);
}

#[test]
fn files_for_validation_stay_out_of_training() {
    let files = Files::new("a.jsonl", "tokens", &rows(3)).and("b.jsonl", "tokens", &rows(2), Split::Val);
    let dataset = files.load(None).expect("loads");
    assert_eq!((dataset.train.len(), dataset.val.len()), (3, 2));
}

#[test]
fn bad_data_and_settings_are_refused_with_a_sentence() {
    let chat = |row: &str| Files::new("a.jsonl", "chat", row);
    let tokens = |rows: &str| Files::new("a.jsonl", "tokens", rows);
    let question = r#"{"messages": [{"role": "user", "content": "q"}]}"#;
    let cases = [
        (
            chat(&format!("{CHAT}\n{{\"messages\": 1}}\n")),
            "a.jsonl:2: key \"messages\" is a number, a list of messages",
        ),
        (chat(&format!("{CHAT}\n{{\"messages\"")), "a.jsonl:2: not valid JSON"),
        (chat(""), "the dataset is empty: no row in"),
        (chat(question), "has a trained token"),
        (Files::new("a.jsonl", "chta", CHAT), "did you mean \"chat\"?"),
        (
            tokens("{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 99]}\n").set(|c| c.vocab_size = Some(50)),
            "a.jsonl:2: input_ids: token id 99 at position 1 is out of range",
        ),
        (
            tokens("{\"input_ids\": [1, 2], \"labels\": [1, 50]}\n").set(|c| c.vocab_size = Some(50)),
            "labels: token id 50",
        ),
        (tokens(&rows(5)).set(|c| c.max_seq_len = 1), "max_seq_len = 1"),
        (tokens(&rows(5)).set(|c| c.val_fraction = 1.0), "val_fraction = 1;"),
        (tokens(&rows(5)).set(|c| c.val_fraction = f64::NAN), "val_fraction = NaN"),
        (tokens(&rows(1)).set(|c| c.val_fraction = 0.5), "needs at least 2 examples"),
        (tokens(&rows(5)).set(|c| c.files[0].split = Split::Val), "is for training"),
        (tokens(&rows(5)).set(|c| c.files.clear()), "no [[data]] file"),
        (tokens(&rows(5)).set(|c| c.files[0].path = "nowhere/at/all.jsonl".into()), "no such file or folder"),
    ];
    let template = template("smollm2");
    for (files, expected) in cases {
        let error = files.load(Some(&template)).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}\n  lacks {expected:?}");
    }
}

#[test]
fn a_row_that_the_template_refuses_is_named() {
    let refused = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}"#;
    let files = Files::new("a.jsonl", "chat", &format!("{CHAT}\n{refused}\n"));
    let error = files.load(Some(&template("mistral-nemo"))).expect_err("refused").to_string();
    assert!(error.contains("a.jsonl:2: chat template refuses") && error.contains("alternate"), "{error}");
}

#[test]
fn missing_tokenizers_and_templates_are_named_once() {
    let files = Files::new("a.jsonl", "chat", CHAT);
    let error = files.load(None).expect_err("no template").to_string();
    assert!(error.starts_with("format \"chat\" holds conversations"), "{error}");
    let error = dataset::load(&files.config, None, None).expect_err("no tokenizer").to_string();
    assert!(error.starts_with("format \"chat\" holds text"), "{error}");
}
