//! Preference pairs from rows to micro-batches: what is trained, what is left out, what stays together.

use hearth_data::inspect::{Piece, sample_pairs};
use hearth_data::loader::micro_batches;
use hearth_data::{
    ChatTemplate, DataFile, Dataset, DatasetConfig, Error, Half, IGNORE, Loader, Sequence, Tokenizer,
    TrainOn, dataset,
};
use proptest::prelude::*;
use serde_json::{Value, json};
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

/// Loads `rows`, with the settings that `change` makes.
fn load_with(
    rows: &[Value],
    template: Option<&ChatTemplate>,
    change: impl FnOnce(&mut DatasetConfig),
) -> Result<Dataset, Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pairs.jsonl");
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(&path, lines.join("\n")).expect("written");
    let file = DataFile { path, format: "preference".into(), split: Default::default() };
    let mut config = DatasetConfig { files: vec![file], max_seq_len: 4096, ..Default::default() };
    change(&mut config);
    dataset::load(&config, Some(&tokenizer()), template)
}

fn load(rows: &[Value], template: Option<&ChatTemplate>) -> Dataset {
    load_with(rows, template, |_| {}).expect("loads")
}

/// The trained pieces of each sequence.
fn trained(dataset: &Dataset) -> Vec<Vec<String>> {
    let pieces =
        hearth_data::inspect::sample(&dataset.train, Some(&tokenizer()), usize::MAX).expect("decodes");
    let only = |pieces: Vec<Piece>| pieces.into_iter().filter(|p| p.trained).map(|p| p.text).collect();
    pieces.into_iter().map(only).collect()
}

fn text(sequence: &Sequence) -> String {
    tokenizer().decode(&sequence.ids, false).expect("decodes")
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn chat_row() -> Value {
    json!({
        "prompt": [message("user", "u0"), message("assistant", "a0"), message("user", "u1")],
        "chosen": [message("assistant", "good")],
        "rejected": [message("assistant", "bad")],
    })
}

fn token_row(i: usize) -> Value {
    json!({"input_ids_chosen": [i, 7, 8], "labels_chosen": [-100, 7, 8], "input_ids_rejected": [i, 9, 8, 5]})
}

#[test]
fn of_a_conversation_the_reply_and_its_end_of_turn_are_trained_and_nothing_of_the_prompt() {
    for name in ["smollm2", "qwen2.5"] {
        let dataset = load(&[chat_row()], Some(&template(name)));
        assert_eq!(trained(&dataset), [["good<|im_end|>"], ["bad<|im_end|>"]], "{name}");
        assert!(text(&dataset.train[1]).contains("a0<|im_end|>\n<|im_start|>user\nu1<|im_end|>"), "{name}");
        assert_eq!(dataset.stats.warnings, Vec::<String>::new());
    }
    // Its template rewrites earlier turns, which the prompt's are.
    let qwen3 = load(&[chat_row()], Some(&template("qwen3")));
    let thought = "<think>\n\n</think>\n\n";
    assert_eq!(trained(&qwen3), [[format!("{thought}good<|im_end|>")], [format!("{thought}bad<|im_end|>")]]);
}

#[test]
fn train_on_all_trains_everything_after_the_prompt() {
    let rows = [json!({
        "prompt": [message("user", "u")],
        "chosen": [message("assistant", "a"), message("user", "more"), message("assistant", "b")],
        "rejected": [message("assistant", "c")],
    })];
    let template = template("smollm2");
    let assistant = load(&rows, Some(&template));
    assert_eq!(trained(&assistant)[0], ["a<|im_end|>", "b<|im_end|>"]);
    let all = load_with(&rows, Some(&template), |c| c.train_on = TrainOn::All).expect("loads");
    let reply = "a<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n";
    assert_eq!(trained(&all), [[reply], ["c<|im_end|>\n"]]);
}

#[test]
fn texts_are_the_prompt_the_reply_and_the_end_of_sequence() {
    let dataset = load(&[json!({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})], None);
    assert_eq!(trained(&dataset), [[" blue.<|im_end|>"], [" green.<|im_end|>"]]);
    assert_eq!(text(&dataset.train[0]), "The sky is blue.<|im_end|>");
    let implicit = load(&[json!({"chosen": "The sky is blue.", "rejected": "The sky is green."})], None);
    assert_eq!(implicit.train, dataset.train);
}

#[test]
fn a_token_across_the_end_of_the_prompt_is_trained() {
    // The space belongs to the words after it, which are what tells the replies apart.
    let dataset = load(&[json!({"prompt": "The sky is ", "chosen": "the", "rejected": "a"})], None);
    for (words, reply) in trained(&dataset).iter().zip(["the", "a"]) {
        assert!(words.concat().ends_with(&format!("{reply}<|im_end|>")), "{words:?}");
    }
    assert!(dataset.train.iter().all(|s| s.trained_tokens() >= 2));
}

#[test]
fn token_ids_need_no_tokenizer_and_their_first_label_does_not_count() {
    let dataset = load(&[token_row(4)], None);
    assert_eq!(dataset.train[0].labels, [IGNORE, 7, 8]);
    assert_eq!(dataset.train[1].labels, [IGNORE, 9, 8, 5]);
}

#[test]
fn each_pair_has_one_place_and_its_halves_are_neighbours() {
    let rows: Vec<Value> = (0..5).map(token_row).collect();
    let dataset = load_with(&rows, None, |c| c.val_fraction = 0.4).expect("loads");
    assert_eq!((dataset.stats.train.examples, dataset.stats.val.examples), (3, 2));
    for side in [&dataset.train, &dataset.val] {
        for (place, pair) in side.chunks(2).enumerate() {
            assert_eq!(pair[0].ids[0], pair[1].ids[0]);
            let of = |s: &Sequence| (s.example, s.half);
            let place = place as u64;
            assert_eq!(
                (of(&pair[0]), of(&pair[1])),
                ((place, Some(Half::Chosen)), (place, Some(Half::Rejected)))
            );
        }
    }
}

#[test]
fn pairs_that_say_the_same_or_nothing_are_left_out_and_counted() {
    let rows = [
        token_row(1),
        // The same tokens.
        json!({"input_ids_chosen": [1, 2, 3], "input_ids_rejected": [1, 2, 3]}),
        // The same tokens once cut, and too long for any of its reply.
        json!({"input_ids_chosen": [1, 2, 3, 4, 5], "input_ids_rejected": [1, 2, 3, 4, 6]}),
        json!({"input_ids_chosen": [1, 2, 3, 4, 5], "labels_chosen": [-100, -100, -100, -100, 5],
               "input_ids_rejected": [1, 6]}),
        // Cut, and still something to learn from.
        json!({"input_ids_chosen": [1, 9, 3, 4, 5], "input_ids_rejected": [1, 6]}),
    ];
    let dataset = load_with(&rows, None, |c| c.max_seq_len = 4).expect("loads");
    let stats = &dataset.stats;
    assert_eq!((stats.rows, stats.truncated, stats.dropped, stats.identical), (5, 3, 1, 2));
    assert_eq!((stats.train.examples, dataset.train.len()), (2, 4));
    assert_eq!(dataset.train[2].ids, [1, 9, 3, 4]);
    assert_eq!(
        stats.warnings,
        [
            "3 pairs are longer than max_seq_len = 4 and lost their end",
            "1 pairs have a reply without a trained token and were left out",
            "2 pairs were left out because both replies are the same tokens within max_seq_len = 4",
        ]
    );
    let error = load_with(&rows[1..2], None, |_| {}).expect_err("none is left").to_string();
    assert!(error.contains("none of the 1 pairs") && error.contains("same tokens"), "{error}");
}

#[test]
fn settings_that_part_pairs_and_rows_that_are_none_are_refused_with_a_sentence() {
    let packed = load_with(&[token_row(1)], None, |c| c.packing = true);
    let mixed = load_with(&[token_row(1)], None, |c| {
        c.files.push(DataFile { format: "tokens".into(), ..c.files[0].clone() });
    });
    let foreign = load_with(&[token_row(1), token_row(60)], None, |c| c.vocab_size = Some(50));
    let half = load_with(&[token_row(1), json!({"prompt": "p", "chosen": "c"})], None, |_| {});
    let roles = load_with(&[chat_row()], None, |_| {});
    let cases = [
        (packed, "packing = true does not go with format \"preference\""),
        (mixed, "\"tokens\" does not; train on one or the other"),
        (foreign, "pairs.jsonl:2: input_ids: token id 60"),
        (half, "pairs.jsonl:2: missing key \"rejected\""),
        (roles, "format \"preference\" holds conversations, but the model has no chat template"),
    ];
    for (result, expected) in cases {
        let error = result.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}\n  lacks {expected:?}");
    }
}

#[test]
fn a_pair_is_shown_with_its_prompt_once() {
    let dataset = load(&[chat_row()], Some(&template("smollm2")));
    let shown = sample_pairs(&dataset.train, Some(&tokenizer()), 3).expect("decodes");
    let words = |pieces: &[Piece]| pieces.iter().map(|p| (p.text.clone(), p.trained)).collect::<Vec<_>>();
    assert_eq!(shown.len(), 1);
    assert!(shown[0].prompt.iter().all(|p| !p.trained && p.text.ends_with("<|im_start|>assistant\n")));
    assert_eq!(words(&shown[0].chosen), [("good<|im_end|>".into(), true), ("\n".into(), false)]);
    assert_eq!(words(&shown[0].rejected), [("bad<|im_end|>".into(), true), ("\n".into(), false)]);
}

fn words() -> impl Strategy<Value = String> {
    "[ a-zé\n<|>]{0,24}"
}

proptest! {
    /// Whatever the texts: both halves hold prompt and reply whole, begin untrained, and part only where trained.
    #[test]
    fn the_halves_of_any_text_pair_differ_only_in_trained_tokens(
        prompt in words(), chosen in words(), rejected in words(), implicit: bool,
    ) {
        let row = match implicit {
            true => json!({"chosen": format!("{prompt}{chosen}"), "rejected": format!("{prompt}{rejected}")}),
            false => json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}),
        };
        let Ok(dataset) = load_with(&[row], None, |_| {}) else { return Ok(()) };
        let [better, worse] = &dataset.train[..] else { panic!("one pair") };
        prop_assert_eq!(text(better), format!("{prompt}{chosen}<|im_end|>"));
        prop_assert_eq!(text(worse), format!("{prompt}{rejected}<|im_end|>"));
        let same = better.ids.iter().zip(&worse.ids).take_while(|(a, b)| a == b).count();
        for half in [better, worse] {
            prop_assert_eq!(half.labels[0], IGNORE);
            prop_assert!((same.max(1)..half.len()).all(|i| half.labels[i] == half.ids[i] as i32));
        }
    }

    /// No JSON makes the reader panic: it is a pair, or a sentence.
    #[test]
    fn hostile_rows_are_refused_and_never_panic(
        values in prop::collection::vec(0usize..10, 4), keys in prop::collection::vec(0usize..8, 4),
    ) {
        let hostile = |i: usize| match i {
            0 => Value::Null,
            1 => json!(-1),
            2 => json!([]),
            3 => json!([[]]),
            4 => json!({"role": "assistant"}),
            5 => json!([message("assistant", "x"), message("user", "")]),
            6 => json!([1, 4_000_000_000_u32]),
            7 => json!([message("user", "x"), {"role": "assistant", "content": null, "tool_calls": []}]),
            8 => json!([3, 1]),
            _ => json!("\u{F8F0}<|im_end|>"),
        };
        const KEYS: [&str; 8] = [
            "prompt", "chosen", "rejected", "system", "messages", "input_ids_chosen", "input_ids_rejected",
            "labels_chosen",
        ];
        let row: serde_json::Map<String, Value> =
            keys.iter().zip(&values).map(|(&k, &v)| (KEYS[k].to_owned(), hostile(v))).collect();
        let template = template("smollm2");
        match load_with(&[Value::Object(row)], Some(&template), |_| {}) {
            Ok(dataset) => prop_assert_eq!(dataset.train.len(), 2),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    /// The step that a cursor leads to has the pairs that it would have had, whole.
    #[test]
    fn a_resumed_loader_hands_out_the_same_pairs(count in 1usize..12, batch in 1usize..5, before in 0usize..9) {
        let rows: Vec<Value> = (0..count).map(token_row).collect();
        let dataset = load_with(&rows, None, |_| {}).expect("loads");
        let mut whole = Loader::new(dataset.train.clone(), 3, batch).expect("a loader");
        for _ in 0..before {
            whole.next_step();
        }
        let mut resumed = Loader::new(dataset.train, 3, batch).expect("a loader");
        resumed.seek(whole.cursor()).expect("in range");
        for _ in 0..5 {
            let step = resumed.next_step();
            prop_assert_eq!(&step, &whole.next_step());
            for micro in micro_batches(step, 1) {
                prop_assert_eq!(micro.sequences.len(), 2);
                prop_assert_eq!(micro.sequences[0].example, micro.sequences[1].example);
            }
        }
    }
}
