//! What operations that succeed give.

use std::time::SystemTime;

use super::values::{bits, bytes, elements, hash, reduced};
use super::{Case, World, gather, spread, transpose};

pub const CASES: &[Case] = &[
    ("all_reduce sums in the fixed tree, bit for bit", all_reduce),
    ("the order of sums matters to these values", order_matters),
    ("reduce_scatter gives each rank its part of the same tree", reduce_scatter),
    ("sums do not depend on who arrives first", arrival),
    ("all_gather puts partitions in the order of ranks", all_gather),
    ("all_to_all transposes ranks and parts", all_to_all),
    ("broadcast from any root reaches every rank", broadcast),
    ("a buffer longer than a message arrives whole", long),
    ("no rank passes a barrier before all have come", barrier),
    ("operations of a group used again do not mix", again),
    ("a thousand random operations are all right", random),
];

fn all_reduce(world: World) {
    for length in [0, 1, 2, 5, 64, 5000, 150_001] {
        let sum = world.all_reduce(elements(7, world.rank(), length)).expect("all_reduce");
        assert!(bits(&sum) == reduced(7, world.world_size(), length), "{length} elements");
    }
}

fn order_matters(_: World) {
    let inputs: Vec<_> = (0..4).map(|rank| elements(7, rank, 64)).collect();
    let in_order = (0..64).map(|i| (inputs[0][i] + inputs[1][i] + inputs[2][i] + inputs[3][i]).to_bits());
    assert_ne!(in_order.collect::<Vec<_>>(), reduced(7, 4, 64));
}

fn reduce_scatter(world: World) {
    let (rank, n) = (world.rank(), world.world_size());
    for part in [0, 1, 3, 3000, 70_003] {
        let partition = world.reduce_scatter(elements(8, rank, n * part)).expect("reduce_scatter");
        assert!(bits(&partition) == reduced(8, n, n * part)[rank * part..][..part], "{part} elements each");
    }
}

fn arrival(world: World) {
    let (rank, n) = (world.rank(), world.world_size());
    let expected = reduced(9, n, 40);
    for round in 0..100 {
        (0..hash(&[round, rank as u64]) % 20).for_each(|_| std::thread::yield_now());
        let sum = world.all_reduce(elements(9, rank, 40)).expect("all_reduce");
        assert_eq!(bits(&sum), expected, "round {round}");
    }
}

fn all_gather(world: World) {
    let (rank, n) = (world.rank(), world.world_size());
    for part in [0, 1, 5, 300_001] {
        let all = gather(world, &bytes(1, rank, part), n * part).expect("all_gather");
        let expected: Vec<u8> = (0..n).flat_map(|rank| bytes(1, rank, part)).collect();
        assert!(all == expected, "{part} bytes each");
    }
}

fn all_to_all(world: World) {
    let (rank, n) = (world.rank(), world.world_size());
    for part in [0, 3, 200_003] {
        let received = transpose(world, &bytes(2, rank, n * part), n * part).expect("all_to_all");
        let sent = |from| bytes(2, from, n * part)[rank * part..][..part].to_vec();
        assert!(received == (0..n).flat_map(sent).collect::<Vec<_>>(), "{part} bytes each");
    }
}

fn broadcast(world: World) {
    let rank = world.rank();
    for root in 0..world.world_size() {
        for length in [0, 11, 100_003] {
            let received = spread(world, root, &bytes(3, rank, length)).expect("broadcast");
            assert!(received == bytes(3, root, length), "root {root}, {length} bytes");
        }
    }
}

fn long(world: World) {
    let pattern: Vec<u8> = (0..17_000_003u32).map(|i| (i ^ (i >> 13)) as u8).collect();
    let mine = if world.rank() == 0 { pattern.clone() } else { vec![0; pattern.len()] };
    assert!(spread(world, 0, &mine).expect("broadcast") == pattern);
}

fn barrier(world: World) {
    let n = world.world_size();
    for round in 0..50 {
        let came = nanoseconds();
        world.barrier().expect("barrier");
        let passed = nanoseconds();
        let times = [came.to_le_bytes(), passed.to_le_bytes()].concat();
        let all = gather(world, &times, 16 * n).expect("all_gather");
        let times: Vec<_> =
            all.chunks(8).map(|x| u64::from_le_bytes(x.try_into().expect("8 bytes"))).collect();
        let last_to_come = times.iter().step_by(2).max();
        let first_to_pass = times.iter().skip(1).step_by(2).min();
        assert!(first_to_pass >= last_to_come, "round {round}");
    }
}

/// A time that processes of one machine can compare.
fn nanoseconds() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().expect("a clock past 1970").as_nanos() as u64
}

fn again(world: World) {
    (0..50).for_each(|step| (0..5).for_each(|kind| step_of(world, step, kind)));
}

fn random(world: World) {
    (0..1000).for_each(|step| step_of(world, step, hash(&[step]) % 6));
}

/// Runs one operation on values that only this step has, and checks them.
pub fn step_of(group: World, step: u64, kind: u64) {
    let (rank, n) = (group.rank(), group.world_size());
    let part = (hash(&[step, 1]) % 40) as usize;
    let root = (hash(&[step, 2]) % n as u64) as usize;
    match kind {
        0 => {
            let sum = group.all_reduce(elements(step, rank, part)).expect("all_reduce");
            assert_eq!(bits(&sum), reduced(step, n, part), "step {step}");
        }
        1 => {
            let partition = group.reduce_scatter(elements(step, rank, n * part)).expect("reduce_scatter");
            assert_eq!(bits(&partition), reduced(step, n, n * part)[rank * part..][..part], "step {step}");
        }
        2 => {
            let all = gather(group, &bytes(step, rank, part), n * part).expect("all_gather");
            assert_eq!(
                all,
                (0..n).flat_map(|from| bytes(step, from, part)).collect::<Vec<_>>(),
                "step {step}"
            );
        }
        3 => {
            let received = transpose(group, &bytes(step, rank, n * part), n * part).expect("all_to_all");
            let sent = |from| bytes(step, from, n * part)[rank * part..][..part].to_vec();
            assert_eq!(received, (0..n).flat_map(sent).collect::<Vec<_>>(), "step {step}");
        }
        4 => {
            let received = spread(group, root, &bytes(step, rank, part)).expect("broadcast");
            assert_eq!(received, bytes(step, root, part), "step {step}");
        }
        _ => group.barrier().expect("barrier"),
    }
}
