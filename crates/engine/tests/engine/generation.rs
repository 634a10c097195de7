//! Tokens: those of transformers.

use crate::fixtures::*;
use hearth_engine::api::{Event, FinishReason};

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for case in parity_cases() {
        let reference = Reference::of(&case);
        let (prompt, expected) = (reference.ids("prompt_ids"), reference.ids("generated_ids"));
        let engine = start(&load(&open(&case)), 2, 3);
        let generation = engine.submit(greedy(&prompt, expected.len())).expect(&case);
        assert_eq!(tokens(&events(generation)), expected, "{case}");
    }
}

#[test]
fn a_chat_model_answers_by_heart_and_stops_by_itself_ten_at_a_time() {
    let files = open("tiny-chat");
    let json = std::fs::read(fixtures().join("tiny-chat/reference.json")).expect("readable");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("well formed");
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        let ids = value.as_array().expect("a list").iter();
        ids.map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let engine = start(&load(&files), 4, 16);
    let answers = json["answers"].as_array().expect("a list");
    let running: Vec<_> = answers
        .iter()
        .map(|answer| {
            let mut request = greedy(&ids(&answer["prompt_ids"]), 64);
            request.stop_tokens = files.config.eos_token_ids.clone();
            engine.submit(request).expect("fits")
        })
        .collect();
    for (answer, generation) in answers.iter().zip(running) {
        let (events, mut expected) = (events(generation), ids(&answer["ids"]));
        expected.pop();
        assert_eq!(tokens(&events), expected, "{}", answer["prompt"]);
        assert!(matches!(events.last(), Some(Event::Finished { reason: FinishReason::Stop, .. })));
    }
    engine.drain();
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.running, stats.kv_blocks_used), (answers.len() as u64, 0, 0));
}
