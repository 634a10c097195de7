//! How fast buffers move, for plans and for `hearth bench comm`.

use std::time::Instant;

use crate::{Error, Operation, Ordered, Pending};

/// Times each operation is run after a first one that is not counted.
const RUNS: usize = 5;

/// The speed of one operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// What ran.
    pub operation: Operation,
    /// Length of the longer of its input and its result on each rank.
    pub bytes: usize,
    /// The median time on this rank.
    pub seconds: f64,
    /// `bytes` per nanosecond.
    pub gb_s: f64,
}

/// Measures every operation that moves data, on buffers of about `bytes` bytes per rank. Every rank calls it.
///
/// # Errors
/// As the operations.
pub fn measure(group: &Ordered, bytes: usize) -> Result<Vec<Rate>, Error> {
    let n = group.world_size();
    let part = bytes / 4 / n;
    let whole = part * n;
    let whole_bytes = 4 * whole;
    Ok(vec![
        rate(group, Operation::AllReduce, whole_bytes, whole, |input| group.all_reduce(input))?,
        rate(group, Operation::ReduceScatter, whole_bytes, whole, |input| group.reduce_scatter(input))?,
        rate(group, Operation::AllGather, whole_bytes, part, |input| group.all_gather(input))?,
        rate(group, Operation::AllToAll, whole_bytes, whole, |input| group.all_to_all(input))?,
        rate(group, Operation::Broadcast, whole_bytes, whole, |input| group.broadcast(0, input))?,
    ])
}

/// Measures `run` on an input of `length` elements.
fn rate(
    group: &Ordered,
    operation: Operation,
    bytes: usize,
    length: usize,
    run: impl Fn(Vec<f32>) -> Pending<Vec<f32>>,
) -> Result<Rate, Error> {
    run(vec![1.0; length]).wait()?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let input = vec![1.0; length];
        group.barrier().wait()?;
        let started = Instant::now();
        let result = run(input).wait()?;
        times.push(started.elapsed().as_secs_f64());
        drop(result);
    }
    times.sort_by(f64::total_cmp);
    let seconds = times[RUNS / 2];
    Ok(Rate { operation, bytes, seconds, gb_s: bytes as f64 / seconds / 1e9 })
}
