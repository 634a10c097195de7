//! Whole models of random weights, a token at a time.

use super::{Extent, Speed, speed};
use crate::Error;
use half::f16;
use hearth_cuda::decoder::weights::{HostMatrix, Source};
use hearth_cuda::decoder::{Capacity, Decoder, Part, Shape, Wanted, blocks_of};
use hearth_cuda::ops::quant::Format;
use hearth_cuda::runtime::Device;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

/// Dimensions of a real model.
pub(super) struct Named {
    pub name: &'static str,
    pub hidden: usize,
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub layers: usize,
    pub vocab: usize,
}

impl Named {
    pub fn shape(&self) -> Shape {
        Shape {
            hidden: self.hidden,
            inner: self.inner,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.hidden / self.heads,
            vocab: self.vocab,
            eps: 1e-5,
            windows: vec![0; self.layers],
        }
    }
}

/// By ascending size.
pub(super) const MODELS: [Named; 4] = [
    Named { name: "135M", hidden: 576, inner: 1536, heads: 9, kv_heads: 3, layers: 30, vocab: 49152 },
    Named { name: "1.1B", hidden: 2048, inner: 5632, heads: 32, kv_heads: 4, layers: 22, vocab: 32000 },
    Named { name: "3B", hidden: 3072, inner: 8192, heads: 24, kv_heads: 8, layers: 28, vocab: 128256 },
    Named { name: "8B", hidden: 4096, inner: 14336, heads: 32, kv_heads: 8, layers: 32, vocab: 128256 },
];
pub(super) const SMALL: [Named; 1] =
    [Named { name: "tiny", hidden: 64, inner: 96, heads: 8, kv_heads: 4, layers: 2, vocab: 96 }];

/// Each model in two formats, one sequence; gives a sentence for each that there is no room for.
pub fn run(
    card: &Arc<Device>,
    extent: Extent,
    base: f64,
    found: &mut dyn FnMut(Speed),
) -> Result<Vec<String>, Error> {
    let models = if extent == Extent::Full { &MODELS[..] } else { &SMALL[..] };
    let mut left_out = Vec::new();
    for model in models {
        for format in ["q8_0", "q4_0"] {
            let format = Format::by_name(format).expect("a format of ours");
            match decode(card, extent, model, format, base) {
                Ok(speed) => found(speed),
                Err(Error::Card(error)) if error.is_no_room() => {
                    left_out.push(format!("decoding {} in {}: {error}", model.name, format.name));
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(left_out)
}

fn decode(
    card: &Arc<Device>,
    extent: Extent,
    model: &Named,
    format: &'static Format,
    base: f64,
) -> Result<Speed, Error> {
    let (first, steps) = (extent.pick(128, 2), extent.pick(128, 3));
    let context = first + steps;
    let shape = model.shape();
    let half = shape.head_dim / 2;
    let capacity = Capacity { rows: 1, sequences: 1, context, blocks: blocks_of(context), host_blocks: 0 };
    let mut weights = Blocks { format, bytes: 0 };
    let mut decoder = Decoder::<f16>::new(card, shape, capacity, &mut weights)?;
    let (embedding, cos, sin) = (vec![0.5; model.hidden], vec![1.0; half], vec![0.0; half]);
    let table: Vec<u32> = (0..capacity.blocks as u32).collect();
    let mut step = |position| {
        let (embeddings, cos, sin, table) = (&embedding[..], &cos[..], &sin[..], &table[..]);
        let part = Part { embeddings, position, cos, sin, table, wanted: 0..1, what: Wanted::Logits };
        decoder.step(&[part], &mut |_, _, _| ())
    };
    for position in 0..first {
        step(position)?;
    }
    let start = Instant::now();
    for position in first..context {
        step(position)?;
    }
    // By the host's clock: what a user waits, copies of logits included.
    let seconds = start.elapsed().as_secs_f64() / steps as f64;
    let what = format!("decoding {} in {}, batch 1: {:.0} tokens/s", model.name, format.name, 1.0 / seconds);
    Ok(speed(what, weights.bytes, seconds, base, 0.7))
}

/// Weights of one block repeated, and how many bytes they are.
struct Blocks {
    format: &'static Format,
    bytes: usize,
}

impl Source<Error> for Blocks {
    fn matrix(&mut self, _name: &str, [rows, columns]: [usize; 2]) -> Result<HostMatrix<'_>, Error> {
        let len = self.format.bytes_of(rows, columns).expect("shapes of whole blocks");
        self.bytes += len;
        let mut block: Vec<u8> = (0..self.format.bytes).map(|i| (i * 37) as u8).collect();
        block[..2].copy_from_slice(&f16::from_f32(1e-3).to_le_bytes());
        let bytes = block.repeat(len / block.len());
        Ok(HostMatrix::Blocks { format: self.format, bytes: Cow::Owned(bytes) })
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        let of_heads = name.ends_with("q_norm") || name.ends_with("k_norm");
        Ok((!of_heads).then(|| vec![1.0; len]))
    }

    fn bias(&mut self, _name: &str, _len: usize) -> Result<Option<Vec<f32>>, Error> {
        Ok(None)
    }
}
