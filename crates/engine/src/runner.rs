//! Runs the model over one step's tokens.

use crate::adapter::{AdaptedRows, Adapter};
use crate::error::Error;
use crate::footprint;
use crate::kv::{BlockTable, Move};
use crate::loader::LoadedModel;
use burn::tensor::{Int, Tensor, TensorData};
use hearth_kernels::paged::{self, BlockWeights, KvCache, SequenceRows, Workspace, attention_paged};
use hearth_memory::{Charge, Kind, Tier};
use hearth_model::{AttentionContext, AttentionSpec, RotaryTable, RowPosition};
use std::ops::Range;
use std::sync::Arc;

/// Most rows of logits that exist at once: rows × vocabulary is far more than the model's other values.
pub const HEAD_ROWS: usize = 64;

/// A sequence's share of a forward pass.
#[derive(Clone, Debug)]
pub struct SequenceStep {
    /// Tokens to compute, in order; not empty.
    pub tokens: Vec<u32>,
    /// Position of the first of them in its sequence. All before it are in the cache.
    pub first_position: usize,
    /// Tokens of the sequence's prompt: the least length dynamic RoPE scaling sees.
    pub prompt: usize,
    /// The sequence's KV blocks, at least up to its last token here.
    pub table: BlockTable,
    /// Which of `tokens` want the logits that follow them.
    pub logits: Range<usize>,
    /// Instead of logits those tokens want their own vectors, the final norm's output.
    pub vectors: bool,
    /// Laid over the model for these tokens.
    pub adapter: Option<Arc<Adapter>>,
}

/// Receives logits: index of the sequence in the step, index of the token in it, `[vocab]`, or `[d_model]` where
/// vectors were asked for.
pub type EachRow<'a> = dyn FnMut(usize, usize, &[f32]) + 'a;

/// Whatever turns tokens into logits, one step at a time.
pub trait Forward {
    /// Computes a step's tokens and hands over the logits asked for, in order.
    ///
    /// # Errors
    /// When weights could not be had, or the device could not compute. The step's tokens count as not computed; the next step
    /// may work.
    fn forward(&mut self, step: &[SequenceStep], each: &mut EachRow) -> Result<(), Error>;

    /// Whether the weights of a step can be had again, after a step found that they could not.
    ///
    /// # Errors
    /// When they still cannot.
    fn check(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Moves KV blocks between device and host, in order.
    fn move_blocks(&mut self, moves: &[Move]);

    /// After a step that failed: why no later one can work either, if that is so. Then the engine ends.
    fn is_lost(&self) -> Option<String> {
        None
    }
}

impl<F: Forward + ?Sized> Forward for Box<F> {
    fn forward(&mut self, step: &[SequenceStep], each: &mut EachRow) -> Result<(), Error> {
        (**self).forward(step, each)
    }

    fn check(&mut self) -> Result<(), Error> {
        (**self).check()
    }

    fn move_blocks(&mut self, moves: &[Move]) {
        (**self).move_blocks(moves);
    }

    fn is_lost(&self) -> Option<String> {
        (**self).is_lost()
    }
}

/// A resident model with its KV cache.
pub struct Runner {
    model: LoadedModel,
    cache: KvCache,
    /// What the device has no room for.
    host: KvCache,
    space: Workspace,
    /// Of up to [`HEAD_ROWS`] rows.
    logits: Vec<f32>,
    /// KV cache, values between layers, and what lies on the host.
    _charges: [Charge; 3],
}

impl Runner {
    /// A model with `blocks` KV blocks on the device, `host_blocks` more on the host and `working_bytes` for values between
    /// layers, charged to its ledger.
    ///
    /// # Errors
    /// [`Error::Memory`] when the budget does not hold them.
    pub fn new(
        model: LoadedModel,
        blocks: usize,
        host_blocks: usize,
        working_bytes: u64,
    ) -> Result<Self, Error> {
        let (c, kind, ledger) = (model.config(), model.kv_type(), model.ledger());
        let block = footprint::kv_block_bytes(c, kind);
        let charges = [
            ledger.charge(Tier::Device, Kind::KvCache, blocks as u64 * block)?,
            ledger.charge(Tier::Device, Kind::Activations, working_bytes)?,
            ledger.charge(Tier::Host, Kind::KvCache, host_blocks as u64 * block)?,
        ];
        let cache = |blocks| KvCache::new(c.num_layers, blocks, c.num_kv_heads, c.head_dim, kind);
        let (cache, host) = (cache(blocks), cache(host_blocks));
        Ok(Self { cache, host, space: Workspace::default(), logits: Vec::new(), model, _charges: charges })
    }

    /// The model.
    pub fn model(&self) -> &LoadedModel {
        &self.model
    }

    /// Tokens through embedding and blocks: `[rows, d_model]`.
    fn hidden(&mut self, step: &[SequenceStep]) -> Result<Tensor<2>, Error> {
        let parts = self.model.parts();
        let ids: Vec<u32> = step.iter().flat_map(|s| s.tokens.iter().copied()).collect();
        let rows: Vec<RowPosition> = step.iter().flat_map(SequenceStep::row_positions).collect();
        let mut context = PagedContext {
            cache: &mut self.cache,
            sequences: sequence_rows(step),
            rotary: Arc::new(parts.rope.table(&rows)),
            adapted: AdaptedRows::of(step),
        };
        if !context.adapted.is_empty() {
            // Then blocks run op by op, in the memory that was charged for it all.
            self.space = Workspace::default();
        }
        let mut x = Some(parts.embed(&ids)?);
        parts.each_block(|layer, block| {
            let fused = block.fused().filter(|_| context.adapted.is_empty());
            x = x.take().map(|x| match fused {
                Some(fused) => context.run(fused, layer, x, &mut self.space),
                None => block.forward(x, &mut context),
            });
        })?;
        Ok(x.expect("every block gives back what it takes"))
    }
}

impl Forward for Runner {
    fn forward(&mut self, step: &[SequenceStep], each: &mut EachRow) -> Result<(), Error> {
        let x = self.hidden(step)?;
        let parts = self.model.parts();
        let (vectors, logits): (Vec<_>, Vec<_>) =
            wanted_rows(step).into_iter().partition(|w| step[w.sequence].vectors);
        for wanted in logits.chunks(HEAD_ROWS) {
            parts.head.logits_into(rows_of(&x, wanted), &mut self.logits);
            hand_over(wanted, &self.logits, parts.config.vocab_size, each);
        }
        for wanted in vectors.chunks(HEAD_ROWS) {
            let rows = parts.head.vectors(rows_of(&x, wanted)).into_data();
            let rows = rows.try_into_vec::<f32>().expect("inference runs in f32");
            hand_over(wanted, &rows, parts.config.hidden_size, each);
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), Error> {
        let parts = self.model.parts();
        parts.embed(&[0])?;
        parts.each_block(|_, _| ())
    }

    fn move_blocks(&mut self, moves: &[Move]) {
        for one in moves {
            match *one {
                Move::Out { block, slot } => self.host.copy_block(slot, &self.cache, block),
                Move::Back { slot, block } => self.cache.copy_block(block, &self.host, slot),
                Move::Swap { block, slot } => self.cache.swap_block(block, &mut self.host, slot),
            }
        }
    }
}

fn rows_of(x: &Tensor<2>, wanted: &[WantedRow]) -> Tensor<2> {
    let rows: Vec<i32> = wanted.iter().map(|w| w.row as i32).collect();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [wanted.len()]), &x.device());
    x.clone().select(0, rows)
}

fn hand_over(wanted: &[WantedRow], rows: &[f32], width: usize, each: &mut EachRow) {
    for (w, row) in wanted.iter().zip(rows.chunks_exact(width)) {
        each(w.sequence, w.token, row);
    }
}

impl SequenceStep {
    fn row_positions(&self) -> impl Iterator<Item = RowPosition> {
        let prompt = self.prompt;
        (self.first_position..self.first_position + self.tokens.len())
            .map(move |p| RowPosition { position: p as u32, length: prompt.max(p + 1) as u32 })
    }
}

/// Where each sequence's tokens lie among the rows of the pass.
fn sequence_rows(step: &[SequenceStep]) -> Vec<SequenceRows> {
    let mut end = 0;
    let rows = |s: &SequenceStep| {
        let start = end;
        end += s.tokens.len();
        SequenceRows { rows: start..end, first_position: s.first_position, table: s.table.clone() }
    };
    step.iter().map(rows).collect()
}

/// A row whose logits are asked for.
struct WantedRow {
    sequence: usize,
    token: usize,
    row: usize,
}

fn wanted_rows(step: &[SequenceStep]) -> Vec<WantedRow> {
    let mut first = 0;
    let mut wanted = Vec::new();
    for (sequence, s) in step.iter().enumerate() {
        wanted.extend(s.logits.clone().map(|token| WantedRow { sequence, token, row: first + token }));
        first += s.tokens.len();
    }
    wanted
}

/// Attention that writes to and reads from the paged cache.
struct PagedContext<'a> {
    cache: &'a mut KvCache,
    sequences: Vec<SequenceRows>,
    rotary: Arc<RotaryTable>,
    adapted: AdaptedRows,
}

impl PagedContext<'_> {
    /// A block in one piece.
    fn run(&mut self, block: &BlockWeights, layer: usize, x: Tensor<2>, space: &mut Workspace) -> Tensor<2> {
        paged::block(x, block, self.cache, layer, &self.sequences, &self.rotary, space)
    }
}

impl AttentionContext for PagedContext<'_> {
    fn rotary(&self) -> &Arc<RotaryTable> {
        &self.rotary
    }

    fn attend(
        &mut self,
        layer: usize,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        spec: AttentionSpec,
    ) -> Tensor<3> {
        attention_paged(q, k, v, self.cache, layer, &self.sequences, spec)
    }

    fn adapt(&mut self, layer: &str, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        self.adapted.adapt(layer, x, y)
    }
}
