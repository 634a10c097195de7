//! Where the weights of each transformer block lie: on the device, in host memory or on disk.
//!
//! # Policy
//! Everything on the device if it fits: nothing is streamed then. Otherwise the device holds what is used in every
//! pass outside the blocks, what serving takes, and as many blocks as are left room for; host memory holds as many of
//! the others as it can; the disk keeps the rest and feeds a ring in host memory. The blocks of a tier are spread evenly
//! over the model, so that a transfer always has computation to hide behind.
//!
//! How much of the device is for KV cache and how much for blocks is a matter of the [`Aim`]. For latency blocks come
//! before all but a modest cache: to fill the fastest tier first is optimal for one sequence. For throughput the batch is
//! looked for that the [`forecast`](crate::forecast) promises most tokens per second, and the device holds that batch's
//! keys and values before blocks: a fetch from disk costs the same for one sequence and for many, so while the disk is what
//! steps wait for, another sequence is worth more than another block (`b/T(b)` grows with `b` as long as the weights are
//! more than the device holds). What does not grow any more is left to blocks.

use crate::error::{Error, Shortfall};
use crate::forecast::{Load, Speeds};
use hearth_memory::{Size, Tier};

/// A larger batch makes each of its sequences slower: by less than this part it is not worth it.
const WORTH_IT: f64 = 0.001;

/// Bytes of one transformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockBytes {
    /// In panel layout, as the device computes with it.
    pub packed: u64,
    /// As stored in the file, with the gaps between its tensors.
    pub stored: u64,
}

/// What is to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The transformer blocks in order.
    pub blocks: Vec<BlockBytes>,
    /// Device bytes of the weights outside the blocks.
    pub fixed: u64,
    /// Device bytes of values between layers, the least that works.
    pub working: u64,
    /// Device bytes of the smallest useful KV cache, and the tokens it holds.
    pub least_kv: (u64, usize),
    /// Device bytes that the KV cache and larger steps should have before blocks do.
    pub wished_kv: u64,
    /// Buffers in host memory that reads from disk go through.
    pub ring_buffers: u64,
}

/// Bytes that may still be taken in each tier, and those that are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Free on the device.
    pub device: u64,
    /// Taken on the device.
    pub device_used: u64,
    /// Free in host memory.
    pub host: u64,
    /// Taken in host memory.
    pub host_used: u64,
    /// Most bytes of weights that may stay on disk.
    pub nvme: u64,
}

/// What a placement is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Aim {
    /// The soonest next token of one sequence.
    #[default]
    Latency,
    /// The most tokens per second of all sequences together.
    Throughput(Crowd),
}

/// Who is to be served at once, and with what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Crowd {
    /// Most sequences in a batch.
    pub max_seqs: usize,
    /// Tokens in one forward pass.
    pub max_batch_tokens: usize,
    /// Tokens that each sequence is expected to have in the cache.
    pub context: usize,
    /// What the machine does in a second.
    pub speeds: Speeds,
}

/// The same crowd in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// A step of it.
    pub load: Load,
    /// Most sequences in a batch.
    pub max_seqs: u64,
    /// Device bytes of values between layers.
    pub working: u64,
    /// What the machine does in a second.
    pub speeds: Speeds,
}

/// Where each block lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The tier of each block, in order.
    pub tiers: Vec<Tier>,
    /// Host bytes of the ring; 0 when nothing is read from disk.
    pub ring_bytes: u64,
}

impl Placement {
    /// Whether every block is on the device.
    pub fn is_resident(&self) -> bool {
        self.tiers.iter().all(|t| *t == Tier::Device)
    }

    /// Blocks in a tier.
    pub fn count(&self, tier: Tier) -> usize {
        self.tiers.iter().filter(|t| **t == tier).count()
    }

    /// Bytes of blocks in a tier, as they lie there.
    pub fn bytes(&self, tier: Tier, blocks: &[BlockBytes]) -> u64 {
        let bytes = |b: &BlockBytes| if tier == Tier::Device { b.packed } else { b.stored };
        self.tiers.iter().zip(blocks).filter(|(t, _)| **t == tier).map(|(_, b)| bytes(b)).sum()
    }
}

/// Places the blocks for latency.
///
/// # Errors
/// [`Error::TooSmall`] when the device does not even hold what is outside the blocks, [`Error::Placement`] when host memory or disk are
/// too small for the rest; each names the smallest budget that works.
pub fn place(needs: &Needs, room: Room) -> Result<Placement, Error> {
    let all: u64 = needs.blocks.iter().map(|b| b.packed).sum();
    let serving = needs.working + needs.least_kv.0;
    if needs.fixed + all + serving <= room.device {
        return Ok(Placement { tiers: vec![Tier::Device; needs.blocks.len()], ring_bytes: 0 });
    }
    let least = needs.fixed + serving;
    let Some(left) = room.device.checked_sub(least) else {
        let (kv, tokens) = needs.least_kv;
        let weights = needs.fixed;
        let (working, used, free) = (needs.working, room.device_used, room.device);
        return Err(Error::TooSmall(Box::new(Shortfall { weights, working, tokens, kv, used, free })));
    };
    // However much the cache would like, half of what is left goes to blocks.
    place_some(needs, room, left - needs.wished_kv.saturating_sub(needs.least_kv.0).min(left / 2))
}

/// Places the blocks for throughput: beside the keys and values of the batch that is forecast the most tokens per second,
/// the smallest of several that are. Where the device has no room for one such sequence, as [`place`] does.
///
/// # Errors
/// As [`place`].
pub fn place_for_throughput(needs: &Needs, room: Room, demand: &Demand) -> Result<Placement, Error> {
    let Demand { load, speeds, working, .. } = *demand;
    let tok_s = |batch, placement: &Placement| {
        load.step(batch, placement.bytes(Tier::Nvme, &needs.blocks), speeds).tok_s()
    };
    let latency = place(needs, room)?;
    if latency.is_resident() {
        return Ok(latency);
    }
    let beside = needs.fixed + latency.bytes(Tier::Device, &needs.blocks) + working;
    let batch = room.device.saturating_sub(beside) / load.kv.max(1);
    let mut best = (tok_s(batch.clamp(1, demand.max_seqs.max(1)), &latency), latency);
    for batch in 1..=demand.max_seqs {
        let serving = (working + batch * load.kv).max(needs.working + needs.least_kv.0);
        let Some(left) = room.device.checked_sub(needs.fixed + serving) else { break };
        // Fewer blocks on the device may be more than the other tiers hold.
        let Ok(placement) = place_some(needs, room, left) else { break };
        let tok_s = tok_s(batch, &placement);
        if tok_s > best.0 * (1.0 + WORTH_IT) {
            best = (tok_s, placement);
        }
    }
    Ok(best.1)
}

/// Places the blocks with so many bytes of them on the device at most.
fn place_some(needs: &Needs, room: Room, for_blocks: u64) -> Result<Placement, Error> {
    let packed: Vec<u64> = needs.blocks.iter().map(|b| b.packed).collect();
    let on_device = spread(&packed, for_blocks);
    let others: Vec<usize> = (0..packed.len()).filter(|i| !on_device[*i]).collect();
    let stored: Vec<u64> = others.iter().map(|i| needs.blocks[*i].stored).collect();
    let (on_host, ring_bytes) = in_host_memory(&stored, needs.ring_buffers, room)?;
    let mut tiers = vec![Tier::Device; packed.len()];
    for (i, on_host) in others.into_iter().zip(on_host) {
        tiers[i] = if on_host { Tier::Host } else { Tier::Nvme };
    }
    let placement = Placement { tiers, ring_bytes };
    let on_disk = placement.bytes(Tier::Nvme, &needs.blocks);
    if on_disk > room.nvme {
        return Err(misfit(Tier::Nvme, "weights", on_disk, room.nvme, 0));
    }
    Ok(placement)
}

/// Which of the streamed blocks host memory holds, and the bytes of the ring if some are left to the disk.
fn in_host_memory(stored: &[u64], buffers: u64, room: Room) -> Result<(Vec<bool>, u64), Error> {
    let all: u64 = stored.iter().sum();
    if all <= room.host {
        return Ok((vec![true; stored.len()], 0));
    }
    let ring = buffers * stored.iter().max().copied().unwrap_or(0);
    if room.nvme == 0 {
        return Err(misfit(
            Tier::Host,
            "weights that the device does not hold",
            all,
            room.host,
            room.host_used,
        ));
    }
    match room.host.checked_sub(ring) {
        Some(left) => Ok((spread(stored, left), ring)),
        None => Err(misfit(
            Tier::Host,
            "the ring that reads from disk go through",
            ring,
            room.host,
            room.host_used,
        )),
    }
}

fn misfit(tier: Tier, what: &'static str, needed: u64, free: u64, used: u64) -> Error {
    const MIB: u64 = 1 << 20;
    Error::Placement { tier, what, needed, free, smallest: Size((used + needed).next_multiple_of(MIB)) }
}

/// As many of these as fit, evenly spread.
fn spread(bytes: &[u64], room: u64) -> Vec<bool> {
    let n = bytes.len();
    let pick = |count: usize| (0..n).map(move |i| i * count / n != (i + 1) * count / n);
    let fits = |count: &usize| {
        pick(*count).zip(bytes).filter(|(picked, _)| *picked).map(|(_, b)| b).sum::<u64>() <= room
    };
    let count = (0..=n).rev().find(fits).unwrap_or(0);
    pick(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(blocks: usize) -> Needs {
        Needs {
            blocks: vec![BlockBytes { packed: 100, stored: 90 }; blocks],
            fixed: 50,
            working: 20,
            least_kv: (10, 128),
            wished_kv: 30,
            ring_buffers: 4,
        }
    }

    fn room(device: u64, host: u64, nvme: u64) -> Room {
        Room { device, device_used: 0, host, host_used: 0, nvme }
    }

    fn picture(p: &Placement) -> String {
        p.tiers.iter().map(|t| t.name().chars().next().unwrap_or('?')).collect()
    }

    fn placed(device: u64, host: u64, nvme: u64) -> String {
        picture(&place(&needs(8), room(device, host, nvme)).expect("it fits"))
    }

    #[test]
    fn what_fits_the_device_is_not_streamed() {
        assert_eq!(placed(880, 0, 0), "dddddddd");
        assert!(place(&needs(8), room(880, 0, 0)).expect("it fits").is_resident());
    }

    #[test]
    fn the_fastest_tier_is_filled_first_and_its_blocks_are_spread() {
        // Fixed, working and the wished KV cache take 100.
        assert_eq!(placed(500, 900, 0), "hdhdhdhd");
        assert_eq!(placed(500, 400, u64::MAX), "hdhdhdhd", "no ring is needed");
        assert_eq!(placed(300, 540, u64::MAX), "hhhdhhhd", "six in host memory need no ring either");
        assert_eq!(placed(100, 360, u64::MAX), "nnnnnnnn");
        let some = place(&needs(8), room(100, 540, u64::MAX)).expect("it fits");
        assert_eq!((picture(&some).as_str(), some.ring_bytes), ("nnnhnnnh", 360));
    }

    #[test]
    fn a_budget_too_small_is_refused_with_the_smallest_that_works() {
        let refused = |r| place(&needs(8), r).expect_err("too small").to_string();
        let device = refused(room(79, 1000, 0));
        assert!(
            device.contains("needs 80 bytes") && device.contains("smallest budget that works"),
            "{device}"
        );
        let ring = refused(room(100, 359, u64::MAX));
        assert!(ring.contains("host tier") && ring.contains("360 bytes") && ring.contains("1MiB"), "{ring}");
        let host = refused(room(100, 719, 0));
        assert!(host.contains("host tier") && host.contains("720 bytes"), "{host}");
        let disk = refused(room(100, 360, 719));
        assert!(disk.contains("nvme tier") && disk.contains("720 bytes"), "{disk}");
        assert!(place(&needs(8), room(80, 720, 0)).is_ok(), "the smallest named works");
    }

    /// A step of `batch` has keys and values of 50 each behind it; the disk gives 100 bytes a second.
    fn demand(max_seqs: u64, flops: f64) -> Demand {
        let load = Load { weights: 850, kv: 50, operations: 1 };
        let speeds = Speeds { nvme: Some(100.0), memory: 1e6, flops };
        Demand { load, max_seqs, working: 20, speeds }
    }

    fn for_throughput(device: u64, demand: Demand) -> String {
        picture(&place_for_throughput(&needs(8), room(device, 360, u64::MAX), &demand).expect("it fits"))
    }

    #[test]
    fn throughput_takes_blocks_off_the_device_for_sequences() {
        // Beside 70 that are always there the device has 330. b/T(b), with 0.9 s per block on disk:
        // b = 1, 2: 2 blocks there, 1/5.4 = 0.19, 2/5.4 = 0.37; 3, 4: 1 block, 3/6.3 = 0.48, 4/6.3 = 0.63;
        // 5, 6: none, 5/7.2 = 0.69, 6/7.2 = 0.83; there is no room for 7.
        assert_eq!(placed(400, 360, u64::MAX), "nndnndnd", "for latency");
        assert_eq!(for_throughput(400, demand(8, 1e6)), "nnnnnnnn");
        assert_eq!(for_throughput(400, demand(4, 1e6)), "nnnnnnnd");
        assert_eq!(for_throughput(400, demand(2, 1e6)), "nnndnnnd");
    }

    #[test]
    fn a_batch_that_brings_no_more_is_left_to_blocks() {
        // 0.6 operations a second: 4 sequences wait 6.3 s for the disk and 6.7 s for arithmetic, 6 wait 7.2 s and 10 s: 0.6
        // tokens a second either way.
        assert_eq!(for_throughput(400, demand(8, 0.6)), "nnnnnnnd");
    }

    #[test]
    fn throughput_leaves_blocks_where_the_disk_is_not_needed() {
        // The device holds four blocks and host memory the others; for each sequence more one of them would go to disk.
        assert_eq!(for_throughput(500, demand(8, 1e6)), "hdhdhdhd");
    }

    #[test]
    fn throughput_falls_back_to_latency_where_no_sequence_fits_and_streams_nothing_that_fits() {
        assert_eq!(for_throughput(110, demand(8, 1e6)), placed(110, 360, u64::MAX));
        assert_eq!(for_throughput(880, demand(8, 1e6)), "dddddddd");
        let needs = needs(8);
        assert!(place_for_throughput(&needs, room(79, 1000, 0), &demand(8, 1e6)).is_err());
        // Host memory holds five blocks and there is no disk: the device must hold three.
        let tight = place_for_throughput(&needs, room(500, 450, 0), &demand(8, 1e6)).expect("it fits");
        assert_eq!(picture(&tight), "hhdhhdhd");
    }

    #[test]
    fn every_count_is_spread_as_evenly_as_can_be() {
        for n in 1..20 {
            for count in 0..=n {
                let picked = spread(&vec![1; n], count as u64);
                let places: Vec<usize> = (0..n).filter(|i| picked[*i]).collect();
                assert_eq!(places.len(), count);
                let gaps = places.windows(2).map(|w| w[1] - w[0]);
                let (least, most) = gaps.fold((n, 0), |(l, m), g| (l.min(g), m.max(g)));
                assert!(count < 2 || most - least <= 1, "{n} {count} {places:?}");
            }
        }
    }
}
