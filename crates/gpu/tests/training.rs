//! Models trained through the card's launches against transformers' references, with the driver that runs kernels on the CPU.

use half::bf16;
use hearth_cuda::runtime::{Device, Libraries};
use hearth_cuda::trainer::{Compute, Place, Plan, Settings};
use hearth_cuda_stand_in::StandIn;
use hearth_gpu::training::{CardTrainer, Documents, model_of};
use hearth_kernels::cpu::adamw::AdamWRule;
use hearth_memory::{Budget, Kind, Ledger, Tier};
use hearth_weights::ModelFiles;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity").join(name)
}

fn files(name: &str) -> ModelFiles {
    hearth_weights::open(&case(name).join("model")).expect(name)
}

fn card(driver: &StandIn) -> Arc<Device> {
    Device::open_with(0, &Ledger::new(Budget::UNLIMITED), &Libraries::from(driver.path())).expect("a card")
}

/// What transformers says of a model: both sequences, the loss over them, logits and gradients.
struct Reference {
    documents: Documents,
    loss: f64,
    logits: Vec<f32>,
    gradients: BTreeMap<String, Vec<f32>>,
}

impl Reference {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(case(name).join("reference.safetensors")).expect(name);
        let tensors = SafeTensors::deserialize(&bytes).expect("a reference");
        let of = |name: &str| tensors.tensor(name).expect("it is there").data().to_vec();
        let floats = |name: &str| -> Vec<f32> {
            of(name).chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
        };
        let whole = |name: &str| -> Vec<i64> {
            of(name).chunks(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes"))).collect()
        };
        let (mut documents, mut logits) = (Documents::default(), Vec::new());
        for i in 0..2 {
            let ids: Vec<u32> = whole(&format!("input_ids.{i}")).iter().map(|&id| id as u32).collect();
            let labels: Vec<i32> = whole(&format!("labels.{i}")).iter().map(|&id| id as i32).collect();
            documents.push(&ids, &labels);
            logits.extend(floats(&format!("logits.{i}")));
        }
        let gradients = tensors.names().into_iter().filter_map(|name| {
            name.strip_prefix("grad.").map(|parameter| (parameter.to_owned(), floats(name)))
        });
        let gradients = gradients.collect();
        Self { documents, loss: f64::from(floats("loss")[0]), logits, gradients }
    }
}

/// `‖a − b‖ / ‖b‖`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (difference / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

fn settings(rows: usize) -> Settings {
    Settings { rows, logit_rows: 16, recompute: false }
}

fn trainer<T: Compute>(card: &Arc<Device>, files: &ModelFiles, plan: Plan) -> CardTrainer<T> {
    CardTrainer::load(card, files, plan).expect("it fits")
}

/// Loss, logits and gradients of a model in `T`, no further from transformers' than these.
fn holds<T: Compute>(name: &str, loss: f64, logits: f64, gradient: f64) {
    let (files, driver, want) = (files(name), StandIn::new(), Reference::read(name));
    let settings = settings(want.documents.ids.len());
    let plan = Plan::with_share::<T>(model_of(&files.config), settings, 0.0).expect("a plan");
    let mut trainer = trainer::<T>(&card(&driver), &files, plan);
    let got = trainer.logits(&want.documents).expect("it works");
    assert!(distance(&got, &want.logits) <= logits, "{name}: logits {:e}", distance(&got, &want.logits));
    let report = trainer.gradients_of(std::slice::from_ref(&want.documents)).expect("it works");
    let off = (report.loss / want.loss - 1.0).abs();
    assert!(off <= loss, "{name}: loss {off:e}");
    let mut seen = 0;
    let count = report.trained as f32;
    trainer
        .trainer()
        .read_gradients(&mut |parameter, got| {
            let mean: Vec<f32> = got.iter().map(|g| g / count).collect();
            let off = distance(&mean, &want.gradients[parameter]);
            assert!(off <= gradient, "{name}: {parameter} {off:e}");
            seen += 1;
        })
        .expect("it works");
    assert_eq!(seen, want.gradients.len(), "{name}: every gradient");
}

#[test]
fn f32_loss_logits_and_every_gradient_are_transformers_to_1e_4_whatever_the_family_has() {
    for name in [
        "llama-gqa-tied",
        "llama-biases",
        "llama-mha",
        "llama-odd-widths-bf16",
        "llama-rope-yarn",
        "mistral-window",
        "qwen2-tied-bin",
        "qwen3",
    ] {
        holds::<f32>(name, 1e-5, 1e-4, 1e-4);
    }
}

#[test]
fn bf16_stays_within_its_rounding() {
    for name in ["llama-gqa-tied", "llama-mha", "qwen3"] {
        // Eight bits of mantissa: 2⁻⁸ a rounding, a few roundings one behind another.
        holds::<bf16>(name, 1e-2, 3e-2, 6e-2);
    }
}

fn rule(t: u64) -> impl Fn(f32) -> AdamWRule {
    let (lr, beta1, beta2) = (1e-2, 0.9f64, 0.95f64);
    let correction = move |beta: f64| 1.0 - beta.powi(t as i32);
    move |gradient_scale| AdamWRule {
        keep: 1.0 - 1e-3,
        one_minus_beta1: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        one_minus_beta2: (1.0 - beta2) as f32,
        step_size: (lr / correction(beta1)) as f32,
        root_correction2: correction(beta2).sqrt() as f32,
        eps: 1e-8,
        gradient_scale,
    }
}

/// Three steps of two micro-batches: what each said and the parameters after them, and what the ledger saw beside the plan.
fn run<T: Compute>(files: &ModelFiles, plan: Plan, policy: i64) -> (Vec<(u64, u64)>, Vec<u32>) {
    let driver = StandIn::new();
    driver.set("policy", policy);
    driver.set("schedule", policy);
    let card = card(&driver);
    let needs = plan.needs.clone();
    let mut trainer = trainer::<T>(&card, files, plan);
    let vocab = files.config.vocab_size;
    let documents = |seed: usize| {
        let (mut batch, lengths) = (Documents::default(), [5, 11, 3]);
        for (i, length) in lengths.into_iter().enumerate() {
            let ids: Vec<u32> = (0..length).map(|j| ((seed * 7 + i * 5 + j * 3) % vocab) as u32).collect();
            batch.push(&ids, &ids.iter().map(|&id| id as i32).collect::<Vec<_>>());
        }
        batch
    };
    let mut reports = Vec::new();
    for t in 1..=3 {
        let batches = [documents(1), documents(2)];
        let report = trainer.step(&batches, 1.0, rule(t)).expect("it works");
        reports.push((report.loss.to_bits(), report.grad_norm.to_bits()));
    }
    let first = f64::from_bits(reports[0].0);
    assert!(f64::from_bits(reports[2].0) < first, "it learns");
    let mut parameters = Vec::new();
    trainer
        .trainer()
        .read_parameters(&mut |_, values| parameters.extend(values.iter().map(|x| x.to_bits())))
        .expect("it works");
    for tier in [Tier::Device, Tier::Host] {
        for kind in Kind::ALL {
            let held = card.ledger().peak_by_kind(tier).get(&kind).copied().unwrap_or_default();
            assert_eq!(held, needs.bytes(tier, kind), "{tier} {kind}: the ledger beside the plan");
        }
    }
    (reports, parameters)
}

/// Whatever lies on the host, is streamed or computed again.
fn layouts_agree<T: Compute>(name: &str) {
    let files = files(name);
    let model = || model_of(&files.config);
    let whole = Plan::with_share::<T>(model(), settings(19), 0.0).expect("a plan");
    let units = whole.places.len();
    let want = run::<T>(&files, whole, 0);
    let again = Settings { recompute: true, ..settings(24) };
    let half = Plan::with_share::<T>(model(), settings(19), 0.5).expect("a plan");
    assert!(half.places.contains(&Place::Card) && half.places.contains(&Place::Host), "some of each");
    let mut streamed = vec![Place::Streamed; units];
    streamed[0] = Place::Host;
    streamed[units - 1] = Place::Host;
    let plans = [half, Plan::of::<T>(model(), again, streamed).expect("a plan")];
    for (plan, policy) in plans.into_iter().zip([1, 3]) {
        let places = plan.places.clone();
        assert!(run::<T>(&files, plan, policy) == want, "{name}: {places:?}");
    }
}

#[test]
fn steps_have_the_same_bits_wherever_the_state_lies_and_take_what_the_plan_says() {
    layouts_agree::<f32>("qwen3");
    layouts_agree::<bf16>("llama-gqa-tied");
}

#[test]
fn a_plan_fits_its_budget_or_says_what_is_missing() {
    let model = || model_of(&files("llama-mha").config);
    let settings = Settings { recompute: true, ..settings(16) };
    let whole = Plan::with_share::<bf16>(model(), settings, 0.0).expect("a plan");
    let all = whole.needs.total(Tier::Device);
    let within = |device, host| Plan::within::<bf16>(model(), settings, device, host);
    assert_eq!(within(all, 0).expect("it fits").places, whole.places, "nothing moves without need");
    let tight = within(all - 1, u64::MAX).expect("some of it moves");
    assert!(tight.places.contains(&Place::Host) && tight.needs.total(Tier::Device) < all);
    let refused = within(1000, u64::MAX).expect_err("too little").to_string();
    assert!(refused.starts_with("device tier: needs "), "{refused}");
    let refused = within(all - 1, 10).expect_err("too little").to_string();
    assert!(refused.starts_with("host tier: needs "), "{refused}");
}

#[test]
fn what_does_not_fit_is_a_sentence_and_a_lost_card_ends_the_step() {
    let (files, driver) = (files("llama-mha"), StandIn::new());
    let plan = Plan::with_share::<f32>(model_of(&files.config), settings(8), 0.0).expect("a plan");
    let small = Ledger::new(Budget::device(plan.needs.total(Tier::Device) - 1));
    let card_of =
        |ledger: &Ledger| Device::open_with(0, ledger, &Libraries::from(driver.path())).expect("a card");
    let refused =
        CardTrainer::<f32>::load(&card_of(&small), &files, plan.clone()).err().expect("a byte is missing");
    assert!(refused.to_string().starts_with("device tier: needs "), "{refused}");
    let mut trainer = trainer::<f32>(&card(&driver), &files, plan);
    let mut sentence = |ids: &[u32], label: i32| {
        let mut batch = Documents::default();
        batch.push(ids, &vec![label; ids.len()]);
        trainer.step(&[batch], 1.0, rule(1)).expect_err("refused").to_string()
    };
    assert_eq!(sentence(&[1; 9], 1), "train: rows is 9, 1 to 8 is needed");
    assert_eq!(sentence(&[1, 37], 1), "train: a token is 37, below 37 is needed");
    assert_eq!(sentence(&[1, 2], 40), "train: a token is 40, below 37 is needed");
    assert_eq!(sentence(&[1, 2], -1), "train: trained tokens is 0, at least 1 is needed");
    driver.set("launches", 20);
    let lost = sentence(&[1, 2, 3], 1);
    assert!(lost.starts_with("the card was lost at cu"), "{lost}");
}

#[test]
fn a_runs_offload_is_where_its_units_begin_and_budgets_move_more() {
    use hearth_gpu::training::planning;
    use hearth_train::{Offload, Place as Tier, TrainConfig};
    let config = files("llama-mha").config;
    let run = |[params, grads, optim]: [Tier; 3], ratio| TrainConfig {
        offload: Offload { params, grads, optim, ratio, ..Offload::default() },
        ..TrainConfig::default()
    };
    let (card, host, all) = (Tier::Device, Tier::Cpu, u64::MAX);
    let places = |tiers, ratio, device| {
        let plan = planning::plan(&run(tiers, ratio), &config, 8, device, all).expect("it fits");
        assert!(plan.needs.total(hearth_memory::Tier::Device) <= device);
        plan.places
    };
    use Place::{Card, Host, Streamed};
    assert_eq!(places([card; 3], 1.0, all), [Card; 4]);
    assert_eq!(places([card, host, host], 1.0, all), [Host; 4]);
    assert_eq!(places([card, host, host], 0.3, all), [Card, Host, Card, Card]);
    assert_eq!(places([host; 3], 1.0, all), [Host, Streamed, Streamed, Host]);
    let least = planning::plan(&run([host; 3], 1.0), &config, 8, all, all).expect("it fits");
    let least = least.needs.total(hearth_memory::Tier::Device);
    // Two slots take what two blocks do: streaming them would gain nothing.
    assert_eq!(places([card; 3], 1.0, least), [Host; 4]);
    let sentence = |tiers, ratio| {
        planning::plan(&run(tiers, ratio), &config, 8, all, all).expect_err("refused").to_string()
    };
    let cases = [
        (sentence([card, card, host], 1.0), "offload.grads = \"device\" is not done on a card"),
        (sentence([card, host, card], 1.0), "offload.grads = \"cpu\" is not done on a card"),
        (sentence([host, card, card], 1.0), "offload.params = \"cpu\" is not done on a card"),
        (sentence([host; 3], 0.5), "offload.ratio = 0.5 is not done on a card"),
        (sentence([Tier::Nvme, host, host], 1.0), "offload.params = \"nvme\" is not done on a card"),
    ];
    for (said, words) in cases {
        assert!(said.starts_with(words), "{said}");
    }
}
