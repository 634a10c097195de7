//! One configuration: its ledger and its step.

use super::Measured;
use crate::tiers::{Tiers, sharers};
use crate::training::Job;
use hearth_memory::{Ledger, Tier};
use hearth_train::plan::{Speeds, StepTime, Traffic};
use hearth_train::reduce::Assignment;
use hearth_train::{Pace, TrainConfig};
use serde::Serialize;

/// What turns a rank's traffic into time.
pub struct Clock<'a> {
    /// Ranks of the run.
    pub world_size: usize,
    measured: &'a Measured,
    /// Arithmetic of the mean sequence as a share of that of the longest, with which it is measured.
    share: f64,
    /// Tokens of a step's mean.
    tokens: f64,
}

impl<'a> Clock<'a> {
    /// For a job's data on a machine.
    ///
    /// # Errors
    /// A configuration that contradicts itself.
    pub fn new(job: &Job, world_size: usize, measured: &'a Measured) -> anyhow::Result<Self> {
        let flops = |documents: &[usize]| -> anyhow::Result<f64> {
            Ok(job.plan(world_size, documents, &Ledger::default())?.flops)
        };
        let documents: Vec<usize> =
            job.train.iter().flat_map(|sequence| sequence.documents.clone()).collect();
        let longest = job.largest_micro_batch()[0];
        let sequences = job.train.len().max(1) as f64;
        let unit = job.config.objective.objective().sequences_per_unit();
        let mean = documents.iter().sum::<usize>() as f64 / sequences;
        Ok(Self {
            world_size,
            measured,
            share: flops(&documents)? / sequences / flops(&[longest])?,
            tokens: mean * (job.config.global_batch * unit) as f64,
        })
    }

    /// The speeds as they are for a rank of this traffic, whose micro-batches take `pace`.
    fn speeds(
        &self,
        traffic: &Traffic,
        pace: Pace,
        blocks: usize,
        config: &TrainConfig,
    ) -> anyhow::Result<Speeds> {
        let each = Assignment::new(config, self.world_size)?.each() as f64;
        let seconds = each * pace.micro_batch(blocks, config).as_secs_f64();
        let disk = self.measured.disk;
        let of_disk = |speed: fn(&super::speeds::Disk) -> f64| disk.as_ref().map_or(f64::INFINITY, speed);
        Ok(Speeds {
            flops: traffic.flops / seconds,
            disk_read: of_disk(|disk| disk.read),
            disk_write: of_disk(|disk| disk.write),
            disk_both: of_disk(|disk| disk.both),
            memory: self.measured.memory,
            link: self.measured.link.unwrap_or(f64::INFINITY),
        })
    }
}

/// What a configuration holds, and how long its step takes.
pub struct Forecast {
    /// One rank's, with what it held over a step.
    pub ledger: Ledger,
    /// What was reckoned with.
    pub speeds: Speeds,
    /// The step.
    pub time: StepTime,
    /// Tokens per second.
    pub tok_s: f64,
}

/// Most that lies in each tier in one phase of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PhasePeak {
    /// The phase.
    pub phase: String,
    /// Bytes on the device of each rank.
    pub device: u64,
    /// Bytes in the machine's host memory.
    pub host: u64,
    /// Bytes on its disk.
    pub nvme: u64,
}

impl Forecast {
    /// Of a job whose parts take `pace` on its largest micro-batch, in a new ledger without limits.
    ///
    /// # Errors
    /// A configuration that contradicts itself.
    pub fn of(job: &Job, clock: &Clock<'_>, pace: Pace, ledger: Ledger) -> anyhow::Result<Self> {
        let mut traffic = job.plan(clock.world_size, &job.largest_micro_batch(), &ledger)?;
        let speeds = clock.speeds(&traffic, pace, job.model().num_layers, &job.config)?;
        traffic.flops *= clock.share;
        let time = traffic.time(&speeds, job.here());
        Ok(Self { ledger, speeds, time, tok_s: clock.tokens / time.step_s })
    }

    /// The peaks, beside the job's budgets.
    pub fn tiers(&self, job: &Job) -> Tiers {
        let mut tiers = Tiers::of(&self.ledger, job.here());
        let limit =
            |tier| job.budget.limit(tier).map(|limit| limit.saturating_mul(sharers(tier, job.here())));
        tiers.device.budget_bytes = limit(Tier::Device);
        tiers.host.budget_bytes = limit(Tier::Host);
        tiers.nvme.budget_bytes = limit(Tier::Nvme);
        tiers
    }

    /// The peaks of each phase, over all micro-batches, in the order in which they come.
    pub fn by_phase(&self, here: usize) -> Vec<PhasePeak> {
        let mut phases: Vec<PhasePeak> = Vec::new();
        for moment in self.ledger.timeline().iter().filter(|moment| moment.label != "end") {
            let bytes = |tier| moment.held.total(tier) * sharers(tier, here);
            let at = phases.iter().position(|phase| phase.phase == moment.label).unwrap_or_else(|| {
                phases.push(PhasePeak { phase: moment.label.clone(), device: 0, host: 0, nvme: 0 });
                phases.len() - 1
            });
            let phase = &mut phases[at];
            phase.device = phase.device.max(bytes(Tier::Device));
            phase.host = phase.host.max(bytes(Tier::Host));
            phase.nvme = phase.nvme.max(bytes(Tier::Nvme));
        }
        phases
    }

    /// Most that one rank holds on the device and in host memory at once.
    pub fn main_memory(&self) -> u64 {
        let timeline = self.ledger.timeline();
        let both = timeline.iter().map(|m| m.held.total(Tier::Device) + m.held.total(Tier::Host));
        both.max().unwrap_or(0)
    }
}
