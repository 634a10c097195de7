//! What operations hold, counted by the allocator of this process.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use hearth_collective::{Error, Operation, Ordered, Pending, SCRATCH_BYTES};
use hearth_memory::heap::{self, CountingAllocator};

#[global_allocator]
static HEAP: CountingAllocator = CountingAllocator;

/// Ranks that live in this process.
static RANKS_HERE: AtomicUsize = AtomicUsize::new(0);

/// Elements that one rank passes: divisible by every world size of the tests.
const LENGTH: usize = 12 << 20;

/// What threads, channels and the test harness allocate meanwhile.
const NOISE: usize = 256 << 10;

/// Every rank runs every operation that moves data, and its process holds what
/// [`Operation::held_bytes`] says for each of its ranks.
pub fn check(group: Ordered) {
    let is_first_here = RANKS_HERE.fetch_add(1, SeqCst) == 0;
    group.barrier().wait().expect("all are here");
    let check = |operation, run: fn(&Ordered, Vec<f32>) -> Pending<Vec<f32>>| {
        let held = || heap::current().expect("installed") as usize;
        let before = held();
        wait(group.barrier());
        if is_first_here {
            heap::reset_peak();
        }
        wait(group.barrier());
        let result = wait(run(&group, vec![1.0; LENGTH]));
        wait(group.barrier());
        let (peak, after) = (heap::peak().expect("installed") as usize - before, held() - before);
        wait(group.barrier());
        let ranks = RANKS_HERE.load(SeqCst);
        let expected = ranks * operation_bytes(operation, &group);
        let slack = ranks * SCRATCH_BYTES + NOISE;
        assert!(peak + NOISE >= expected && peak <= expected + slack, "{operation}: {peak}, not {expected}");
        assert!(after.abs_diff(4 * ranks * result.len()) <= NOISE, "{operation}: {after} bytes afterwards");
        drop(result);
        wait(group.barrier());
    };
    check(Operation::AllReduce, |group, input| group.all_reduce(input));
    check(Operation::ReduceScatter, |group, input| group.reduce_scatter(input));
    check(Operation::AllGather, |group, input| group.all_gather(input));
    check(Operation::AllToAll, |group, input| group.all_to_all(input));
    check(Operation::Broadcast, |group, input| group.broadcast(0, input));
}

fn operation_bytes(operation: Operation, group: &Ordered) -> usize {
    operation.held_bytes(group.world_size(), 4 * LENGTH)
}

fn wait<T>(pending: Pending<T>) -> T {
    pending.wait().unwrap_or_else(|error: Error| panic!("{error}"))
}
