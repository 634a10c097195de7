//! Whole training steps of a small model: against the slopes of its own loss, and wherever its state lies.

use super::values::{near, numbers, same};
use super::{Failure, On};
use half::bf16;
use hearth_cuda::decoder::Shape;
use hearth_cuda::decoder::weights::{HostMatrix, Source};
use hearth_cuda::runtime::Error;
use hearth_cuda::trainer::{Compute, MicroBatch, Model, Place, Plan, Report, Settings, Trainer};
use hearth_kernels::cpu::adamw::AdamWRule;
use std::borrow::Cow;
use std::collections::BTreeMap;

const ROWS: usize = 21;
/// So that the documents end within tiles.
const DOCUMENTS: [usize; 3] = [5, 13, 3];
const HALF: usize = 8;

type Values = BTreeMap<String, Vec<f32>>;

fn model() -> Model {
    let shape = Shape {
        hidden: 40,
        inner: 56,
        heads: 4,
        kv_heads: 2,
        head_dim: 2 * HALF,
        vocab: 53,
        eps: 1e-5,
        windows: vec![0, 7],
    };
    Model { shape, tied: true, qkv_bias: true, out_bias: true, mlp_bias: true, qk_norm: true }
}

/// The weights of the first step, or others.
struct Weights<'a>(Option<&'a Values>);

impl Weights<'_> {
    fn vector(&self, name: &str, end: &str, len: usize) -> Vec<f32> {
        let name = format!("{name}.{end}");
        if let Some(values) = self.0 {
            return values[&name].clone();
        }
        let seed = name.bytes().fold(7, |seed, byte| seed * 31 + u64::from(byte));
        let (middle, scale) = if name.contains("norm") { (1.0, 0.1) } else { (0.0, 0.2) };
        numbers::<f32>(seed % 1009, len).iter().map(|x| middle + scale * x).collect()
    }
}

impl Source<Error> for Weights<'_> {
    fn matrix(&mut self, name: &str, [rows, columns]: [usize; 2]) -> Result<HostMatrix<'_>, Error> {
        Ok(HostMatrix::F32(Cow::Owned(self.vector(name, "weight", rows * columns))))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        Ok(Some(self.vector(name, "weight", len)))
    }

    fn bias(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        Ok(Some(self.vector(name, "bias", len)))
    }
}

/// What a trainer of `T` with state at these places makes of a few documents.
fn with<T: Compute, R>(
    on: &On,
    (places, recompute): (&[Place], bool),
    weights: Option<&Values>,
    run: impl FnOnce(&mut Trainer<T>, MicroBatch<'_>) -> Result<R, Failure>,
) -> Result<R, Failure> {
    let settings = Settings { rows: ROWS, logit_rows: 8, recompute };
    let plan = Plan::of::<T>(model(), settings, places.to_vec())?;
    let mut trainer = Trainer::<T>::new(on.stream.device(), plan, &mut Weights(weights))?;
    let vocab = model().shape.vocab;
    let ids: Vec<u32> = (0..ROWS).map(|i| ((i * i + 3 * i) % vocab) as u32).collect();
    let targets: Vec<i32> = (0..ROWS).map(|i| if i % 5 == 4 { -1 } else { (i * 7 % vocab) as i32 }).collect();
    let angles = numbers::<f32>(3, ROWS * HALF);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let batch = MicroBatch { ids: &ids, targets: &targets, documents: &DOCUMENTS, cos: &cos, sin: &sin };
    run(&mut trainer, batch)
}

const CARD: (&[Place], bool) = (&[Place::Card; 4], false);

/// Loss and gradients of the mean loss.
fn gradients<T: Compute>(
    trainer: &mut Trainer<T>,
    batch: MicroBatch<'_>,
) -> Result<(Report, Values), Failure> {
    let (report, mut all) = (trainer.gradients_of(&[batch])?, Values::new());
    trainer.read_gradients(&mut |name, values| {
        let mean = values.iter().map(|g| g / report.trained as f32).collect();
        all.insert(name.to_owned(), mean);
    })?;
    Ok((report, all))
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// Along each parameter's own gradient the loss rises by the gradient's norm per step, to both sides.
pub fn slopes(on: &On) -> Result<(), Failure> {
    let (report, slopes) = with::<f32, _>(on, CARD, None, gradients)?;
    let mut first = Values::new();
    with::<f32, _>(on, CARD, None, |trainer, _| {
        Ok(trainer.read_parameters(&mut |name, values| {
            first.insert(name.to_owned(), values.to_vec());
        })?)
    })?;
    let squares: f64 = slopes.values().map(|values| norm(values).powi(2)).sum();
    near("the norm of all gradients", &[report.grad_norm as f32], &[squares.sqrt() as f32], 1e-5)?;
    for (name, slope) in &slopes {
        let length = norm(slope);
        let reach = 1e-2;
        let loss_at = |side: f64| {
            let mut moved = first.clone();
            let values = moved.get_mut(name).expect("every parameter has a gradient");
            values.iter_mut().zip(slope).for_each(|(w, g)| *w += (side * reach / length) as f32 * g);
            with::<f32, _>(on, CARD, Some(&moved), |trainer, batch| {
                Ok(trainer.evaluate(&batch)? / batch.trained() as f64)
            })
        };
        let measured = (loss_at(1.0)? - loss_at(-1.0)?) / (2.0 * reach);
        let ratio = (measured / length) as f32;
        near(&format!("the slope of {name} by its loss"), &[ratio], &[1.0], 1e-2)?;
    }
    Ok(())
}

/// 16 bits beside 32: whole gradients, by the length of what lies between them.
pub fn rounded(on: &On) -> Result<(), Failure> {
    let (wide, want) = with::<f32, _>(on, CARD, None, gradients)?;
    let (narrow, got) = with::<bf16, _>(on, CARD, None, gradients)?;
    near("the loss in bf16", &[narrow.loss as f32], &[wide.loss as f32], 1e-2)?;
    let all = |values: &Values| values.values().flatten().copied().collect::<Vec<f32>>();
    let (got, want) = (all(&got), all(&want));
    let between: Vec<f32> = got.iter().zip(&want).map(|(g, w)| g - w).collect();
    near("gradients in bf16, apart", &[(norm(&between) / norm(&want)) as f32], &[0.0], 6e-2)
}

/// Steps whose state is the card's, the host's, and streamed with blocks computed again.
pub fn layouts(on: &On) -> Result<(), Failure> {
    let steps = |how| {
        with::<bf16, _>(on, how, None, |trainer, batch| {
            trainer.step(&[batch, batch], 1.0, rule)?;
            trainer.step(&[batch], 1.0, rule)?;
            let mut all = Vec::new();
            trainer.read_parameters(&mut |_, values| all.extend_from_slice(values))?;
            Ok(all)
        })
    };
    let want = steps(CARD)?;
    let host = [Place::Host, Place::Card, Place::Host, Place::Card];
    same("parameters with half of the state on the host", &steps((&host, false))?, &want)?;
    let streamed = [Place::Host, Place::Streamed, Place::Streamed, Place::Host];
    same("parameters with streamed blocks", &steps((&streamed, true))?, &want)
}

fn rule(gradient_scale: f32) -> AdamWRule {
    AdamWRule {
        keep: 0.999,
        one_minus_beta1: 0.1,
        beta2: 0.95,
        one_minus_beta2: 0.05,
        step_size: 1e-2,
        root_correction2: 0.7,
        eps: 1e-8,
        gradient_scale,
    }
}
