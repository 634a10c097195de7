//! Vectors of prompts.

use crate::fixtures::*;
use hearth_engine::api::{Event, FinishReason, Pooling};

fn vector(prompt: &[u32], pooling: Pooling, max_batch_tokens: usize) -> Vec<f32> {
    let engine = start(&load(&open("tiny-chat")), 1, max_batch_tokens);
    let events = events(engine.embed(prompt.to_vec(), pooling, None).expect("fits"));
    let [Event::Embedding(vector), Event::Finished { reason: FinishReason::Length, .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(vector.len(), engine.hidden_size());
    vector.clone()
}

#[test]
fn a_prompt_s_vector_does_not_depend_on_chunks() {
    let prompt: Vec<u32> = (0..100).map(|i| i * 31 % 320).collect();
    for pooling in [Pooling::Mean, Pooling::Last] {
        let whole = vector(&prompt, pooling, 512);
        assert!([1, 7, 64].iter().all(|&chunk| vector(&prompt, pooling, chunk) == whole), "{pooling:?}");
    }
}

#[test]
fn embeddings_and_generations_share_a_step_without_a_trace() {
    let engine = start(&load(&open("tiny-chat")), 8, 64);
    let prompt: Vec<u32> = (0..50).map(|i| i * 17 % 320).collect();
    let alone = tokens(&events(engine.submit(greedy(&prompt, 20)).expect("fits")));
    let vectors: Vec<_> =
        (0..6).map(|_| engine.embed(prompt.clone(), Pooling::Mean, None).expect("fits")).collect();
    let among = engine.submit(greedy(&prompt, 20)).expect("fits");
    assert_eq!(tokens(&events(among)), alone);
    let expected = vector(&prompt, Pooling::Mean, 512);
    for generation in vectors {
        assert!(generation.started().is_some());
        assert_eq!(events(generation)[0], Event::Embedding(expected.clone()));
    }
}

#[test]
fn what_has_no_vector_is_refused() {
    let engine = start(&load(&open("tiny-chat")), 1, 64);
    assert!(engine.embed(Vec::new(), Pooling::Mean, None).is_err());
    assert!(engine.embed(vec![320], Pooling::Mean, None).is_err());
    assert!(engine.embed(vec![1; 100_000], Pooling::Mean, None).is_err());
}
