//! What a recipe's run is made of, before it is divided among ranks, and each rank's part of it.

use crate::open::Model;
use crate::recipe::Recipe;
use crate::resolve;
use crate::ui::{Ui, bytes};
use burn::tensor::Device;
use hearth_collective::Ordered;
use hearth_data::dataset::Stats;
use hearth_data::{Loader, Sequence};
use hearth_memory::{Budget, Ledger, Size, Tier};
use hearth_train::plan::{Subject, Traffic, most_late, plan};
use hearth_train::reduce::Assignment;
use hearth_train::sizes::{DEEP_RING, RING};
use hearth_train::{
    Activations, Companion, Observer, Offload, Pace, Place, Recompute, Setup, TrainConfig, Trainer,
};
use hearth_weights::{ModelFiles, TensorSource};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// What a run learns from what, whatever computes it.
pub struct Material {
    /// What the trainer is told.
    pub config: TrainConfig,
    /// Sequences that are trained on.
    pub train: Arc<[Sequence]>,
    /// Sequences that are only evaluated; may be empty.
    pub validation: Arc<[Sequence]>,
    /// What was read.
    pub stats: Stats,
    /// The model.
    pub files: Arc<ModelFiles>,
    /// What goes beside the weights in checkpoints.
    pub companions: Vec<Companion>,
}

impl Material {
    /// Reads the data and resolves the recipe.
    ///
    /// # Errors
    /// Data that cannot be read or that the method does not take, and contradictions.
    pub fn read(recipe: &Recipe, model: Model, ui: &Ui) -> anyhow::Result<Self> {
        resolve::method_takes_data(recipe)?;
        let dataset = resolve::dataset(recipe, model.files.config.vocab_size);
        let data = hearth_data::dataset::load(&dataset, model.tokenizer.as_ref(), model.template.as_ref())?;
        data.stats.warnings.iter().for_each(|warning| ui.note(warning));
        let train: Arc<[Sequence]> = data.train.into();
        let loader = Loader::new(train.clone(), recipe.train.seed, recipe.train.global_batch)?;
        Ok(Self {
            config: resolve::training(recipe, loader.steps_per_epoch(), &*model.files.tensors)?,
            companions: hearth_train::companions(&model.files)?,
            validation: data.val.into(),
            stats: data.stats,
            files: Arc::new(model.files),
            train,
        })
    }

    /// Lengths of the documents of a micro-batch that no other exceeds.
    pub fn largest_micro_batch(&self) -> Vec<usize> {
        largest_micro_batch(&self.config, &self.train, &self.validation)
    }
}

fn largest_micro_batch(config: &TrainConfig, train: &[Sequence], validation: &[Sequence]) -> Vec<usize> {
    let all = train.iter().chain(validation);
    let longest = all.map(|sequence| sequence.ids.len()).max().unwrap_or(0);
    vec![longest; config.micro_batch * config.objective.objective().sequences_per_unit()]
}

/// Everything that decides what a run computes. Clones share the model's files and the data.
#[derive(Clone)]
pub struct Job {
    /// What every rank's trainer is told.
    pub config: TrainConfig,
    /// What one rank may hold.
    pub budget: Budget,
    /// Sequences that are trained on.
    pub train: Arc<[Sequence]>,
    /// Sequences that are only evaluated; may be empty.
    pub validation: Arc<[Sequence]>,
    /// What was read.
    pub stats: Stats,
    files: Arc<ModelFiles>,
    companions: Vec<Companion>,
    device: Device,
    /// What activations take; nothing while it was not measured.
    pub activations: Activations,
    /// Ranks that share host memory and disk.
    here: usize,
}

impl Job {
    /// Reads the data and resolves the recipe for `world_size` ranks, `here` of them on this machine. What activations take
    /// is measured on the heap of the whole process: nothing else may run meanwhile.
    ///
    /// # Errors
    /// As [`Job::open`], and budgets that do not hold the run.
    pub fn new(
        recipe: &Recipe,
        model: Model,
        world_size: usize,
        here: usize,
        ui: &Ui,
    ) -> anyhow::Result<Self> {
        let mut job = Self::open(recipe, model, world_size, here, ui)?;
        job.activations = job.measure_activations()?.0;
        job.use_spare_memory(world_size)?;
        job.check_budget(world_size)?;
        Ok(job)
    }

    /// The same without a look at whether the budgets hold it; activations count as nothing until they are measured.
    ///
    /// # Errors
    /// Data that cannot be read or that the method does not take, a batch that does not divide among the ranks, and
    /// other contradictions.
    pub fn open(
        recipe: &Recipe,
        model: Model,
        world_size: usize,
        here: usize,
        ui: &Ui,
    ) -> anyhow::Result<Self> {
        let Material { config, train, validation, stats, files, companions } =
            Material::read(recipe, model, ui)?;
        Assignment::new(&config, world_size).map_err(|e| crate::exit::usage(e.to_string()))?;
        let job = Self {
            device: hearth_model::device::open(&recipe.model.device)
                .map_err(|e| crate::exit::usage(e.to_string()))?,
            budget: resolve::budget(recipe),
            activations: Activations::default(),
            here: 1,
            config,
            train,
            validation,
            stats,
            files,
            companions,
        };
        Ok(job.shared_by(here))
    }

    /// What the activations of the largest micro-batch take, and how long the model's parts take on it.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn measure_activations(&self) -> anyhow::Result<(Activations, Pace)> {
        let arch = hearth_model::architecture(&self.files.config)?;
        let (tensors, documents) = (&*self.files.tensors, self.largest_micro_batch());
        Ok(Activations::measure_with_pace(&*arch, tensors, &self.config, &self.device, &documents)?)
    }

    /// The same where `here` ranks share the machine's host memory and disk.
    fn shared_by(mut self, here: usize) -> Self {
        let share = |size: Size| Size(size.bytes() / here as u64);
        self.budget.host = self.budget.host.map(share);
        self.budget.nvme = self.budget.nvme.map(share);
        self.here = here;
        self
    }

    /// Lengths of the documents of a micro-batch that no other exceeds.
    pub fn largest_micro_batch(&self) -> Vec<usize> {
        largest_micro_batch(&self.config, &self.train, &self.validation)
    }

    /// Spends host memory that nothing else needs on speed: a deeper ring between the disk and the update, then units that
    /// are updated late, as many as are worth it.
    ///
    /// # Errors
    /// A configuration that contradicts itself.
    pub fn use_spare_memory(&mut self, world_size: usize) -> anyhow::Result<()> {
        let documents = self.largest_micro_batch();
        if self.config.offload.optim != Place::Nvme {
            return Ok(());
        }
        let plain = Offload { ring: RING, late: 0, ..self.config.offload.clone() };
        let most = self.subject(world_size, &documents, most_late)?;
        for late in (0..=most).rev() {
            self.config.offload = Offload { ring: DEEP_RING, late, ..plain.clone() };
            let needed = Ledger::default();
            self.plan(world_size, &documents, &needed)?;
            if !self.short(&needed).contains(&Tier::Host) {
                return Ok(());
            }
        }
        self.config.offload = plain;
        Ok(())
    }

    /// What one rank of `world_size` holds, in `ledger`, and what its step moves, if its micro-batches were `documents`.
    ///
    /// # Errors
    /// A configuration that contradicts itself, a budget of `ledger` that does not hold the run.
    pub fn plan(&self, world_size: usize, documents: &[usize], ledger: &Ledger) -> anyhow::Result<Traffic> {
        self.subject(world_size, documents, |subject| plan(subject, ledger))
    }

    /// Asks the planner about this job.
    fn subject<T>(
        &self,
        world: usize,
        documents: &[usize],
        ask: impl FnOnce(&Subject<'_>) -> Result<T, hearth_train::Error>,
    ) -> anyhow::Result<T> {
        Ok(ask(&Subject {
            arch: &*hearth_model::architecture(&self.files.config)?,
            weights: &*self.files.tensors,
            config: &self.config,
            world,
            activations: self.activations,
            documents,
        })?)
    }

    /// Refuses budgets that do not hold the run on `world_size` ranks, in a sentence with each tier that is too small,
    /// the smallest size that works, and what else would help.
    fn check_budget(&self, world_size: usize) -> anyhow::Result<()> {
        if self.budget == Budget::UNLIMITED {
            return Ok(());
        }
        let needed = Ledger::default();
        self.plan(world_size, &self.largest_micro_batch(), &needed)?;
        self.shortage(&needed).map_or(Ok(()), |sentence| Err(anyhow::anyhow!(sentence)))
    }

    /// Tiers of which a rank that holds this needs more than its budget.
    pub fn short(&self, needed: &Ledger) -> Vec<Tier> {
        let short = |tier: &Tier| self.budget.limit(*tier).is_some_and(|limit| needed.peak(*tier) > limit);
        Tier::ALL.into_iter().filter(short).collect()
    }

    /// Each tier that is too small for what a rank needs, the smallest size that works, and what else would help; nothing
    /// if the budgets hold it.
    pub fn shortage(&self, needed: &Ledger) -> Option<String> {
        let short = self.short(needed).into_iter();
        let sentences: Vec<String> = short.map(|tier| self.too_small(tier, needed.peak(tier))).collect();
        (!sentences.is_empty()).then(|| sentences.join("; "))
    }

    /// What to do about a tier of which one rank needs so many bytes.
    fn too_small(&self, tier: Tier, needed: u64) -> String {
        let ranks = if tier == Tier::Device { 1 } else { self.here as u64 };
        let limit = Size(self.budget.limit(tier).unwrap_or(u64::MAX).saturating_mul(ranks));
        // What activations take is measured anew in every run, and varies a little with how threads meet.
        let margin = if tier == Tier::Device { needed / 64 } else { 0 };
        let enough = rounded_up((needed + margin).saturating_mul(ranks));
        let whose = match (tier, ranks) {
            (Tier::Device, _) => "each rank".into(),
            (_, 1) => "the run".into(),
            _ => format!("{ranks} ranks together"),
        };
        let knobs = knobs(tier, &self.config, self.here, format!("memory.{tier} = \"{enough}\""));
        format!("{tier} tier: {whose} will need {enough}, memory.{tier} is {limit}; what would help: {knobs}")
    }

    /// The model's configuration.
    pub fn model(&self) -> &hearth_weights::ModelConfig {
        &self.files.config
    }

    /// Ranks that share the machine.
    pub fn here(&self) -> usize {
        self.here
    }

    /// sha256 of what the trainer is told: the same on every rank.
    pub fn config_sha256(&self) -> String {
        let config = TrainConfig { peak_flops: None, ..self.config.clone() };
        hex(Sha256::digest(serde_json::to_vec(&config).expect("a plain struct serialises")))
    }

    /// sha256 of the model: its configuration, every tensor's name, shape and format, and the values of its vectors.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn model_sha256(&self) -> anyhow::Result<String> {
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&self.files.hf_config).expect("a JSON map serialises"));
        for tensor in self.files.tensors.tensors() {
            hash.update(format!("{}{:?}{}", tensor.name, tensor.shape, tensor.format.name()));
            if tensor.shape.len() == 1 {
                hash.update(self.files.tensors.bytes(&tensor.name)?);
                self.files.tensors.release(&tensor.name);
            }
        }
        Ok(hex(hash.finalize()))
    }

    /// sha256 of every token and label.
    pub fn data_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for sequence in self.train.iter().chain(self.validation.iter()) {
            hash.update((sequence.ids.len() as u64).to_le_bytes());
            sequence.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
            sequence.labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
        }
        hex(hash.finalize())
    }

    /// One rank's trainer; with an observer of what resuming has to say it stands where the newest checkpoint left it.
    /// The model's files are let go of once every rank's trainer is made.
    ///
    /// # Errors
    /// A model that cannot be read, a budget that does not hold the run (in words that say what would help), a
    /// checkpoint directory that holds another run or, to resume, none.
    pub fn trainer(self, comm: Ordered, resume: Option<&mut dyn Observer>) -> anyhow::Result<Trainer> {
        let setup = Setup {
            arch: hearth_model::architecture(&self.files.config)?,
            weights: &*self.files.tensors,
            loader: Loader::new(self.train.clone(), self.config.seed, self.config.global_batch)?,
            validation: &self.validation,
            device: self.device.clone(),
            comm,
            ledger: Ledger::new(self.budget),
            activations: self.activations,
            companions: self.companions.clone(),
        };
        let config = self.config.clone();
        let trainer = match resume {
            Some(observer) => Trainer::resume(setup, config, observer),
            None => Trainer::new(setup, config),
        };
        trainer.map_err(|e| explain(e, &self.config, self.here))
    }
}

/// An error of a trainer of which `here` share a machine; a budget too small is told with what would help.
pub fn explain(error: hearth_train::Error, config: &TrainConfig, here: usize) -> anyhow::Error {
    let hearth_train::Error::Memory(hearth_memory::Error::OverBudget { tier, needed, free, limit }) = &error
    else {
        return error.into();
    };
    let whose = match tier {
        Tier::Device => "each rank's memory.device".to_owned(),
        _ if here > 1 => format!("memory.{tier} shared by {here} ranks"),
        _ => format!("memory.{tier}"),
    };
    let (needed, free, limit) = (bytes(*needed), bytes(*free), bytes(*limit));
    anyhow::anyhow!(
        "{tier} tier: needs {needed} more, {free} of {limit} ({whose}) are free; what would help: {}",
        knobs(*tier, config, here, format!("a larger memory.{tier}"))
    )
}

/// What would make a tier hold the run: `enough` of it, or less to hold, the cheapest in time first.
fn knobs(tier: Tier, config: &TrainConfig, here: usize, enough: String) -> String {
    let o = &config.offload;
    let at = |place: Place| place.tier() == tier;
    // One step down the hierarchy.
    let lower = if tier == Tier::Device { "\"cpu\" or \"nvme\"" } else { "\"nvme\"" };
    let device = tier == Tier::Device;
    let moves = tier != Tier::Nvme;
    let mut knobs = vec![enough];
    let mut add = |helps: bool, knob: String| knobs.extend(helps.then_some(knob));
    add(device && config.recompute == Recompute::None, "activation.checkpoint = \"full\"".into());
    add(here > 1 && config.zero < 3, format!("parallel.zero = {}", config.zero + 1));
    add(moves && at(o.optim), format!("offload.optim = {lower}"));
    add(moves && at(o.grads), format!("offload.grads = {lower}"));
    add(moves && at(o.params), format!("offload.params = {lower}"));
    add(device && o.optim != Place::Device && o.ratio < 1.0, "offload.ratio = 1.0".into());
    add(device && config.micro_batch > 1, "a smaller train.micro_batch".into());
    add(device, "a smaller train.max_seq_len".into());
    let last = knobs.pop().expect("at least one");
    if knobs.is_empty() { last } else { format!("{}, or {last}", knobs.join(", ")) }
}

/// A size that people can read and type, not below `bytes`.
pub(crate) fn rounded_up(bytes: u64) -> Size {
    let unit = if bytes < 64 << 20 { 1 << 10 } else { 1 << 20 };
    Size(bytes.div_ceil(unit) * unit)
}

fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
