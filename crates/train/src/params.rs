//! The model's parameters as a rank holds them: the copies of the trained ones, and the frozen ones beside them.

use crate::Error;
use crate::config::{Compute, LoraConfig, Offload, TrainConfig};
use crate::copies::{Conveyor, Copies, View};
use crate::flat::tensor;
use crate::frozen::Frozen;
use crate::layout::{Layout, Param};
use crate::lora;
use crate::sizes::Sizes;
use burn::tensor::{Device, Tensor};
use hearth_collective::Ordered;
use hearth_memory::{Kind, Ledger, Tier};
use hearth_model::{Architecture, Group, Matrix, ParamSpec, params, uses};
use hearth_weights::TensorSource;
use std::collections::HashMap;

/// Takes the masters of a unit, where they are first known.
pub type Masters<'a> = dyn FnMut(usize, &[f32]) -> Result<(), Error> + 'a;

/// Every parameter of a model.
pub struct ParamStore {
    layout: Layout,
    index: HashMap<String, usize>,
    /// Units that the head uses: its own, and with tied embeddings the embedding's.
    head_units: Vec<usize>,
    copies: Copies,
    frozen: Frozen,
    device: Device,
    lora: Option<LoraConfig>,
}

/// The trained parameters of a run, in execution order. Without an adapter all of them are trained; with one only its
/// factors are.
///
/// # Errors
/// [`Error::Config`] for an adapter target that matches no linear layer.
pub fn layout(
    arch: &dyn Architecture,
    config: &TrainConfig,
    world: usize,
    rank: usize,
) -> Result<Layout, Error> {
    if let Some(adapter) = &config.adapter {
        lora::check_targets(&params(arch), adapter)?;
    }
    Ok(layout_of(&params(arch), config, world, rank))
}

fn layout_of(specs: &[ParamSpec], config: &TrainConfig, world: usize, rank: usize) -> Layout {
    let Some(adapter) = &config.adapter else {
        let trained = specs.iter().map(|spec| (spec.name.clone(), spec.shape.clone(), spec.group));
        return Layout::new(trained, world, rank);
    };
    let factors = lora::targets(specs, adapter).into_iter().flat_map(|spec| {
        lora::factor_shapes(spec, adapter.rank).map(|(name, shape)| (name, shape, spec.group))
    });
    Layout::new(factors, world, rank)
}

impl ParamStore {
    /// Loads every parameter of `arch` that the layout's rank holds; `masters` gets the exact values of the trained
    /// ones. An adapter's factors are fresh: A uniform as in PEFT, drawn by `(seed, name)`, B zero.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; a budget that does not hold it.
    pub fn load(
        arch: &dyn Architecture,
        source: &dyn TensorSource,
        config: &TrainConfig,
        layout: Layout,
        device: Device,
        ledger: &Ledger,
        masters: &mut Masters<'_>,
    ) -> Result<Self, Error> {
        Self::load_specs(arch, &params(arch), source, config, layout, device, ledger, masters)
    }

    /// Loads what one step of the block loop uses, whole and in memory.
    ///
    /// # Errors
    /// As [`ParamStore::load`].
    pub(crate) fn load_step(
        arch: &dyn Architecture,
        group: Group,
        source: &dyn TensorSource,
        config: &TrainConfig,
        device: Device,
    ) -> Result<Self, Error> {
        let mut specs = uses(arch, group);
        // A tied head's embedding is the embedding's wherever it is used.
        let all = params(arch);
        for spec in &mut specs {
            spec.group = all.iter().find(|s| s.name == spec.name).map_or(spec.group, |s| s.group);
        }
        specs.sort_by_key(|spec| spec.group);
        let config = TrainConfig { zero: 0, offload: Offload::default(), ..config.clone() };
        let layout = layout_of(&specs, &config, 1, 0);
        let ledger = Ledger::default();
        Self::load_specs(arch, &specs, source, &config, layout, device, &ledger, &mut |_, _| Ok(()))
    }

    #[allow(clippy::too_many_arguments, reason = "private, and each is a different thing")]
    fn load_specs(
        arch: &dyn Architecture,
        specs: &[ParamSpec],
        source: &dyn TensorSource,
        config: &TrainConfig,
        layout: Layout,
        device: Device,
        ledger: &Ledger,
        masters: &mut Masters<'_>,
    ) -> Result<Self, Error> {
        let sizes = Sizes { layout: &layout, config };
        let mut copies = Copies::new(&sizes, ledger)?;
        let mut frozen = Frozen::new(config, device.clone(), ledger);
        for spec in specs {
            check_shape(source, spec)?;
            if config.adapter.is_some() {
                frozen.add(spec, source)?;
                source.release(&spec.name);
            }
        }
        let by_name: HashMap<&str, &ParamSpec> =
            specs.iter().map(|spec| (spec.name.as_str(), spec)).collect();
        for (at, unit) in layout.units().iter().enumerate() {
            let _loading = ledger.charge(Tier::Host, Kind::Staging, sizes.loading_bytes(at))?;
            let mut values = vec![0.0; layout.padded_len(at)];
            for param in &layout.params()[unit.params.clone()] {
                let read = match &config.adapter {
                    None => {
                        let values = source.read_f32(&param.name)?;
                        source.release(&param.name);
                        values
                    }
                    Some(adapter) => lora::factor(&by_name, &param.name, adapter.rank, config.seed),
                };
                values[param.range.clone()].copy_from_slice(&read);
            }
            copies.fill(at, &values[sizes.copy_range(at)])?;
            masters(at, &values[..unit.len])?;
        }
        Ok(Self {
            index: layout.params().iter().enumerate().map(|(i, p)| (p.name.clone(), i)).collect(),
            head_units: head_units(arch, &layout),
            copies,
            frozen,
            device,
            lora: config.adapter.clone(),
            layout,
        })
    }

    /// Who owns what.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Trained parameters in execution order.
    pub fn trained(&self) -> &[Param] {
        self.layout.params()
    }

    /// Whether anything of a step of the block loop is trained.
    pub(crate) fn trains(&self, group: Group) -> bool {
        self.layout.unit_of(group).is_some()
    }

    pub(crate) fn copies(&self) -> &Copies {
        &self.copies
    }

    pub(crate) fn copies_mut(&mut self) -> &mut Copies {
        &mut self.copies
    }

    /// Units a step of the block loop uses, in the order they are brought.
    pub(crate) fn units_for(&self, group: Group) -> Vec<usize> {
        match group {
            Group::Head => self.head_units.clone(),
            _ => self.layout.unit_of(group).into_iter().collect(),
        }
    }

    /// Brings the units of these steps of the block loop in this order.
    pub(crate) fn conveyor<'a>(
        &'a self,
        comm: &'a Ordered,
        steps: impl IntoIterator<Item = Group>,
    ) -> Conveyor<'a> {
        let script: Vec<usize> = steps.into_iter().flat_map(|group| self.units_for(group)).collect();
        Conveyor::new(&self.copies, comm, script)
    }

    /// Replaces the copy of a parameter that is kept whole in memory. Its master, if it has one, stays.
    ///
    /// # Panics
    /// When the values are of another length, or the copy is partitioned, on a disk or in use.
    pub fn assign(&mut self, index: usize, values: &[f32]) {
        let (unit, range) = (self.layout.params()[index].unit, self.layout.params()[index].range.clone());
        assert_eq!(range.len(), values.len(), "a parameter keeps its length");
        self.copies.memory_mut(unit).expect("in memory").write(range.start, values);
    }

    /// Place of a trained parameter in [`ParamStore::trained`].
    pub fn position(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// A trained parameter as a tensor of the compute precision, untracked, out of the unit that was brought.
    pub(crate) fn tensor<const D: usize>(
        &self,
        index: usize,
        views: &[View],
        shape: [usize; D],
    ) -> Tensor<D> {
        let param = &self.layout.params()[index];
        let view = views.iter().find(|view| view.unit == param.unit);
        let view = view.expect("a step of the block loop uses the units that were brought for it");
        let compute = self.copies.compute();
        tensor(view.part(param.range.clone(), compute), shape, compute, &self.device)
    }

    /// A frozen matrix.
    pub(crate) fn frozen_matrix(&self, name: &str) -> Option<Matrix> {
        self.frozen.matrix_named(name)
    }

    /// A frozen vector.
    pub(crate) fn frozen_vector(&self, name: &str) -> Option<Tensor<1>> {
        self.frozen.vector_named(name)
    }

    /// The adapter's configuration, if one is trained.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Arithmetic of the forward and backward pass.
    pub fn compute(&self) -> Compute {
        self.copies.compute()
    }

    /// Bytes of the frozen parameters as they are held.
    pub fn frozen_bytes(&self) -> u64 {
        self.frozen.bytes()
    }

    /// Whether a tensor still borrows a copy, so that it cannot be updated.
    pub fn is_borrowed(&self) -> bool {
        (0..self.layout.units().len()).any(|unit| self.copies.is_borrowed(unit))
    }

    /// sha256 of names and shapes of the trained parameters.
    pub fn parameters_sha256(&self) -> String {
        self.layout.names_sha256()
    }

    /// sha256 of a sample of every frozen tensor; empty when there is none.
    pub fn frozen_sample_sha256(&self) -> String {
        self.frozen.sample_sha256()
    }
}

/// Units of the parameters that the head asks for.
pub(crate) fn head_units(arch: &dyn Architecture, layout: &Layout) -> Vec<usize> {
    let mut units: Vec<usize> = uses(arch, Group::Head)
        .iter()
        .filter_map(|spec| layout.params().iter().find(|p| p.name == spec.name))
        .map(|param| param.unit)
        .chain(layout.unit_of(Group::Head))
        .collect();
    units.sort_unstable();
    units.dedup();
    units
}

/// Refuses a tensor of another shape before anything is read.
fn check_shape(source: &dyn TensorSource, spec: &ParamSpec) -> Result<(), Error> {
    let meta = source.meta(&spec.name)?;
    if meta.shape == spec.shape {
        return Ok(());
    }
    Err(Error::Weights(hearth_weights::Error::WrongShape {
        path: source.origin().to_owned(),
        tensor: spec.name.clone(),
        found: meta.shape.clone(),
        expected: spec.shape.clone(),
    }))
}
