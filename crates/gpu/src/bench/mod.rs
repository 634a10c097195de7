//! How fast a card is, against its own copies.
//!
//! # Layout
//! - this file: what is measured, and how a time is taken.
//! - `kernels`: copies within the card, products of one row, AdamW.
//! - `streaming`: pinned copies, alone and while kernels compute.
//! - `decoding`: whole models of random weights, a token at a time.
//! - `training`: steps of such models, and full fine-tuning within a budget.

mod decoding;
mod kernels;
mod streaming;
mod training;

pub(crate) use training::Noise;
pub use training::Training;

use crate::Error;
use hearth_cuda::runtime::{Device, Event, Stream};
use serde::Serialize;
use std::sync::Arc;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Enough to pass every cache: gigabytes and minutes.
    Full,
    /// Enough to see that it works: figures mean nothing.
    Tiny,
}

impl Extent {
    /// One of two numbers.
    fn pick(self, full: usize, tiny: usize) -> usize {
        if self == Extent::Full { full } else { tiny }
    }
}

/// A measured speed.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// What was done.
    pub what: String,
    /// Bytes that had to move, per run.
    pub bytes: u64,
    /// Median time of a run.
    pub seconds: f64,
    /// What it is held against.
    pub against: Against,
    /// Its share of that; 1 for what is itself a measure.
    pub share: f64,
    /// The share that the project aims at, where it does.
    pub goal: Option<f64>,
}

/// What a speed is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Against {
    /// Copies within the card, bytes read and written both counted.
    CardCopy,
    /// Copies from pinned memory to the card.
    PinnedCopy,
}

impl Speed {
    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Speeds in the order they were found.
    pub speeds: Vec<Speed>,
    /// Training steps.
    pub training: Vec<Training>,
    /// A sentence for each model that the card, or the budget, is too small for.
    pub left_out: Vec<String>,
}

/// Measures everything. `each` hears of every speed as it is found.
///
/// # Errors
/// [`Error::Card`]: no room even for kernels alone, or a lost card.
pub fn run(card: &Arc<Device>, extent: Extent, mut each: impl FnMut(&Speed)) -> Result<Measured, Error> {
    let mut speeds: Vec<Speed> = Vec::new();
    let mut found = |speed: Speed| {
        each(&speed);
        speeds.push(speed);
    };
    let bench = Bench { stream: card.stream()?, extent };
    let copy = kernels::copy(&bench)?;
    let base = copy.bandwidth();
    found(copy);
    kernels::products(&bench, base, &mut found)?;
    found(kernels::adamw(&bench, base)?);
    streaming::run(&bench, &mut found)?;
    let mut left_out = decoding::run(card, extent, base, &mut found)?;
    let mut trained = Vec::new();
    left_out.extend(training::run(card, extent, &mut |steps| trained.push(steps))?);
    Ok(Measured { speeds, training: trained, left_out })
}

/// What a card's memory and its link do, in bytes per second.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Copies {
    /// Within the card; bytes read and written both count.
    pub within: f64,
    /// From pinned memory to the card.
    pub to_card: f64,
    /// Back.
    pub to_host: f64,
}

/// Measures copies alone: no kernel is compiled. Takes little memory and a fraction of a second.
///
/// # Errors
/// [`Error::Card`]: no room, or a lost card.
pub fn copies(card: &Arc<Device>) -> Result<Copies, Error> {
    let len = usize::try_from(card.memory()?.free / 64).unwrap_or(usize::MAX).clamp(1 << 12, 1 << 28);
    let bench = Bench { stream: card.stream()?, extent: Extent::Full };
    let within = 2.0 * len as f64 / kernels::copy_seconds(&bench, len)?;
    let (to_card, to_host) = streaming::copy_seconds(&bench, len)?;
    Ok(Copies { within, to_card: len as f64 / to_card, to_host: len as f64 / to_host })
}

/// A stream to measure on.
struct Bench {
    stream: Stream,
    extent: Extent,
}

impl Bench {
    fn card(&self) -> &Arc<Device> {
        self.stream.device()
    }

    /// Median seconds of a run by the card's clock, after one that does not count.
    fn time(&self, mut send: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
        send()?;
        let mut times = Vec::new();
        for _ in 0..self.extent.pick(15, 1) {
            let (start, end) = (Event::timed(self.card())?, Event::timed(self.card())?);
            start.record(&self.stream)?;
            send()?;
            end.record(&self.stream)?;
            times.push(start.seconds_to(&end)?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2].max(1e-9))
    }
}

/// A speed beside what it is held against.
fn speed(what: String, bytes: usize, seconds: f64, base: f64, goal: f64) -> Speed {
    let share = bytes as f64 / seconds / base;
    Speed { what, bytes: bytes as u64, seconds, against: Against::CardCopy, share, goal: Some(goal) }
}
