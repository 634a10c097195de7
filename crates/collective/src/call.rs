//! What a rank asked for, and whether the calls of all ranks fit together.

use crate::{Error, Operation};

/// One rank's call. Lengths are in the operation's unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub operation: Operation,
    pub input: usize,
    /// Where the operation writes in place, the same as `input`.
    pub output: usize,
    /// Who broadcasts; 0 for the other operations.
    pub root: usize,
}

/// Checks the calls of all ranks, by rank. Every rank sees the same calls, hence the same verdict.
pub fn check(calls: &[Call]) -> Result<(), Error> {
    let first = calls[0];
    for (rank, call) in calls.iter().enumerate() {
        same(rank, call, &first)?;
    }
    let expected = output_length(&first, calls.len())?;
    match calls.iter().position(|call| call.output != expected) {
        None => Ok(()),
        Some(rank) => {
            let (operation, length) = (first.operation, calls[rank].output);
            Err(Error::OutputLength { operation, rank, length, expected })
        }
    }
}

fn same(rank: usize, call: &Call, first: &Call) -> Result<(), Error> {
    let Call { operation, input: length, root, .. } = *call;
    if operation != first.operation {
        return Err(Error::Diverged { rank, operation, expected: first.operation });
    }
    if length != first.input {
        return Err(Error::LengthMismatch { operation, rank, length, expected: first.input });
    }
    if root != first.root {
        return Err(Error::RootMismatch { rank, root, expected: first.root });
    }
    Ok(())
}

/// What one rank receives.
fn output_length(call: &Call, world_size: usize) -> Result<usize, Error> {
    let Call { operation, input: length, root, .. } = *call;
    let divides = length.is_multiple_of(world_size);
    match operation {
        Operation::ReduceScatter | Operation::AllToAll if !divides => {
            Err(Error::NotDivisible { operation, length, world_size })
        }
        Operation::Broadcast if root >= world_size => Err(Error::NoSuchRoot { root, world_size }),
        Operation::ReduceScatter => Ok(length / world_size),
        // A product past the address space equals no slice's length.
        Operation::AllGather => Ok(length.saturating_mul(world_size)),
        Operation::AllReduce
        | Operation::AllToAll
        | Operation::Broadcast
        | Operation::Barrier
        | Operation::Split => Ok(length),
    }
}

/// The ranks whose color is `color` in the order of their ranks in the new group; `places` are color and key by rank.
pub fn part(places: &[(usize, usize)], color: usize) -> Vec<usize> {
    let mut members: Vec<_> = (0..places.len()).filter(|rank| places[*rank].0 == color).collect();
    members.sort_by_key(|rank| (places[*rank].1, *rank));
    members
}
