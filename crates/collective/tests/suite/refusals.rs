//! Calls that do not fit together are refused on every rank, and the group still works.

use hearth_collective::{Error, Operation};

use super::results::step_of;
use super::{Case, World, gather, spread, transpose};

pub const CASES: &[Case] = &[
    ("lengths that differ between ranks are refused on every rank", lengths),
    ("an input that does not divide by the ranks is refused", divisible),
    ("an output of the wrong length on one rank is refused on every rank", output),
    ("a root that is no rank or not agreed on is refused", roots),
    ("ranks that call different operations are told which", different),
];

/// Every rank makes `call`, given the world size and 1 on the last rank, 0 on the others; it must be refused on all of
/// them with `expected`; then the group must still work.
fn refused<T>(world: World, expected: Error, call: impl Fn(World, usize, usize) -> Result<T, Error>) {
    let (rank, n) = (world.rank(), world.world_size());
    let refusal = call(world, n, usize::from(rank + 1 == n)).map(drop);
    assert_eq!(refusal, Err(expected));
    step_of(world, 5, 0);
}

fn lengths(world: World) {
    let n = world.world_size();
    if n == 1 {
        return;
    }
    let error = |operation| Error::LengthMismatch { operation, rank: n - 1, length: 5, expected: 4 };
    refused(world, error(Operation::AllReduce), |g, _, last| g.all_reduce(vec![0.0; 4 + last]));
    refused(world, error(Operation::ReduceScatter), |g, _, last| g.reduce_scatter(vec![0.0; 4 + last]));
    refused(world, error(Operation::AllGather), |g, _, last| gather(g, &vec![0; 4 + last], 0));
    refused(world, error(Operation::AllToAll), |g, _, last| transpose(g, &vec![0; 4 + last], 0));
    refused(world, error(Operation::Broadcast), |g, _, last| spread(g, 0, &vec![0; 4 + last]));
}

fn divisible(world: World) {
    let world_size = world.world_size();
    if world_size == 1 {
        return;
    }
    let error = |operation| Error::NotDivisible { operation, length: world_size + 1, world_size };
    refused(world, error(Operation::ReduceScatter), |g, n, _| g.reduce_scatter(vec![0.0; n + 1]));
    refused(world, error(Operation::AllToAll), |g, n, _| transpose(g, &vec![0; n + 1], n + 1));
}

fn output(world: World) {
    let n = world.world_size();
    let error =
        |operation, length, expected| Error::OutputLength { operation, rank: n - 1, length, expected };
    let gathers = error(Operation::AllGather, 2 * n - 1, 2 * n);
    refused(world, gathers, |g, n, last| gather(g, &[0, 0], 2 * n - last));
    let transposes = error(Operation::AllToAll, n + 1, n);
    refused(world, transposes, |g, n, last| transpose(g, &vec![0; n], n + last));
}

fn roots(world: World) {
    let n = world.world_size();
    refused(world, Error::NoSuchRoot { root: n, world_size: n }, |g, n, _| spread(g, n, &[0]));
    if n > 1 {
        let disagreed = Error::RootMismatch { rank: n - 1, root: 1, expected: 0 };
        refused(world, disagreed, |g, _, last| spread(g, last, &[0]));
    }
}

fn different(world: World) {
    let n = world.world_size();
    if n == 1 {
        return;
    }
    let (operation, expected) = (Operation::Barrier, Operation::AllReduce);
    refused(world, Error::Diverged { rank: n - 1, operation, expected }, |g, _, last| {
        if last == 1 { g.barrier() } else { g.all_reduce(vec![1.0]).map(drop) }
    });
}
