//! How fast a placement can decode: the resource that a step waits for.
//!
//! A step of a batch `b` takes at least the longest of reading the streamed weights from disk, reading all weights and the
//! keys and values of the batch in memory, and the arithmetic, `2·P·b` operations:
//! `T(b) = max(nvme/B_nvme, (W + b·κS)/B_memory, 2·P·b/F)`, and the tokens per second of all sequences are `b/T(b)`. That is
//! so with full overlap; where one processor does the last two, the truth lies between the longest and the sum.

/// What the machine does in a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// Bytes read from disk; nothing where it is not read.
    pub nvme: Option<f64>,
    /// Bytes read from memory.
    pub memory: f64,
    /// Floating-point operations.
    pub flops: f64,
}

/// What a step of decoding goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Bytes of all weights, wherever they lie.
    pub weights: u64,
    /// Bytes of keys and values behind each sequence.
    pub kv: u64,
    /// Operations per token.
    pub operations: u64,
}

/// What a step waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Weights from disk.
    Nvme,
    /// Weights, keys and values from memory.
    Memory,
    /// The processor.
    Arithmetic,
}

impl Resource {
    /// In the words of reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nvme => "nvme",
            Self::Memory => "memory",
            Self::Arithmetic => "arithmetic",
        }
    }
}

/// One step of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Sequences.
    pub batch: u64,
    /// Seconds it takes at least.
    pub seconds: f64,
    /// The resource that takes these.
    pub bound_by: Resource,
}

impl Step {
    /// Tokens per second of all sequences.
    pub fn tok_s(&self) -> f64 {
        self.batch as f64 / self.seconds.max(1e-12)
    }
}

impl Load {
    /// A step of `batch` sequences with `nvme` bytes of the weights on disk.
    pub fn step(&self, batch: u64, nvme: u64, speeds: Speeds) -> Step {
        self.step_of(batch, batch, nvme, speeds)
    }

    /// The same where the sequences have `rows` tokens in the step together.
    pub fn step_of(&self, batch: u64, rows: u64, nvme: u64, speeds: Speeds) -> Step {
        let over = |amount: u64, speed: f64| amount as f64 / speed;
        let times = [
            (Resource::Nvme, speeds.nvme.map_or(0.0, |speed| over(nvme, speed))),
            (Resource::Memory, over(self.weights + batch * self.kv, speeds.memory)),
            (Resource::Arithmetic, over(self.operations * rows, speeds.flops)),
        ];
        let longest = times.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("three of them");
        Step { batch, seconds: longest.1, bound_by: longest.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: Load = Load { weights: 900, kv: 100, operations: 20 };

    fn speeds(nvme: Option<f64>) -> Speeds {
        Speeds { nvme, memory: 1000.0, flops: 100.0 }
    }

    #[test]
    fn a_step_takes_as_long_as_what_it_waits_for_longest() {
        // Disk 600/200 = 3 s, memory (900 + 100)/1000 = 1 s, arithmetic 20/100 = 0.2 s.
        let one = LOAD.step(1, 600, speeds(Some(200.0)));
        assert_eq!((one.seconds, one.bound_by), (3.0, Resource::Nvme));
        // Memory (900 + 1100)/1000 = 2 s, arithmetic 220/100 = 2.2 s; nothing on disk.
        let eleven = LOAD.step(11, 0, speeds(None));
        assert_eq!((eleven.seconds, eleven.bound_by), (2.2, Resource::Arithmetic));
        assert_eq!(eleven.tok_s(), 5.0);
        let four = LOAD.step(4, 0, speeds(None));
        assert_eq!((four.seconds, four.bound_by), (1.3, Resource::Memory));
    }
}
