//! Why an operation failed.

use std::fmt;

use crate::{Diagnosis, EXIT_CODE};

/// What the ranks of a process group do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`all_reduce`](crate::ProcessGroup::all_reduce)
    AllReduce,
    /// [`reduce_scatter`](crate::ProcessGroup::reduce_scatter)
    ReduceScatter,
    /// [`all_gather`](crate::ProcessGroup::all_gather)
    AllGather,
    /// [`all_to_all`](crate::ProcessGroup::all_to_all)
    AllToAll,
    /// [`broadcast`](crate::ProcessGroup::broadcast)
    Broadcast,
    /// [`barrier`](crate::ProcessGroup::barrier)
    Barrier,
    /// [`split`](crate::ProcessGroup::split)
    Split,
}

impl Operation {
    /// What its lengths count.
    pub fn unit(self) -> &'static str {
        match self {
            Self::AllReduce | Self::ReduceScatter => "elements",
            Self::AllGather | Self::AllToAll | Self::Broadcast | Self::Barrier | Self::Split => "bytes",
        }
    }
}

impl Operation {
    /// Bytes that one rank holds while the operation runs, buffers and result included, if it passes `input` bytes to
    /// a group of `world_size`: the same on every backend but for scratch of at most [`SCRATCH_BYTES`].
    ///
    /// | operation, `n` bytes passed | held |
    /// |---|---|
    /// | all_reduce | `n`, and `n / world_size` rounded up to whole elements |
    /// | reduce_scatter | `n + n / world_size` |
    /// | all_gather | `n + n × world_size` |
    /// | all_to_all | `2 n` |
    /// | broadcast | `n` |
    ///
    /// A world of one holds `n`: the buffer comes back.
    pub fn held_bytes(self, world_size: usize, input: usize) -> usize {
        match self {
            _ if world_size == 1 => input,
            Self::AllReduce => input + (input / 4).div_ceil(world_size) * 4,
            Self::ReduceScatter => input + input / world_size,
            Self::AllGather => input + input * world_size,
            Self::AllToAll => 2 * input,
            Self::Broadcast => input,
            Self::Barrier | Self::Split => 0,
        }
    }
}

/// What an operation may hold beside [`held_bytes`](Operation::held_bytes): partial sums, pieces on their way.
pub const SCRATCH_BYTES: usize = 4 << 20;

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::AllToAll => "all_to_all",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::Split => "split",
        })
    }
}

/// Why an operation failed. Every rank that takes part gets the same error.
///
/// After [`Error::PeerLeft`], [`Error::TimedOut`] and [`Error::Aborted`] the group is over. Every other error is a
/// refusal: nothing was exchanged and the group can be used further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A rank was dropped, by returning or by panicking, before it took part.
    #[error("{operation}: rank {rank} left the process group")]
    PeerLeft {
        /// Who left first.
        rank: usize,
        /// What the others were about to do.
        operation: Operation,
    },
    /// The operation lasted longer than the group allows.
    #[error("{0}")]
    TimedOut(Diagnosis),
    /// A rank ended the group, or gave up waiting in it.
    #[error("{operation}: rank {rank} aborted the process group")]
    Aborted {
        /// Who ended it.
        rank: usize,
        /// What this rank was about to do.
        operation: Operation,
    },
    /// The thread that runs the operations of an [`Ordered`](crate::Ordered) panicked.
    #[error("process group: the communication thread has stopped")]
    Stopped,
    /// A launcher started this process and the library that its ranks talk through is not there.
    #[error(
        "{launcher} started this process, but no MPI library was found ({tried}): install one or name it in HEARTH_MPI_LIBRARY"
    )]
    NoLibrary {
        /// Who started the process.
        launcher: &'static str,
        /// What was looked for.
        tried: String,
    },
    /// A launcher started several processes that do not know of each other.
    #[error(
        "{launcher} started {expected} tasks, but each is alone in a world of {found}: start them with mpirun, mpiexec or srun --mpi=pmix, and with the launcher of the MPI library that was loaded ({library})"
    )]
    NotConnected {
        /// Who started the processes.
        launcher: &'static str,
        /// How many.
        expected: usize,
        /// How many the library connects.
        found: usize,
        /// The library.
        library: String,
    },
    /// The launcher started another number of ranks than the program wants.
    #[error("the launcher started {launched} ranks, the recipe wants {wanted}")]
    WorldSize {
        /// Ranks that run.
        launched: usize,
        /// Ranks that are wanted.
        wanted: usize,
    },
    /// The MPI library refused a call, or cannot do what is needed.
    #[error("MPI: {0}")]
    Mpi(String),
    /// The ranks do not run the same program.
    #[error("process group: rank 0 called {expected}, rank {rank} called {operation}")]
    Diverged {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// What it called.
        operation: Operation,
        /// What rank 0 called.
        expected: Operation,
    },
    /// The inputs of two ranks differ in length.
    #[error("{operation}: rank {rank} passed {length} {}, rank 0 passed {expected}", operation.unit())]
    LengthMismatch {
        /// What was called.
        operation: Operation,
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Its length.
        length: usize,
        /// The length of rank 0.
        expected: usize,
    },
    /// The input cannot be cut into one equal part per rank.
    #[error("{operation}: {length} {} do not divide by {world_size} ranks", operation.unit())]
    NotDivisible {
        /// What was called.
        operation: Operation,
        /// Length of the input.
        length: usize,
        /// Number of ranks.
        world_size: usize,
    },
    /// A rank's output does not hold what it would receive.
    #[error("{operation}: the output of rank {rank} holds {length} {}, needs {expected}", operation.unit())]
    OutputLength {
        /// What was called.
        operation: Operation,
        /// The first rank whose output does not fit.
        rank: usize,
        /// Length of its output.
        length: usize,
        /// Length that it needs.
        expected: usize,
    },
    /// The ranks do not agree on who broadcasts.
    #[error("broadcast: rank {rank} named root {root}, rank 0 named root {expected}")]
    RootMismatch {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Its root.
        root: usize,
        /// The root of rank 0.
        expected: usize,
    },
    /// The root of a broadcast is no rank of the group.
    #[error("broadcast: root {root} is not below the world size {world_size}")]
    NoSuchRoot {
        /// The root that was named.
        root: usize,
        /// Number of ranks.
        world_size: usize,
    },
}

impl Error {
    /// What a process ends with that this error ends: 2 if its environment does not fit, 75
    /// ([`EXIT_CODE`](crate::EXIT_CODE)) if it may be started again, else 1. A rank that left had its own reason, which
    /// another start need not cure.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NoLibrary { .. } | Self::NotConnected { .. } | Self::WorldSize { .. } => 2,
            Self::TimedOut(_) | Self::Aborted { .. } => EXIT_CODE,
            _ => 1,
        }
    }
}
