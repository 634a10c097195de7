//! A card as the engine's device: `Engine::start_on` plans, samples and answers, the card computes.

use crate::model::{Span, is_quantized, shape_of, weight_bytes};
use crate::{CardModel, Error};
use half::{bf16, f16};
use hearth_cuda::decoder::{self, Capacity, PROMPT_ROWS, Wanted};
use hearth_cuda::ops::paged::CacheElement;
use hearth_cuda::runtime::Device;
use hearth_engine::kv::Move;
use hearth_engine::runner::{EachRow, Forward, SequenceStep};
use hearth_engine::{Activations, Arithmetic, Backend, KvType, Room};
use hearth_memory::Ledger;
use hearth_weights::{ModelConfig, ModelFiles};
use std::panic::resume_unwind;
use std::sync::Arc;

/// A model that a card is to run.
pub struct CardBackend<'a> {
    device: Arc<Device>,
    files: &'a ModelFiles,
    kv_type: KvType,
    weight_bytes: u64,
    tell: &'a dyn Fn(&str),
}

impl<'a> CardBackend<'a> {
    /// Checks what can be known before anything is loaded. Everything is charged to the ledger that the card was opened with.
    ///
    /// # Errors
    /// A sentence for an architecture or a number format that the card's kernels do not compute, and for files that do not
    /// hold what their configuration says.
    pub fn new(
        device: &Arc<Device>,
        files: &'a ModelFiles,
        arithmetic: impl Into<Arithmetic>,
    ) -> Result<Self, Error> {
        let arithmetic = arithmetic.into();
        let quantized = is_quantized(files);
        if quantized && arithmetic.activations == Activations::F32 {
            return Err(Error::Activations);
        }
        // As on the CPU: halves beside products that round anyway.
        let kv_type = arithmetic.kv_type.unwrap_or(if quantized { KvType::F16 } else { KvType::F32 });
        let weight_bytes = weight_bytes(files)?;
        shape_of(&files.config).check()?;
        Ok(Self { device: device.clone(), files, kv_type, weight_bytes, tell: &|_| () })
    }

    /// Says to the user what is not as good as it could be.
    pub fn telling(self, tell: &'a dyn Fn(&str)) -> Self {
        Self { tell, ..self }
    }

    fn runner<T: CacheElement>(&self, capacity: Capacity) -> Result<Box<dyn Forward + Send>, Error>
    where
        CardModel<T>: Send,
    {
        let mut model = CardModel::<T>::load(&self.device, self.files, capacity)?;
        // A compiler that is missing or refuses a kernel is found now, not by the first request.
        for tokens in [1, PROMPT_ROWS.min(capacity.rows).min(capacity.context)] {
            model.step(&[first_span(&vec![0; tokens])], &mut |_, _, _| ())?;
        }
        if let Some(refusal) = model.refusal() {
            (self.tell)(refusal);
        }
        Ok(Box::new(Runner { model, lost: None }))
    }
}

impl Backend for CardBackend<'_> {
    fn config(&self) -> &ModelConfig {
        &self.files.config
    }

    fn ledger(&self) -> &Ledger {
        self.device.ledger()
    }

    fn kv_type(&self) -> KvType {
        self.kv_type
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn working_bytes(&self, room: Room) -> u64 {
        capacity(room).working_bytes(&shape_of(&self.files.config))
    }

    fn start(self, room: Room) -> Result<Box<dyn Forward + Send>, hearth_engine::Error> {
        let started = match self.kv_type {
            KvType::F32 => self.runner::<f32>(capacity(room)),
            KvType::F16 => self.runner::<f16>(capacity(room)),
            KvType::Int8 => self.runner::<i8>(capacity(room)),
            KvType::Bf16 => self.runner::<bf16>(capacity(room)),
        };
        started.map_err(|error| hearth_engine::Error::Device(Box::new(error)))
    }
}

/// Tokens in the first KV block, of which nothing will be read.
fn first_span(tokens: &[u32]) -> Span<'_> {
    let wanted = tokens.len() - 1..tokens.len();
    Span { tokens, position: 0, length: 0, table: &[0], wanted, what: Wanted::Logits }
}

fn capacity(room: Room) -> Capacity {
    let Room { rows, sequences, context, blocks, host_blocks } = room;
    Capacity { rows, sequences, context, blocks, host_blocks }
}

/// A model on a card, step by step.
struct Runner<T> {
    model: CardModel<T>,
    /// Why the card does not work any more.
    lost: Option<String>,
}

impl<T> Runner<T> {
    /// Remembers a card that is gone.
    fn failed(&mut self, error: Error) -> hearth_engine::Error {
        if error.is_lost() {
            self.lost = Some(error.to_string());
        }
        hearth_engine::Error::Device(Box::new(error))
    }
}

impl<T: CacheElement> Forward for Runner<T> {
    fn forward(&mut self, step: &[SequenceStep], each: &mut EachRow) -> Result<(), hearth_engine::Error> {
        let spans: Vec<Span<'_>> = step.iter().map(span).collect();
        let computed = self.model.step(&spans, each);
        computed.map_err(|error| self.failed(error))
    }

    fn move_blocks(&mut self, moves: &[Move]) {
        let moves: Vec<_> = moves.iter().map(on_card).collect();
        if let Err(error) = self.model.move_blocks(&moves) {
            // Not a bug of ours, so not through the panic hook. What lies where is not known any more: the engine ends.
            resume_unwind(Box::new(self.failed(error).to_string()));
        }
    }

    fn is_lost(&self) -> Option<String> {
        self.lost.clone()
    }
}

fn on_card(one: &Move) -> decoder::Move {
    match *one {
        Move::Out { block, slot } => decoder::Move::Out { block, slot },
        Move::Back { slot, block } => decoder::Move::Back { slot, block },
        Move::Swap { block, slot } => decoder::Move::Swap { block, slot },
    }
}

fn span(step: &SequenceStep) -> Span<'_> {
    Span {
        tokens: &step.tokens,
        position: step.first_position,
        length: step.prompt,
        table: &step.table,
        wanted: step.logits.clone(),
        what: if step.vectors { Wanted::Vectors } else { Wanted::Logits },
    }
}
