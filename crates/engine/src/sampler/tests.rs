use super::logprobs::LogSoftmax;
use super::*;
use proptest::prelude::*;

/// Logits with many near and exact ties, as quantized heads give.
fn row(seed: u64, len: usize) -> Vec<f32> {
    (0..len as u64).map(|i| (random::uniform(seed, i) * 40.0).round() as f32 / 4.0 - 5.0).collect()
}

/// The distribution after all filters, straight from the definitions: sort everything, cut, renormalise.
fn reference(logits: &[f32], s: &Sampling) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let max = f64::from(logits[order[0]]);
    let weight = |i: &usize| ((f64::from(logits[*i]) - max) / f64::from(s.temperature)).exp();
    if s.top_k > 0 {
        order.truncate(s.top_k);
    }
    if s.top_p < 1.0 {
        let total: f64 = order.iter().map(weight).sum();
        let mut sum = 0.0;
        let cut = order.iter().position(|i| (sum += weight(i), sum >= f64::from(s.top_p) * total).1);
        order.truncate(cut.map_or(order.len(), |last| last + 1));
    }
    order.retain(|i| weight(i) >= f64::from(s.min_p));
    let total: f64 = order.iter().map(weight).sum();
    let mut p = vec![0.0; logits.len()];
    order.iter().for_each(|i| p[*i] = weight(i) / total);
    p
}

fn sampler(sampling: Sampling) -> Sampler {
    Sampler::new(Sampling { seed: sampling.seed.or(Some(1)), ..sampling }, &[])
}

#[test]
fn greedy_takes_the_highest_logit_and_the_lower_id_among_equals() {
    let greedy = sampler(Sampling { temperature: 0.0, ..Sampling::default() });
    assert_eq!(greedy.choose(&[0.0, 3.0, 3.0, -1.0], 0), Ok(1));
    assert_eq!(greedy.choose(&[f32::NEG_INFINITY, f32::NEG_INFINITY, -7.0], 0), Ok(2));
}

#[test]
fn logits_that_are_no_distribution_are_an_error_not_a_token() {
    for temperature in [0.0, 1.0] {
        let s = sampler(Sampling { temperature, ..Sampling::default() });
        let error = s.choose(&[0.0, f32::NAN], 0).expect_err("NaN").to_string();
        assert!(error.contains("token 1 is NaN"), "{error}");
        assert!(s.choose(&[f32::INFINITY, 0.0], 0).is_err());
        assert_eq!(s.choose(&[f32::NEG_INFINITY; 3], 0), Err(SampleError::NothingPossible));
    }
    assert!(LogSoftmax::new(&[f32::NAN, 1.0]).is_err());
}

#[test]
fn draws_follow_the_filtered_distribution() {
    let filters = [
        Sampling::default(),
        Sampling { temperature: 0.5, ..Sampling::default() },
        Sampling { top_k: 5, ..Sampling::default() },
        Sampling { top_p: 0.7, ..Sampling::default() },
        Sampling { min_p: 0.2, ..Sampling::default() },
        Sampling { temperature: 1.7, top_k: 20, top_p: 0.9, min_p: 0.05, ..Sampling::default() },
    ];
    let (logits, draws) = (row(4, 50), 40_000);
    for (seed, sampling) in filters.into_iter().enumerate() {
        let expected = reference(&logits, &sampling);
        let s = sampler(Sampling { seed: Some(seed as u64), ..sampling });
        let mut counts = vec![0.0; logits.len()];
        (0..draws).for_each(|p| counts[s.choose(&logits, p).expect("finite") as usize] += 1.0);
        let mut chi_square = 0.0;
        for (count, p) in counts.iter().zip(&expected) {
            assert!(*p > 0.0 || *count == 0.0, "a filtered token was drawn");
            if *p > 0.0 {
                chi_square += (count - p * draws as f64).powi(2) / (p * draws as f64);
            }
        }
        // The 99.9% point of chi² with 49 degrees of freedom; fewer kept tokens have a lower one.
        assert!(chi_square < 85.4, "filters {seed}: {chi_square}");
    }
}

#[test]
fn a_temperature_that_is_next_to_nothing_draws_the_best() {
    for temperature in [1e-40, 1e-20, 1e-6] {
        let s = sampler(Sampling { temperature, ..Sampling::default() });
        let filtered = sampler(Sampling { temperature, top_p: 0.9, min_p: 0.1, ..Sampling::default() });
        for position in 0..50 {
            assert_eq!(s.choose(&[1.0, 3.0, -1.0, f32::NEG_INFINITY], position), Ok(1));
            assert_eq!(filtered.choose(&[1.0, 3.0, -1.0, f32::NEG_INFINITY], position), Ok(1));
        }
    }
}

#[test]
fn the_best_of_a_large_vocabulary_is_found_wherever_it_is() {
    let greedy = sampler(Sampling { temperature: 0.0, ..Sampling::default() });
    let one = sampler(Sampling { top_k: 1, ..Sampling::default() });
    for at in [0, 63, 64, 9_999, 10_006] {
        let mut logits = row(5, 10_007);
        logits[at] = 50.0;
        assert_eq!(greedy.choose(&logits, at), Ok(at as u32));
        assert_eq!(one.choose(&logits, at), Ok(at as u32));
        logits[at] = f32::NAN;
        assert!(greedy.choose(&logits, 0).unwrap_err().to_string().contains(&format!("token {at} is NaN")));
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let (logits, other) = (row(1, 300), row(2, 300));
    let s = sampler(Sampling { seed: Some(9), top_p: 0.95, ..Sampling::default() });
    let alone: Vec<_> = (0..100).map(|p| s.choose(&logits, p)).collect();
    let mixed: Vec<_> = (0..100)
        .rev()
        .map(|p| {
            s.choose(&other, p).expect("finite");
            s.choose(&logits, p)
        })
        .collect();
    assert!(alone.iter().eq(mixed.iter().rev()));
    let reseeded = sampler(Sampling { seed: Some(10), top_p: 0.95, ..Sampling::default() });
    assert!(alone.iter().enumerate().any(|(p, token)| *token != reseeded.choose(&logits, p)));
    let fresh = || Sampler::new(Sampling::default(), &[]).seed;
    assert_ne!(fresh(), fresh(), "requests without a seed differ");
}

#[test]
fn penalties_and_biases_follow_their_formulas() {
    let sampling = Sampling {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        logit_bias: vec![(0, 10.0), (4, f32::NEG_INFINITY)],
        ..Sampling::default()
    };
    let mut s = Sampler::new(sampling, &[1, 2]);
    s.record(2);
    s.record(2);
    s.record(3);
    let adjusted = s.adjust(&[1.0, 4.0, -4.0, 1.0, 9.0, 5.0]);
    assert_eq!(adjusted, [11.0, 2.0, -8.0 - 0.5 - 0.5, 0.5 - 0.5 - 0.25, f32::NEG_INFINITY, 5.0]);
}

#[test]
fn meaningless_parameters_are_refused_by_name() {
    let base = Sampling::default;
    let cases = [
        (Sampling { temperature: -1.0, ..base() }, "temperature is -1"),
        (Sampling { temperature: f32::NAN, ..base() }, "temperature is NaN"),
        (Sampling { top_p: 1.5, ..base() }, "top_p is 1.5"),
        (Sampling { min_p: -0.1, ..base() }, "min_p is -0.1"),
        (Sampling { repetition_penalty: 0.0, ..base() }, "repetition_penalty is 0"),
        (Sampling { presence_penalty: f32::INFINITY, ..base() }, "presence_penalty is inf"),
        (Sampling { frequency_penalty: f32::NAN, ..base() }, "frequency_penalty is NaN"),
        (Sampling { logit_bias: vec![(100, 1.0)], ..base() }, "token 100"),
        (Sampling { logit_bias: vec![(0, f32::NAN)], ..base() }, "logit_bias NaN"),
    ];
    for (sampling, expected) in cases {
        let error = validate(&sampling, 100).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(validate(&base(), 100), Ok(()));
}

#[test]
fn log_probabilities_sum_to_one_and_agree_with_their_list() {
    let logits = row(3, 1000);
    let softmax = LogSoftmax::new(&logits).expect("finite");
    let total: f64 = (0..1000).map(|t| softmax.of(t).exp()).sum();
    assert!((total - 1.0).abs() < 1e-12, "{total}");
    let all = softmax.top(5000);
    assert_eq!(all.len(), 1000);
    assert!(all.is_sorted_by(|a, b| a.1 > b.1 || (a.1 == b.1 && a.0 < b.0)));
    for k in [0, 1, 2, 17] {
        assert_eq!(softmax.top(k), all[..k]);
    }
    let report = softmax.report(all[3].0, 5);
    assert_eq!(report.logprob.to_bits(), report.top[3].1.to_bits());
}

proptest! {
    #[test]
    fn filters_keep_what_their_definitions_keep(
        seed in 0..1000u64,
        len in 1..1200usize,
        temperature in 0.05..3f32,
        top_k in 0..400usize,
        top_p in 0..=20u32,
        min_p in 0..=20u32,
    ) {
        let (top_p, min_p) = (top_p as f32 / 20.0, min_p as f32 / 20.0);
        let logits = row(seed, len);
        let sampling = Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
        let expected = reference(&logits, &sampling);
        let s = sampler(sampling);
        for position in 0..40 {
            let token = s.choose(&logits, position).expect("finite");
            prop_assert!(expected[token as usize] > 0.0);
        }
    }
}
