//! What a step moves, and how long that takes on a machine of known speeds.

use serde::Serialize;

/// What one step of one rank moves and computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Traffic {
    /// Bytes read from the nvme tier while the model is computed.
    pub disk_read: u64,
    /// Bytes written to it while the model is computed.
    pub disk_written: u64,
    /// Bytes the update reads from it.
    pub update_read: u64,
    /// Bytes the update writes to it.
    pub update_written: u64,
    /// Bytes of state the update reads and writes in memory.
    pub update_memory: u64,
    /// Bytes that come from other ranks.
    pub received: u64,
    /// Floating-point operations, those of recomputation included.
    pub flops: f64,
}

/// What this machine does in a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speeds {
    /// Floating-point operations of the model, as trained here.
    pub flops: f64,
    /// Bytes from the nvme tier.
    pub disk_read: f64,
    /// Bytes to it.
    pub disk_write: f64,
    /// Bytes from and to it at once, together.
    pub disk_both: f64,
    /// Bytes the optimizer reads and writes in memory.
    pub memory: f64,
    /// Bytes from the other ranks.
    pub link: f64,
}

/// How long a step takes, by what takes it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Seconds of arithmetic.
    pub compute_s: f64,
    /// Seconds of reading and writing beside it.
    pub disk_s: f64,
    /// Seconds of exchange between ranks beside it.
    pub exchange_s: f64,
    /// Seconds of the update.
    pub update_s: f64,
    /// Seconds of the step: the longest of the first three, then the update.
    pub step_s: f64,
    /// What the step would be shorter by more of: `compute`, `disk`, `link` or `memory`.
    pub bound_by: &'static str,
}

impl Traffic {
    /// The step on `ranks` ranks that share one machine of these speeds.
    pub fn time(&self, speeds: &Speeds, ranks: usize) -> StepTime {
        let ranks = ranks as f64;
        let compute_s = ranks * self.flops / speeds.flops;
        let disk_s =
            ranks * (self.disk_read as f64 / speeds.disk_read + self.disk_written as f64 / speeds.disk_write);
        let exchange_s = ranks * self.received as f64 / speeds.link;
        let update_disk = ranks * (self.update_read + self.update_written) as f64 / speeds.disk_both;
        let update_memory = ranks * self.update_memory as f64 / speeds.memory;
        let update_s = update_disk.max(update_memory);
        let passes = compute_s.max(disk_s).max(exchange_s);
        let step_s = passes + update_s;
        // What the whole step spends most on, the update's share with the resource that bounds it.
        let by = |share: f64, bound: f64| if bound == passes { share + passes } else { share };
        let disk_update = if update_disk >= update_memory { update_disk } else { 0.0 };
        let memory_update = update_s - disk_update;
        let candidates = [
            ("compute", by(0.0, compute_s)),
            ("disk", by(disk_update, disk_s)),
            ("link", by(0.0, exchange_s)),
            ("memory", memory_update),
        ];
        let longest = candidates.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("four of them");
        StepTime { compute_s, disk_s, exchange_s, update_s, step_s, bound_by: longest.0 }
    }
}
