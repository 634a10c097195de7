use crate::{driver, nvrtc};

/// Why a card does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No driver, too old a one, no card.
    #[error(transparent)]
    Driver(#[from] driver::Error),
    /// No compiler, or it refuses a kernel.
    #[error(transparent)]
    Nvrtc(#[from] nvrtc::Error),
    /// The card's budget is spent.
    #[error(transparent)]
    Budget(#[from] hearth_memory::Error),
    /// There are fewer cards.
    #[error("there is no card cuda:{ordinal}: the driver lists {count}")]
    NoSuchCard {
        /// The one asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// A card from before what the kernels need.
    #[error("{name} has compute capability {major}.{minor}, 8.0 or newer is needed")]
    Unsupported {
        /// Its name.
        name: String,
        /// Major.
        major: i32,
        /// Minor.
        minor: i32,
    },
    /// The card is full, whatever the budget says: somebody else holds memory.
    #[error("the card has no {needed} bytes, {free} are free: another program may hold the rest")]
    OutOfMemory {
        /// Bytes asked for.
        needed: u64,
        /// Bytes the driver says are free.
        free: u64,
    },
    /// The card does not work any more for this process.
    #[error(
        "the card was lost at {call}: code {code} ({text}); what was on it is gone, a new process may find it again"
    )]
    Lost {
        /// Function.
        call: &'static str,
        /// Its result.
        code: i32,
        /// What the driver calls it.
        text: String,
    },
    /// A call failed and the card still works.
    #[error("the NVIDIA driver: {call} failed with code {code} ({text})")]
    Call {
        /// Function.
        call: &'static str,
        /// Its result.
        code: i32,
        /// What the driver calls it.
        text: String,
    },
    /// Neither an image for this card nor PTX was taken.
    #[error("{file} cannot be loaded on a card of compute capability {major}.{minor}: {why}")]
    NoCode {
        /// File of kernels.
        file: &'static str,
        /// Major.
        major: i32,
        /// Minor.
        minor: i32,
        /// For each thing tried, what the driver said.
        why: String,
    },
    /// Something that would end a recording.
    #[error("{what} cannot be part of recorded work")]
    Capturing {
        /// What it is.
        what: &'static str,
    },
    /// An argument of an op has the wrong length.
    #[error("{op}: {argument} has {len} elements, {needed} are needed")]
    Length {
        /// Op.
        op: &'static str,
        /// Argument.
        argument: &'static str,
        /// Its length.
        len: usize,
        /// What the shape asks for.
        needed: usize,
    },
    /// A view begins where kernels cannot read whole vectors.
    #[error("{op}: {argument} begins at byte {offset}, not at a multiple of 16")]
    Alignment {
        /// Op.
        op: &'static str,
        /// Argument.
        argument: &'static str,
        /// Where it begins within its buffer.
        offset: usize,
    },
    /// A number that an op cannot work with.
    #[error("{op}: {argument} is {value}, {limit} is needed")]
    Value {
        /// Op.
        op: &'static str,
        /// Argument.
        argument: &'static str,
        /// Its value.
        value: usize,
        /// What would be right.
        limit: String,
    },
    /// A step whose loss or gradients are no numbers.
    #[error("the loss is {loss} and the norm of its gradients {grad_norm}: nothing was updated")]
    NotFinite {
        /// Mean loss.
        loss: f64,
        /// Norm.
        grad_norm: f64,
    },
    /// A stretch outside a buffer.
    #[error("elements {from}..{to} of a buffer of {len}")]
    Range {
        /// First.
        from: usize,
        /// One past the last.
        to: usize,
        /// How many there are.
        len: usize,
    },
}

impl Error {
    /// Whether the card is gone: whoever trains keeps the last checkpoint and ends.
    pub fn is_lost(&self) -> bool {
        matches!(self, Error::Lost { .. })
    }

    /// Whether there was no room, by the budget or on the card: less would have worked.
    pub fn is_no_room(&self) -> bool {
        matches!(self, Error::Budget(_) | Error::OutOfMemory { .. })
    }
}
