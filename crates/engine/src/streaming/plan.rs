//! What is resident and what is streamed, decided before anything is allocated.

use super::{StreamedBlock, TableBytes, TablePart, look_ahead};
use crate::error::Error;
use crate::footprint;
use crate::loader::{Arithmetic, Part, kv_type};
use crate::placement::{Aim, BlockBytes, Placement, Room, place, place_for_throughput};
use hearth_kernels::paged::KvType;
use hearth_memory::stream::Ahead;
use hearth_memory::{Ledger, NvmeFile, Tier};
use hearth_model::panels::PANELS;
use hearth_model::{Group, architecture};
use hearth_weights::{ModelConfig, ModelFiles};
use std::ops::Range;
use std::path::PathBuf;

/// Where a model's weights will lie within the budgets of a ledger.
#[derive(Clone, Debug)]
pub struct WeightPlan {
    /// The transformer blocks; bytes in the file only where some are streamed.
    pub blocks: Vec<BlockBytes>,
    /// Device bytes of the weights outside the blocks.
    pub fixed: u64,
    /// The embedding, if it stays on disk and rows of it are read.
    pub table: Option<TableBytes>,
    /// The tier of each block.
    pub placement: Placement,
    /// What the KV cache stores.
    pub kv_type: KvType,
    /// Blocks read from disk ahead of the one in use.
    pub look_ahead: usize,
}

impl WeightPlan {
    /// Plans what [`LoadedModel::load`](crate::LoadedModel::load) does. The disk's latency is measured if a block may
    /// have to be read from it.
    ///
    /// # Errors
    /// As there.
    pub fn new(
        files: &ModelFiles,
        arithmetic: impl Into<Arithmetic>,
        ledger: &Ledger,
    ) -> Result<Self, Error> {
        Self::aimed(files, arithmetic, Aim::Latency, ledger)
    }

    /// The same for [`LoadedModel::load_aimed`](crate::LoadedModel::load_aimed).
    ///
    /// # Errors
    /// As there.
    pub fn aimed(
        files: &ModelFiles,
        arithmetic: impl Into<Arithmetic>,
        aim: Aim,
        ledger: &Ledger,
    ) -> Result<Self, Error> {
        let arch = architecture(&files.config)?;
        let parts = Part::all(arch.as_ref(), files)?;
        let total = parts.iter().map(|p| p.bytes).sum();
        let kv_type = kv_type(&parts, arithmetic.into());
        match footprint::check_weights(&files.config, kv_type, total, ledger) {
            Ok(()) => Ok(Self::resident(parts, kv_type, files.config.num_layers)),
            Err(Error::TooSmall(_)) if may_stream(ledger) => {
                Ok(Prepared::new(parts, kv_type, aim, files, ledger)?.plan)
            }
            Err(error) => Err(error),
        }
    }

    fn resident(parts: Vec<Part>, kv_type: KvType, blocks: usize) -> Self {
        let (fixed, blocks) = split(parts, blocks);
        let packed = |parts: &Vec<Part>| BlockBytes { packed: bytes(parts), stored: 0 };
        let blocks: Vec<BlockBytes> = blocks.iter().map(packed).collect();
        let placement = Placement { tiers: vec![Tier::Device; blocks.len()], ring_bytes: 0 };
        Self { blocks, fixed: bytes(&fixed), table: None, placement, kv_type, look_ahead: 0 }
    }
}

/// Whether the user said where weights may lie that the device does not hold.
pub(crate) fn may_stream(ledger: &Ledger) -> bool {
    [Tier::Host, Tier::Nvme].into_iter().any(|tier| ledger.budget().limit(tier).is_some())
}

fn bytes(parts: &[Part]) -> u64 {
    parts.iter().map(|p| p.bytes).sum()
}

/// Parameters outside the blocks, and those of each block.
fn split(parts: Vec<Part>, blocks: usize) -> (Vec<Part>, Vec<Vec<Part>>) {
    let mut outside = Vec::new();
    let mut inside: Vec<Vec<Part>> = (0..blocks).map(|_| Vec::new()).collect();
    for part in parts {
        match part.spec.group {
            Group::Block(i) => inside[i].push(part),
            Group::Embedding | Group::Head => outside.push(part),
        }
    }
    (outside, inside)
}

/// A plan with what it takes to carry it out.
pub(crate) struct Prepared {
    pub plan: WeightPlan,
    /// Everything that stays on the device.
    pub resident: Vec<Part>,
    pub streamed: Vec<StreamedBlock>,
    /// The embedding, where it is not.
    pub table: Option<TablePart>,
    pub file: NvmeFile,
}

impl Prepared {
    pub fn new(
        parts: Vec<Part>,
        kv_type: KvType,
        aim: Aim,
        files: &ModelFiles,
        ledger: &Ledger,
    ) -> Result<Self, Error> {
        let (mut resident, inside) = split(parts, files.config.num_layers);
        let mut path = None;
        let blocks: Vec<StreamedBlock> = inside
            .into_iter()
            .enumerate()
            .map(|(i, parts)| locate(i, parts, files, &mut path))
            .collect::<Result<_, _>>()?;
        let (Some(path), Some(first)) = (path, blocks.first()) else {
            return Err(Error::Config("a model without transformer blocks cannot be streamed".into()));
        };
        let file = NvmeFile::open(&path)?;
        let wished = look_ahead(&file, &first.range)?;
        let sizes: Vec<BlockBytes> = blocks.iter().map(size).collect();
        let decided = |fixed: u64, table: Option<TableBytes>| -> Result<(Placement, usize), Error> {
            let decide =
                |ahead| decide(&files.config, kv_type, sizes.clone(), (fixed, table), (ahead, aim), ledger);
            // A tight budget reads ahead less; one block ahead keeps a disk busy that blocks are waited for.
            match (1..=wished).rev().find_map(|ahead| Some((decide(ahead).ok()?, ahead))) {
                Some(found) => Ok(found),
                None => Ok((decide(1)?, 1)),
            }
        };
        let from_disk = |placement: &Placement| placement.bytes(Tier::Nvme, &sizes);
        let mut found = decided(bytes(&resident), None);
        // Where blocks come from disk anyway, rows of the embedding may, if that leaves fewer blocks there.
        let mut table = None;
        if found.as_ref().map_or(true, |(placement, _)| from_disk(placement) > 0)
            && let Some(part) = TablePart::take(&mut resident, files, &path)
        {
            let without = decided(bytes(&resident), Some(part.bytes()));
            let better = match (&found, &without) {
                (Ok((with, _)), Ok((without, _))) => from_disk(without) < from_disk(with),
                // Where neither fits, the smallest device that works is the one without it.
                (Err(found), without) => without.is_ok() || matches!(found, Error::TooSmall(_)),
                (Ok(_), Err(_)) => false,
            };
            match better {
                true => (found, table) = (without, Some(part)),
                false => resident.push(part.part),
            }
        }
        let (placement, look_ahead) = found?;
        let fixed = bytes(&resident);
        let mut streamed = Vec::new();
        for (mut block, tier) in blocks.into_iter().zip(&placement.tiers) {
            block.tier = *tier;
            match tier {
                Tier::Device => resident.extend(block.parts.into_iter().map(|(part, _)| part)),
                _ => streamed.push(block),
            }
        }
        let bytes_of_table = table.as_ref().map(TablePart::bytes);
        let plan = WeightPlan { blocks: sizes, fixed, table: bytes_of_table, placement, kv_type, look_ahead };
        Ok(Self { plan, resident, streamed, table, file })
    }
}

fn size(block: &StreamedBlock) -> BlockBytes {
    BlockBytes { packed: block.parts.iter().map(|(p, _)| p.bytes).sum(), stored: block.stored_bytes() }
}

/// A block's place in the file that `path` names from the first tensor on.
fn locate(
    index: usize,
    parts: Vec<Part>,
    files: &ModelFiles,
    path: &mut Option<PathBuf>,
) -> Result<StreamedBlock, Error> {
    let (mut start, mut end) = (u64::MAX, 0);
    let mut located: Vec<(Part, Range<u64>)> = Vec::with_capacity(parts.len());
    let mut stored = 0;
    for part in parts {
        let name = &part.spec.name;
        let place = match part.spec.shape.len() {
            2 => files.tensors.image(name).filter(|image| image.layout == PANELS).map(|image| image.place),
            _ => files.tensors.place(name),
        };
        let place = place.ok_or_else(|| unstreamable(files))?;
        if *path.get_or_insert_with(|| place.path.clone()) != place.path {
            return Err(unstreamable(files));
        }
        (start, end) = (start.min(place.range.start), end.max(place.range.end));
        stored += place.range.end - place.range.start;
        located.push((part, place.range));
    }
    // Tensors start on pages, so gaps are smaller than a page each; larger ones belong to something else.
    let range = start.min(end)..end;
    let gaps = (range.end - range.start).saturating_sub(stored);
    if gaps > located.len() as u64 * hearth_weights::bundle::ALIGNMENT {
        return Err(unstreamable(files));
    }
    Ok(StreamedBlock { index, tier: Tier::Nvme, range, parts: located })
}

fn unstreamable(files: &ModelFiles) -> Error {
    let path = files.path.display();
    Error::Config(format!(
        "the device does not hold all weights, and {path} cannot be streamed: that takes a bundle as this version \
         writes it; make one with `hearth convert {path} -o DIR --to bundle`"
    ))
}

fn decide(
    config: &ModelConfig,
    kv_type: KvType,
    blocks: Vec<BlockBytes>,
    (fixed, table): (u64, Option<TableBytes>),
    (look_ahead, aim): (usize, Aim),
    ledger: &Ledger,
) -> Result<Placement, Error> {
    let ring_buffers = Ahead { look_ahead, leases: 1 }.buffers() as u64;
    let needs = footprint::streaming_needs(config, kv_type, blocks, fixed, ring_buffers);
    let TableBytes { stored, staging } = table.unwrap_or(TableBytes { stored: 0, staging: 0 });
    let taken = |tier, bytes: u64| ledger.free(tier).checked_sub(bytes);
    let (Some(host), Some(nvme)) = (taken(Tier::Host, staging), taken(Tier::Nvme, stored)) else {
        return Err(Error::Config("there is no room for an embedding on disk".into()));
    };
    let room = Room {
        device: ledger.free(Tier::Device),
        device_used: ledger.used(Tier::Device),
        host,
        host_used: ledger.used(Tier::Host) + staging,
        nvme,
    };
    match aim {
        Aim::Latency => place(&needs, room),
        Aim::Throughput(crowd) => {
            let weights = fixed + needs.blocks.iter().map(|b| b.packed).sum::<u64>();
            place_for_throughput(&needs, room, &footprint::demand(config, kv_type, weights, &crowd)?)
        }
    }
}
