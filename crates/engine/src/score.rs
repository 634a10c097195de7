//! Logits of given tokens, a few rows at a time: what `hearth logits` and perplexity need.

use crate::api::SubmitError;
use crate::backend::Backend;
use crate::error::Error;
use crate::footprint::{self, Wishes};
use crate::kv::BlockTable;
use crate::loader::LoadedModel;
use crate::runner::{Forward, HEAD_ROWS, Runner, SequenceStep};
use crate::sampler::logprobs::LogSoftmax;
use hearth_kernels::paged::{KV_BLOCK, KvType};
use std::ops::Range;

/// Tokens per forward pass, as in the engine's default.
const CHUNK: usize = 512;

/// Scores one token sequence after another through the engine's own [`Runner`], so that bits agree with serving.
pub struct Scorer {
    runner: Box<dyn Forward + Send>,
    vocab: usize,
    table: BlockTable,
    context: usize,
    chunk: usize,
}

impl Scorer {
    /// For sequences of up to `context` tokens, which may be longer than the model was made for.
    ///
    /// # Errors
    /// [`Error::TooSmall`] when the device's budget does not hold a KV cache for that many.
    pub fn new(model: LoadedModel, context: usize) -> Result<Self, Error> {
        let wishes = wishes(context.max(1), model.kv_type());
        let grant = footprint::grant(model.config(), wishes, model.ledger())?;
        let blocks = context.max(1).div_ceil(KV_BLOCK);
        let vocab = model.config().vocab_size;
        let runner = Runner::new(model, blocks, 0, grant.working_bytes)?;
        Ok(Self::over(Box::new(runner), vocab, context.max(1), grant.max_batch_tokens))
    }

    /// The same for a model that another device runs.
    ///
    /// # Errors
    /// As [`Scorer::new`], and what the device reports.
    pub fn on(backend: impl Backend, context: usize) -> Result<Self, Error> {
        let (grant, room) = footprint::grant_on(&backend, wishes(context.max(1), backend.kv_type()))?;
        let vocab = backend.config().vocab_size;
        Ok(Self::over(backend.start(room)?, vocab, context.max(1), grant.max_batch_tokens))
    }

    fn over(runner: Box<dyn Forward + Send>, vocab: usize, context: usize, chunk: usize) -> Self {
        let table = (0..context.div_ceil(KV_BLOCK) as u32).collect();
        Self { runner, vocab, table, context, chunk }
    }

    /// Hands over the logits that follow each token of `wanted` (indices into `tokens`), in order. The sequence
    /// starts at position 0 and shares nothing with those before.
    ///
    /// # Errors
    /// [`Error::Request`] for no tokens, too many, or one outside the vocabulary; [`Error::Streaming`] when weights could not be
    /// read.
    pub fn score(
        &mut self,
        tokens: &[u32],
        wanted: Range<usize>,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        self.check(tokens)?;
        for start in (0..tokens.len()).step_by(self.chunk) {
            let end = tokens.len().min(start + self.chunk);
            let part = |p: usize| p.clamp(start, end) - start;
            let step = SequenceStep {
                tokens: tokens[start..end].to_vec(),
                first_position: start,
                prompt: tokens.len(),
                table: self.table.clone(),
                logits: part(wanted.start)..part(wanted.end),
                vectors: false,
                adapter: None,
            };
            self.runner.forward(&[step], &mut |_, token, logits| each(start + token, logits))?;
        }
        Ok(())
    }

    /// Negative log-likelihood of each token but the first, given those before it.
    ///
    /// # Errors
    /// As [`Scorer::score`], and [`Error::Config`] when the model's logits are not numbers.
    pub fn negative_log_likelihoods(&mut self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        let mut losses = Vec::with_capacity(tokens.len().saturating_sub(1));
        let mut failed = None;
        self.score(tokens, 0..tokens.len().saturating_sub(1), |position, logits| {
            match LogSoftmax::new(logits) {
                Ok(softmax) => losses.push(-softmax.of(tokens[position + 1])),
                Err(error) => {
                    failed.get_or_insert(format!("after token {position}: {error}"));
                }
            }
        })?;
        match failed {
            Some(what) => Err(Error::Config(what)),
            None => Ok(losses),
        }
    }

    fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        check_tokens(tokens, self.vocab)?;
        if tokens.len() > self.context {
            let (prompt, limit) = (tokens.len(), self.context);
            return Err(SubmitError::TooLong { prompt, max_tokens: 0, limit }.into());
        }
        Ok(())
    }
}

/// A sequence of so many tokens at a time.
fn wishes(context: usize, kv_type: KvType) -> Wishes<'static> {
    Wishes {
        max_seqs: 1,
        max_batch_tokens: CHUNK.min(context.max(HEAD_ROWS)),
        context_limit: Some(context),
        kv_bytes: None,
        kv_host_bytes: 0,
        kv_type,
        adapter_rank: 0,
        adapter_bytes: 0,
        draft: None,
    }
}

/// Refuses no tokens and tokens outside the vocabulary.
pub(crate) fn check_tokens(tokens: &[u32], vocab: usize) -> Result<(), SubmitError> {
    if tokens.is_empty() {
        return Err(SubmitError::EmptyPrompt);
    }
    match tokens.iter().position(|&id| id as usize >= vocab) {
        Some(position) => Err(SubmitError::TokenOutOfRange { id: tokens[position], position, vocab }),
        None => Ok(()),
    }
}
