//! The asynchronous wrapper.

use hearth_collective::{Error, Ordered, Watchdog};

use super::values::{bits, bytes, elements, reduced};
use super::{Case, World, fresh};

pub const CASES: &[Case] = &[
    ("operations run in the order of their calls, whatever the order of waiting", order),
    ("every operation moves elements of every size", typed),
    ("buffers of different lengths come back with theirs", varied),
    ("a result that nobody waits for is computed all the same", unwanted),
    ("a refusal reaches the one who waits, and only that", refusal),
    ("a part of an asynchronous group is one", part),
];

fn start(world: World) -> Ordered {
    Ordered::start(fresh(world), Watchdog::default())
}

fn order(world: World) {
    let group = start(world);
    let (rank, n) = (group.rank(), group.world_size());
    let mut pending: Vec<_> =
        (0..40).map(|step| (step, group.all_reduce(elements(step, rank, 50)))).collect();
    if rank % 2 == 1 {
        pending.reverse();
    }
    for (step, sum) in pending {
        assert_eq!(bits(&sum.wait().expect("all_reduce")), reduced(step, n, 50), "step {step}");
    }
}

fn typed(world: World) {
    let group = start(world);
    let (rank, n) = (group.rank() as u64, group.world_size() as u64);
    let gathered = group.all_gather(vec![[rank as u16, 7]; 3]);
    let exchanged = group.all_to_all((0..n).map(|to| rank << 32 | to).collect());
    let received = group.broadcast(group.world_size() - 1, vec![rank as f64; 5]);
    let partition = group.reduce_scatter(elements(4, rank as usize, 9 * n as usize));
    let into = group.all_gather_into(vec![[rank as u16, 7]; 3], vec![[9, 9]; 3 * n as usize]);
    group.barrier().wait().expect("barrier");
    let expected: Vec<_> = (0..n).flat_map(|rank| [[rank as u16, 7]; 3]).collect();
    assert_eq!(gathered.wait().expect("all_gather"), expected);
    assert_eq!(into.wait().expect("all_gather_into"), expected);
    let expected: Vec<_> = (0..n).map(|from| from << 32 | rank).collect();
    assert_eq!(exchanged.wait().expect("all_to_all"), expected);
    assert_eq!(received.wait().expect("broadcast"), [n as f64 - 1.0; 5]);
    let sum = reduced(4, n as usize, 9 * n as usize);
    assert_eq!(bits(&partition.wait().expect("reduce_scatter")), sum[9 * rank as usize..][..9]);
}

fn varied(world: World) {
    let group = start(world);
    let of = |rank: usize| bytes(5, rank, 1000 * (rank % 3));
    let all = group.all_gather_varied(of(group.rank())).wait().expect("all_gather_varied");
    assert_eq!(all, (0..group.world_size()).map(of).collect::<Vec<_>>());
}

fn unwanted(world: World) {
    let group = start(world);
    for step in 0..20 {
        drop(group.all_gather(vec![step; 100]));
    }
    drop(group);
}

fn refusal(world: World) {
    let group = start(world);
    let n = group.world_size();
    let nobody = group.broadcast(n, vec![0u8]);
    let sum = group.all_reduce(vec![1.0]);
    assert_eq!(nobody.wait(), Err(Error::NoSuchRoot { root: n, world_size: n }));
    assert_eq!(sum.wait(), Ok(vec![n as f32]));
}

fn part(world: World) {
    let group = start(world);
    let part = group.split(group.rank() % 2, 0).wait().expect("split");
    let (here, everywhere) = (part.all_reduce(vec![1.0]), group.all_reduce(vec![1.0]));
    assert_eq!(here.wait(), Ok(vec![part.world_size() as f32]));
    assert_eq!(everywhere.wait(), Ok(vec![group.world_size() as f32]));
}
