//! [`CardTrainer`] as what computes a run's steps.

use super::{CardTrainer, Packed};
use crate::Error;
use half::bf16;
use hearth_cuda::runtime::{self, Device};
use hearth_cuda::trainer::{Compute, Numbers, Plan, Stretch};
use hearth_memory::{Kind, Tier};
use hearth_train::optim::Step;
use hearth_train::{Accelerator, Failure, Measure, MemoryReport, Which, config, micro_batch::MicroBatch};
use hearth_weights::ModelFiles;
use std::collections::HashMap;
use std::sync::Arc;

/// Takes the plan's memory and uploads the weights.
///
/// # Errors
/// As [`CardTrainer::load`].
pub fn accelerator(
    device: &Arc<Device>,
    files: &ModelFiles,
    compute: config::Compute,
    plan: Plan,
) -> Result<Box<dyn Accelerator>, Failure> {
    Ok(match compute {
        config::Compute::Bf16 => Box::new(OnCard::<bf16>::load(device, files, plan)?),
        config::Compute::F32 | config::Compute::F16 => Box::new(OnCard::<f32>::load(device, files, plan)?),
    })
}

struct OnCard<T> {
    trainer: CardTrainer<T>,
    parameters: HashMap<String, Stretch>,
}

impl<T: Compute> OnCard<T> {
    fn load(device: &Arc<Device>, files: &ModelFiles, plan: Plan) -> Result<Self, Error> {
        let trainer = CardTrainer::load(device, files, plan)?;
        let parameters = trainer.trainer.stretches().collect();
        Ok(Self { trainer, parameters })
    }

    fn parameter(&self, name: &str) -> Result<&Stretch, Error> {
        self.parameters.get(name).ok_or_else(|| Error::Parameter { name: name.to_owned() })
    }
}

impl<T: Compute> Accelerator for OnCard<T> {
    fn step(
        &mut self,
        batches: &[MicroBatch],
        clip_norm: f64,
        rule: &dyn Fn(f32) -> Step,
    ) -> Result<Measure, Failure> {
        let batches: Vec<Packed<'_>> = batches.iter().map(Packed::from).collect();
        let rule = |gradient_scale| {
            rule(gradient_scale).adamw().expect("other optimizers are refused before the run")
        };
        let report =
            self.trainer.with(&batches, |trainer, batches| trainer.step(batches, clip_norm, rule))?;
        Ok(Measure { loss: report.loss, grad_norm: report.grad_norm })
    }

    fn loss(&mut self, batch: &MicroBatch) -> Result<f64, Failure> {
        Ok(self.trainer.with(&[batch.into()], |trainer, batches| trainer.evaluate(&batches[0]))?)
    }

    fn read(&mut self, param: &str, which: Which, first: usize, into: &mut [f32]) -> Result<(), Failure> {
        let stretch = self.parameter(param)?.clone();
        Ok(self.trainer.trainer.read(&stretch, numbers(which), first, into).map_err(Error::from)?)
    }

    fn write(&mut self, param: &str, which: Which, first: usize, values: &[f32]) -> Result<(), Failure> {
        let stretch = self.parameter(param)?.clone();
        Ok(self.trainer.trainer.write(&stretch, numbers(which), first, values).map_err(Error::from)?)
    }

    fn settle(&mut self) -> Result<(), Failure> {
        Ok(self.trainer.trainer.synchronize().map_err(Error::from)?)
    }

    fn memory(&self) -> MemoryReport {
        let needs = &self.trainer.trainer.plan().needs;
        let held = |kind| needs.bytes(Tier::Device, kind) + needs.bytes(Tier::Host, kind);
        MemoryReport {
            params_bytes: held(Kind::Weights),
            frozen_bytes: 0,
            grads_bytes: held(Kind::Gradients),
            optimizer_bytes: held(Kind::Optimizer),
        }
    }

    fn notice(&self) -> Option<String> {
        self.trainer.trainer.refusal().map(str::to_owned)
    }
}

/// AdamW's states are `m` and `v`.
fn numbers(which: Which) -> Numbers {
    match which {
        Which::Master => Numbers::Master,
        Which::State(0) => Numbers::Mean,
        Which::State(_) => Numbers::Square,
    }
}

impl<'a> From<&'a MicroBatch> for Packed<'a> {
    fn from(batch: &'a MicroBatch) -> Self {
        Self { ids: &batch.ids, targets: &batch.targets, lengths: &batch.documents }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Card(runtime::Error::NotFinite { loss, grad_norm }) => {
                Failure::NotFinite(Measure { loss, grad_norm })
            }
            Error::Card(error) if error.is_lost() => Failure::Lost(error.into()),
            other => Failure::Other(other.into()),
        }
    }
}
