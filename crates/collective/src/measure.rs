//! How fast buffers move, for plans and for `hearth bench comm`.

use std::time::Instant;

use crate::{Error, Operation, Ordered};

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
    let rate = |operation, run: &dyn Fn() -> Result<(), Error>| rate(group, operation, 4 * whole, run);
    Ok(vec![
        rate(Operation::AllReduce, &|| group.all_reduce(vec![1.0; whole]).wait().map(drop))?,
        rate(Operation::ReduceScatter, &|| group.reduce_scatter(vec![1.0; whole]).wait().map(drop))?,
        rate(Operation::AllGather, &|| group.all_gather(vec![1f32; part]).wait().map(drop))?,
        rate(Operation::AllToAll, &|| group.all_to_all(vec![1f32; whole]).wait().map(drop))?,
        rate(Operation::Broadcast, &|| group.broadcast(0, vec![1f32; whole]).wait().map(drop))?,
    ])
}

fn rate(
    group: &Ordered,
    operation: Operation,
    bytes: usize,
    run: &dyn Fn() -> Result<(), Error>,
) -> Result<Rate, Error> {
    run()?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        group.barrier().wait()?;
        let started = Instant::now();
        run()?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let seconds = times[RUNS / 2];
    Ok(Rate { operation, bytes, seconds, gb_s: bytes as f64 / seconds / 1e9 })
}
