//! How long an operation may last, and what is said when it lasts longer.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, thread};

use crate::call::Call;
use crate::{Error, Operation, mpi};

/// How long an operation may last when nobody says. The slowest step that ranks wait for is another rank's checkpoint
/// to a slow disk.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// The exit code of a process whose ranks waited in vain: a launcher may restart it from its last checkpoint.
pub const EXIT_CODE: i32 = 75;

/// How long a process stays after its diagnosis. A launcher ends all ranks as soon as one of them has ended; those that
/// wait for the same rank have their say until then.
const GRACE: Duration = Duration::from_secs(1);

/// Watches the operations of an [`Ordered`](crate::Ordered).
#[derive(Clone)]
pub struct Watchdog {
    /// How long an operation may last, from its start (not from its call: operations before it have their own time).
    pub timeout: Duration,
    /// Told of a timeout as soon as there is one, on the communication thread, before the caller is. The caller may be
    /// deep in a computation that it waits for nothing in.
    pub on_timeout: Arc<dyn Fn(&Diagnosis) + Send + Sync>,
}

impl Watchdog {
    /// Ends operations after `timeout` and tells nobody but the caller.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, on_timeout: Arc::new(|_| {}) }
    }

    /// Prints the diagnosis on stderr and, if this process is a rank of a launcher's, ends it with [`EXIT_CODE`]
    /// shortly after. Where ranks are threads the caller's error ends the process.
    pub fn ending(timeout: Duration) -> Self {
        let on_timeout = |diagnosis: &Diagnosis| {
            // In one piece, for launchers mix what ranks write. Without standard error there is nobody to tell.
            std::io::stderr().write_all(format!("{diagnosis}\n").as_bytes()).ok();
            if mpi::launched().is_some() {
                give_up();
            }
        };
        Self { timeout, on_timeout: Arc::new(on_timeout) }
    }
}

impl Default for Watchdog {
    fn default() -> Self {
        Self::new(DEFAULT_TIMEOUT)
    }
}

/// Ends this process, which has said why, with [`EXIT_CODE`], and its launcher's job.
pub fn give_up() -> ! {
    thread::sleep(GRACE);
    mpi::end_job(EXIT_CODE)
}

/// What a rank knows about an operation that did not end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// Who waited.
    pub rank: usize,
    /// Of how many.
    pub world_size: usize,
    /// What it waited for.
    pub operation: Operation,
    /// Which operation of this group it was, from 0: the same number on every rank.
    pub sequence: u64,
    /// Length of its input, in the operation's [`unit`](Operation::unit).
    pub length: usize,
    /// How long it waited.
    pub elapsed: Duration,
    /// How long it may last.
    pub timeout: Duration,
    /// The ranks that it had not heard of.
    pub missing: Vec<usize>,
    /// If all had come: the ranks to or from which bytes were still on their way.
    pub stalled: Vec<usize>,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, world_size, operation, sequence, length, missing, stalled, .. } = self;
        let (elapsed, limit) = (self.elapsed.as_secs_f64(), self.timeout.as_secs_f64());
        write!(f, "rank {rank} of {world_size}: {operation} (operation {sequence} of its group, {length} ")?;
        write!(f, "{}) has lasted {elapsed:.1} s, limit {limit:.1} s: ", operation.unit())?;
        match (missing.as_slice(), stalled.as_slice()) {
            ([], []) => write!(f, "every rank came, one did not finish"),
            ([], stalled) => write!(f, "the transfer with {} stopped", Ranks(stalled)),
            (missing, _) => write!(f, "{} did not come", Ranks(missing)),
        }
    }
}

struct Ranks<'a>(&'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks: Vec<_> = self.0.iter().map(usize::to_string).collect();
        write!(f, "rank{} {}", if ranks.len() == 1 { "" } else { "s" }, ranks.join(", "))
    }
}

/// A backend's clock: which operation is under way and until when.
pub(crate) struct Watch {
    pub rank: usize,
    pub world_size: usize,
    pub timeout: Duration,
    /// Number of operations begun.
    begun: u64,
    call: Call,
    started: Instant,
}

impl Watch {
    pub fn new(rank: usize, world_size: usize, timeout: Duration) -> Self {
        let call = Call { operation: Operation::Barrier, input: 0, output: 0, root: 0 };
        Self { rank, world_size, timeout, begun: 0, call, started: Instant::now() }
    }

    /// The clock of a new group of this one's ranks.
    pub fn of_part(&self, rank: usize, world_size: usize) -> Self {
        Self::new(rank, world_size, self.timeout)
    }

    pub fn begin(&mut self, call: Call) {
        (self.call, self.started) = (call, Instant::now());
        self.begun += 1;
    }

    pub fn call(&self) -> Call {
        self.call
    }

    pub fn operation(&self) -> Operation {
        self.call.operation
    }

    /// What is left of the time of the operation under way.
    pub fn remaining(&self) -> Duration {
        self.timeout.saturating_sub(self.started.elapsed())
    }

    /// Whether the operation under way is out of time.
    pub fn is_over(&self) -> bool {
        self.started.elapsed() >= self.timeout
    }

    pub fn timed_out(&self, missing: Vec<usize>, stalled: Vec<usize>) -> Error {
        Error::TimedOut(Diagnosis {
            rank: self.rank,
            world_size: self.world_size,
            operation: self.call.operation,
            sequence: self.begun - 1,
            length: self.call.input,
            elapsed: self.started.elapsed(),
            timeout: self.timeout,
            missing,
            stalled,
        })
    }
}
