use super::*;
use serde_json::Value;

/// The generator of `tests/fixtures/optimizers.py`.
fn values(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// A parameter with its optimizer's f32 states.
#[derive(Clone, Debug, PartialEq)]
struct Whole {
    shape: Vec<usize>,
    master: Vec<f32>,
    states: Vec<Vec<f32>>,
}

impl Whole {
    fn new(optim: &OptimConfig, seed: u32, shape: &[usize]) -> Self {
        let states = optim.states().iter().map(|_| vec![0.0; optim.state_len(shape)]).collect();
        Self { shape: shape.to_vec(), master: values(seed, shape.iter().product()), states }
    }

    fn step(&mut self, step: Step, gradient: &[f32], copy: Option<CopyOut>) {
        let states = self.states.iter_mut().map(|s| Values::F32(s)).collect();
        step.apply_whole(&self.shape, Span { master: &mut self.master, states, gradient, copy });
    }
}

#[test]
fn twenty_steps_equal_the_peers() {
    let fixture: Value = serde_json::from_str(include_str!("../../tests/fixtures/optimizers.json")).unwrap();
    let shapes: Vec<Vec<usize>> = serde_json::from_value(fixture["shapes"].clone()).unwrap();
    let lr = fixture["lr"].as_f64().unwrap();
    let peers = fixture["optimizers"].as_array().unwrap();
    assert_eq!(peers.len(), OptimConfig::ALL.len());
    for peer in peers {
        let optim: OptimConfig = serde_json::from_value(peer["optim"].clone()).unwrap();
        for (i, shape) in shapes.iter().enumerate() {
            let mut param = Whole::new(&optim, i as u32 + 1, shape);
            for t in 1..=20 {
                let gradient = values(1000 * (i as u32 + 1) + t, param.master.len());
                param.step(optim.step(t as u64, lr, 1.0), &gradient, None);
                let Some(want) = peer["after"].get(t.to_string()) else { continue };
                let want: Vec<f32> = serde_json::from_value(want[i].clone()).unwrap();
                // Values stay below 1, whose unit is 2⁻²⁴: the peers' order of operations may cost one a step.
                let limit = t as f32 * 2f32.powi(-24);
                let far = param.master.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far <= limit, "{} {shape:?} after {t}: off by {far:e}", optim.name());
            }
        }
    }
}

/// `a` in f64, one step: `(p, states, g) → (p, states)`.
fn formula(optim: &OptimConfig, t: i32, p: f64, s: [f64; 2], g: f64) -> (f64, [f64; 2]) {
    match optim {
        OptimConfig::AdamW(o) => {
            let [b1, b2] = o.betas;
            let (m, v) = (b1 * s[0] + (1.0 - b1) * g, b2 * s[1] + (1.0 - b2) * g * g);
            let (mean, square) = (m / (1.0 - b1.powi(t)), v / (1.0 - b2.powi(t)));
            (p * (1.0 - o.lr * o.weight_decay) - o.lr * mean / (square.sqrt() + o.eps), [m, v])
        }
        OptimConfig::Sgd(o) => {
            let b = o.momentum * s[0] + g + o.weight_decay * p;
            (p - o.lr * b, [b, 0.0])
        }
        OptimConfig::Lion(o) => {
            let [b1, b2] = o.betas;
            let direction = b1 * s[0] + (1.0 - b1) * g;
            let p = p * (1.0 - o.lr * o.weight_decay) - o.lr * direction.signum();
            (p, [b2 * s[0] + (1.0 - b2) * g, 0.0])
        }
        OptimConfig::Adafactor(_) => unreachable!("not elementwise"),
    }
}

fn elementwise() -> impl Iterator<Item = OptimConfig> {
    [
        OptimConfig::AdamW(AdamW { lr: 1e-2, weight_decay: 0.1, ..AdamW::DEFAULT }),
        OptimConfig::Sgd(Sgd { lr: 1e-2, momentum: 0.8, weight_decay: 0.1 }),
        OptimConfig::Sgd(Sgd { lr: 1e-2, momentum: 0.0, weight_decay: 0.1 }),
        OptimConfig::Lion(Lion { lr: 1e-3, weight_decay: 0.1, ..Lion::DEFAULT }),
    ]
    .into_iter()
}

#[test]
fn elementwise_updates_follow_the_formulas() {
    for optim in elementwise() {
        let mut param = Whole::new(&optim, 1, &[50]);
        let mut wide: Vec<(f64, [f64; 2])> = param.master.iter().map(|p| (*p as f64, [0.0; 2])).collect();
        for t in 1..20 {
            let g = values(100 + t, 50);
            param.step(optim.step(t as u64, optim.lr(), 0.5), &g, None);
            for (state, g) in wide.iter_mut().zip(&g) {
                *state = formula(&optim, t as i32, state.0, state.1, *g as f64 * 0.5);
            }
        }
        for (i, (got, want)) in param.master.iter().zip(&wide).enumerate() {
            assert!(
                (*got as f64 - want.0).abs() < 1e-6,
                "{}: element {i}: {got} against {want:?}",
                optim.name()
            );
        }
    }
}

/// Adafactor of a matrix as the paper writes it, in f64.
fn adafactor_matrix(o: &Adafactor, t: f64, rows: usize, p: &mut [f64], g: &[f64], state: &mut [f64]) {
    let columns = p.len() / rows;
    let (row, column) = state.split_at_mut(rows);
    let beta = 1.0 - t.powf(o.decay_rate);
    for (i, r) in row.iter_mut().enumerate() {
        let mean = (0..columns).map(|j| g[i * columns + j].powi(2) + o.eps).sum::<f64>() / columns as f64;
        *r = beta * *r + (1.0 - beta) * mean;
    }
    for (j, c) in column.iter_mut().enumerate() {
        let mean = (0..rows).map(|i| g[i * columns + j].powi(2) + o.eps).sum::<f64>() / rows as f64;
        *c = beta * *c + (1.0 - beta) * mean;
    }
    let mean = row.iter().sum::<f64>() / rows as f64;
    let u: Vec<f64> =
        (0..p.len()).map(|k| g[k] / (row[k / columns] * column[k % columns] / mean).sqrt()).collect();
    let rms = (u.iter().map(|u| u * u).sum::<f64>() / u.len() as f64).sqrt();
    for (p, u) in p.iter_mut().zip(&u) {
        *p = *p * (1.0 - o.lr * o.weight_decay) - o.lr * u / (rms / o.clip_threshold).max(1.0);
    }
}

#[test]
fn adafactor_follows_the_formula_over_many_row_blocks() {
    let settings = Adafactor { lr: 1e-2, weight_decay: 0.1, clip_threshold: 0.9, ..Adafactor::DEFAULT };
    let optim = OptimConfig::Adafactor(settings);
    let (rows, columns) = (300, 13);
    let mut param = Whole::new(&optim, 1, &[rows, columns]);
    let mut p: Vec<f64> = param.master.iter().map(|p| *p as f64).collect();
    let mut state = vec![0.0; rows + columns];
    for t in 1..10 {
        let g = values(100 + t, rows * columns);
        param.step(optim.step(t as u64, settings.lr, 0.25), &g, None);
        let g: Vec<f64> = g.iter().map(|g| *g as f64 * 0.25).collect();
        adafactor_matrix(&settings, t as f64, rows, &mut p, &g, &mut state);
    }
    for (i, (got, want)) in param.master.iter().zip(&p).enumerate() {
        assert!((*got as f64 - want).abs() < 1e-6, "element {i}: {got} against {want}");
    }
}

#[test]
fn a_parameter_cut_anywhere_and_updated_in_any_order_equals_the_whole() {
    for optim in elementwise() {
        let len = 40_000;
        let mut whole = Whole::new(&optim, 1, &[len]);
        let mut parts = whole.clone();
        for t in 1..4 {
            let gradient = values(t + 1, len);
            let step = optim.step(t as u64, 1e-3, 0.7);
            whole.step(step, &gradient, None);
            for range in [33..34, 34..20_001, 0..33, 20_001..len] {
                let states = parts.states.iter_mut().map(|s| Values::F32(&mut s[range.clone()])).collect();
                let master = &mut parts.master[range.clone()];
                step.apply(Span { master, states, gradient: &gradient[range], copy: None });
            }
        }
        assert_eq!(whole, parts, "{}", optim.name());
    }
}

#[test]
fn every_optimizer_gives_the_same_bits_on_any_number_of_threads_and_copies_what_it_wrote() {
    for optim in OptimConfig::ALL {
        let shape = [301, 170];
        let runs = [1, 2, 5].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut param = Whole::new(&optim, 1, &shape);
            let mut copy = vec![bf16::ZERO; param.master.len()];
            for t in 1..4 {
                let gradient = values(t + 1, param.master.len());
                let step = optim.step(t as u64, 1e-3, 0.7);
                pool.install(|| param.step(step, &gradient, Some(CopyOut::Bf16(&mut copy))));
            }
            let rounded: Vec<bf16> = param.master.iter().map(|p| bf16::from_f32(*p)).collect();
            assert_eq!(copy, rounded, "{}", optim.name());
            param
        });
        assert!(runs[0] == runs[1] && runs[0] == runs[2], "{}", optim.name());
    }
}

#[test]
fn every_optimizer_keeps_its_name_and_settings_through_json_and_refuses_unknown_keys() {
    for optim in OptimConfig::ALL {
        let mut json = serde_json::to_value(optim).unwrap();
        assert_eq!(json["kind"], optim.name());
        assert_eq!(serde_json::from_value::<OptimConfig>(json.clone()).unwrap(), optim);
        json["learning_rat"] = 1.0.into();
        assert!(
            serde_json::from_value::<OptimConfig>(json).unwrap_err().to_string().contains("learning_rat")
        );
        optim.validate().unwrap();
    }
}

#[test]
fn settings_out_of_range_are_refused_with_the_key() {
    let refused = [
        (OptimConfig::AdamW(AdamW { lr: f64::NAN, ..AdamW::DEFAULT }), "optim.lr = NaN"),
        (OptimConfig::AdamW(AdamW { eps: 0.0, ..AdamW::DEFAULT }), "optim.eps = 0"),
        (OptimConfig::AdamW(AdamW { betas: [0.9, 1.0], ..AdamW::DEFAULT }), "optim.betas"),
        (OptimConfig::Sgd(Sgd { momentum: 1.0, ..Sgd::DEFAULT }), "optim.momentum = 1"),
        (OptimConfig::Lion(Lion { weight_decay: -1.0, ..Lion::DEFAULT }), "optim.weight_decay = -1"),
        (
            OptimConfig::Adafactor(Adafactor { decay_rate: 0.1, ..Adafactor::DEFAULT }),
            "optim.decay_rate = 0.1",
        ),
    ];
    for (optim, what) in refused {
        let message = optim.validate().unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    }
}
