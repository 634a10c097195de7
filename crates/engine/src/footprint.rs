//! How many bytes serving takes: the same arithmetic for refusing, planning and charging.

use crate::backend::{Backend, Room};
use crate::error::{Error, Shortfall};
use crate::forecast::Load;
use crate::placement::{BlockBytes, Crowd, Demand, Needs};
use crate::runner::HEAD_ROWS;
use hearth_kernels::paged::{KV_BLOCK, KvCache, KvType};
use hearth_memory::{Ledger, Tier};
use hearth_model::{architecture, params};
use hearth_weights::ModelConfig;

/// A cache for fewer tokens than this (or the model's own limit) is not worth serving with.
pub const MIN_CONTEXT: usize = 128;
/// Fewest tokens per step the planner goes down to when memory is short.
pub const MIN_BATCH_TOKENS: usize = 64;
/// Size of the KV cache when nothing limits it. Untouched pages of it cost nothing.
const DEFAULT_KV_BYTES: u64 = 2 << 30;

/// Bytes of one KV block over all layers.
pub fn kv_block_bytes(config: &ModelConfig, kv_type: KvType) -> u64 {
    KvCache::bytes(config.num_layers, 1, config.num_kv_heads, config.head_dim, kv_type) as u64
}

/// Bytes of values between layers in a step of `rows` tokens: at the widest place the residual stream, its norm
/// and the MLP's gate, up and product, or the attention's q, k, v and output with a copy of each; and the logits
/// of [`HEAD_ROWS`] rows with the distribution drawn from;
/// and the scores of attention.
pub fn working_bytes(config: &ModelConfig, rows: usize) -> u64 {
    let q = config.num_heads * config.head_dim;
    let kv = config.num_kv_heads * config.head_dim;
    let widest =
        (4 * config.hidden_size + 3 * config.intermediate_size).max(4 * config.hidden_size + 4 * q + 4 * kv);
    let logits = HEAD_ROWS.min(rows) * config.vocab_size + 8 * config.vocab_size;
    let scores = KvCache::scratch_bytes(config.max_position_embeddings);
    (4 * (rows * widest + logits) + scores) as u64
}

/// Bytes more where rows have adapters of rank up to `rank`: at the widest layer its rows gathered, the product with A, and
/// with B before and after it is scaled.
fn adapter_working_bytes(config: &ModelConfig, rows: usize, rank: usize) -> u64 {
    let q = config.num_heads * config.head_dim;
    let widest = config.hidden_size.max(config.intermediate_size).max(q);
    if rank == 0 { 0 } else { (4 * rows * (3 * widest + rank)) as u64 }
}

/// Refuses weights that leave no room to serve with.
///
/// # Errors
/// [`Error::TooSmall`] with the smallest budget that works.
pub fn check_weights(
    config: &ModelConfig,
    kv_type: KvType,
    weights: u64,
    ledger: &Ledger,
) -> Result<(), Error> {
    let tokens = MIN_CONTEXT.min(config.max_position_embeddings);
    let kv = tokens.div_ceil(KV_BLOCK) as u64 * kv_block_bytes(config, kv_type);
    refuse_unless_it_fits(weights, working_bytes(config, MIN_BATCH_TOKENS), tokens, kv, ledger)
}

/// Tokens of KV cache, and tokens per step, that serving should have before weights are made resident that could be
/// streamed.
const WISHED_CONTEXT: usize = 2048;
const WISHED_BATCH_TOKENS: usize = 256;

/// What serving with streamed blocks takes.
pub fn streaming_needs(
    config: &ModelConfig,
    kv_type: KvType,
    blocks: Vec<BlockBytes>,
    fixed: u64,
    ring_buffers: u64,
) -> Needs {
    let kv = |tokens: usize| tokens.div_ceil(KV_BLOCK) as u64 * kv_block_bytes(config, kv_type);
    let least = MIN_CONTEXT.min(config.max_position_embeddings);
    let working = working_bytes(config, MIN_BATCH_TOKENS);
    let wished_kv = kv(WISHED_CONTEXT.min(config.max_position_embeddings))
        + (working_bytes(config, WISHED_BATCH_TOKENS) - working);
    Needs { blocks, fixed, working, least_kv: (kv(least), least), wished_kv, ring_buffers }
}

/// What a crowd of sequences takes in every step.
///
/// # Errors
/// An unknown architecture.
pub fn demand(config: &ModelConfig, kv_type: KvType, weights: u64, crowd: &Crowd) -> Result<Demand, Error> {
    let Crowd { max_seqs, max_batch_tokens, context, speeds } = *crowd;
    let load = load(config, kv_type, weights, context)?;
    Ok(Demand { load, max_seqs: max_seqs as u64, working: working_bytes(config, max_batch_tokens), speeds })
}

/// What a step goes through for each sequence with `context` tokens in the cache.
///
/// # Errors
/// An unknown architecture.
pub fn load(config: &ModelConfig, kv_type: KvType, weights: u64, context: usize) -> Result<Load, Error> {
    let kv = context.div_ceil(KV_BLOCK) as u64 * kv_block_bytes(config, kv_type);
    let arch = architecture(config)?;
    // Of the embedding a step reads its tokens' rows only.
    let touched: u64 = params(arch.as_ref()).iter().filter(|p| p.linear).map(|p| p.len() as u64).sum();
    Ok(Load { weights, kv, operations: 2 * touched })
}

fn refuse_unless_it_fits(
    weights: u64,
    working: u64,
    tokens: usize,
    kv: u64,
    ledger: &Ledger,
) -> Result<(), Error> {
    let (used, free) = (ledger.used(Tier::Device), ledger.free(Tier::Device));
    if weights.saturating_add(working).saturating_add(kv) <= free {
        return Ok(());
    }
    Err(Error::TooSmall(Box::new(Shortfall { weights, working, tokens, kv, used, free })))
}

/// What a draft model takes at least besides its weights: to be left free when those of the model it guesses for are placed.
pub fn draft_room(config: &ModelConfig, kv_type: KvType) -> u64 {
    let kv = MIN_CONTEXT.div_ceil(KV_BLOCK) as u64 * kv_block_bytes(config, kv_type);
    working_bytes(config, MIN_BATCH_TOKENS) + kv
}

/// What an engine asks of the device.
#[derive(Clone, Copy, Debug)]
pub struct Wishes<'a> {
    /// Sequences in the batch at once.
    pub max_seqs: usize,
    /// Tokens per step.
    pub max_batch_tokens: usize,
    /// Tokens a sequence must be able to reach; `None` = as many as the model and the memory allow.
    pub context_limit: Option<usize>,
    /// Bytes of the KV cache; `None` = what is free.
    pub kv_bytes: Option<u64>,
    /// Bytes of host memory for KV blocks that the device has no room for.
    pub kv_host_bytes: u64,
    /// What it stores.
    pub kv_type: KvType,
    /// Largest rank of adapters; 0 = none are used.
    pub adapter_rank: usize,
    /// Bytes to be left free for adapters that are loaded later.
    pub adapter_bytes: u64,
    /// A model that guesses, with as many KV blocks and tokens per step, and what its cache stores.
    pub draft: Option<(&'a ModelConfig, KvType)>,
}

/// What it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// KV blocks.
    pub blocks: usize,
    /// KV blocks on the host besides.
    pub host_blocks: usize,
    /// Tokens a sequence may reach.
    pub context_limit: usize,
    /// Tokens per step.
    pub max_batch_tokens: usize,
    /// Bytes between layers.
    pub working_bytes: u64,
    /// The same of the model that guesses.
    pub draft_working_bytes: u64,
}

/// Fits wishes to the device's free bytes: first the step is made smaller, then the cache.
///
/// # Errors
/// [`Error::TooSmall`] when not even the smallest step and cache fit, or an explicit context limit does not.
pub fn grant(config: &ModelConfig, wishes: Wishes, ledger: &Ledger) -> Result<Grant, Error> {
    let draft_block = wishes.draft.map_or(0, |(draft, kv_type)| kv_block_bytes(draft, kv_type));
    let draft_working = |rows| wishes.draft.map_or(0, |(draft, _)| working_bytes(draft, rows));
    let own_working =
        |rows| working_bytes(config, rows) + adapter_working_bytes(config, rows, wishes.adapter_rank);
    let takes = Takes {
        weights: 0,
        block: kv_block_bytes(config, wishes.kv_type) + draft_block,
        working: &|rows| own_working(rows) + draft_working(rows),
    };
    let granted = fit(config, wishes, takes, ledger)?;
    let rows = granted.max_batch_tokens;
    Ok(Grant { working_bytes: own_working(rows), draft_working_bytes: draft_working(rows), ..granted })
}

/// The same for a model that another device runs and whose weights are still to be loaded.
///
/// # Errors
/// As [`grant`].
pub fn grant_on(backend: &impl Backend, wishes: Wishes) -> Result<(Grant, Room), Error> {
    let config = backend.config();
    let context = wishes.context_limit.unwrap_or(config.max_position_embeddings);
    let most = |rows| Room {
        rows,
        sequences: wishes.max_seqs,
        context,
        blocks: usize::MAX,
        host_blocks: usize::MAX,
    };
    let takes = Takes {
        weights: backend.weight_bytes(),
        block: kv_block_bytes(config, wishes.kv_type),
        working: &|rows| backend.working_bytes(most(rows)),
    };
    let granted = fit(config, wishes, takes, backend.ledger())?;
    let Grant { blocks, host_blocks, context_limit: context, max_batch_tokens: rows, .. } = granted;
    Ok((granted, Room { rows, sequences: wishes.max_seqs, context, blocks, host_blocks }))
}

/// What a device holds of a model.
struct Takes<'a> {
    /// Bytes of weights still to be loaded.
    weights: u64,
    /// Bytes of a KV block.
    block: u64,
    /// Bytes between layers in a step of so many rows.
    working: &'a dyn Fn(usize) -> u64,
}

fn fit(config: &ModelConfig, wishes: Wishes, takes: Takes<'_>, ledger: &Ledger) -> Result<Grant, Error> {
    let Takes { weights, block, working: working_of } = takes;
    let context = wishes.context_limit.unwrap_or(config.max_position_embeddings);
    let least = if wishes.context_limit.is_some() { context } else { context.min(MIN_CONTEXT) };
    let least_kv = least.div_ceil(KV_BLOCK) as u64 * block;
    let later = wishes.adapter_bytes + weights;
    let free = ledger.free(Tier::Device).saturating_sub(later);
    let fewest_rows = wishes.max_seqs.max(MIN_BATCH_TOKENS.min(wishes.max_batch_tokens));
    let limited = ledger.budget().limit(Tier::Device).is_some();
    // Of a budget the cache gets half at least: sequences at once are worth more than long pieces of prompts.
    let most = if limited { (free - free / 2).min(free.saturating_sub(least_kv)) } else { free };
    let mut rows = wishes.max_batch_tokens;
    while rows > fewest_rows && working_of(rows) > most {
        rows = (rows / 2).max(fewest_rows);
    }
    let working_bytes = working_of(rows);
    refuse_unless_it_fits(later, working_bytes, least, least_kv, ledger)?;
    let default = if limited { free - working_bytes } else { DEFAULT_KV_BYTES.max(least_kv) };
    let affordable = wishes.kv_bytes.unwrap_or(default).min(free - working_bytes) / block;
    let useful = (wishes.max_seqs * context.div_ceil(KV_BLOCK)) as u64;
    let blocks = affordable.min(useful).min(u64::from(u32::MAX)) as usize;
    if blocks * KV_BLOCK < least {
        let asked = wishes.kv_bytes.unwrap_or(default);
        let what =
            format!("a KV cache of {asked} bytes holds fewer than {least} tokens; it needs {least_kv} bytes");
        return Err(Error::Config(what));
    }
    let context_limit = context.min(blocks * KV_BLOCK);
    let host_blocks = host_blocks(wishes.kv_host_bytes, block)?;
    let (max_batch_tokens, draft_working_bytes) = (rows, 0);
    Ok(Grant { blocks, host_blocks, context_limit, max_batch_tokens, working_bytes, draft_working_bytes })
}

fn host_blocks(bytes: u64, block: u64) -> Result<usize, Error> {
    match bytes / block {
        0 if bytes > 0 => Err(Error::Config(format!(
            "{bytes} bytes of host memory for evicted KV blocks hold none: one takes {block} bytes"
        ))),
        blocks => Ok(blocks.min(u64::from(u32::MAX)) as usize),
    }
}
