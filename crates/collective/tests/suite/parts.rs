//! Groups made of a part of the ranks.

use super::results::step_of;
use super::{Case, World, fresh, gather};

pub const CASES: &[Case] = &[
    ("a part numbers its ranks by key, then by their rank before", numbering),
    ("parts work at the same time and do not mix", at_once),
    ("a part of a part works, and so do both before it", nested),
    ("the end of a part does not end the whole", end),
];

fn numbering(world: World) {
    let (rank, n) = (world.rank(), world.world_size());
    let reversed = world.split(7, n - rank).expect("split");
    assert_eq!((reversed.rank(), reversed.world_size()), (n - 1 - rank, n));
    let halves = world.split(rank % 2, 0).expect("split");
    assert_eq!((halves.rank(), halves.world_size()), (rank / 2, (n + 1 - rank % 2) / 2));
}

fn at_once(world: World) {
    let rank = world.rank();
    let mut part = world.split(rank % 2, rank).expect("split");
    let n = part.world_size();
    for step in 0..100 {
        let all = gather(&mut *part, &[rank as u8, step], 2 * n).expect("all_gather");
        assert!(all.chunks(2).all(|from| usize::from(from[0]) % 2 == rank % 2 && from[1] == step));
    }
    // The parts make different calls.
    (0..40).for_each(|step| step_of(&mut *part, step, (step + rank as u64 % 2) % 6));
}

fn nested(world: World) {
    let rank = world.rank();
    let mut part = world.split(rank / 2, rank).expect("split");
    let mut alone = part.split(part.rank(), 0).expect("split");
    assert_eq!((alone.rank(), alone.world_size()), (0, 1));
    for step in 0..20 {
        step_of(&mut *alone, step, step % 6);
        step_of(&mut *part, step, step % 6);
        step_of(world, step, step % 6);
    }
}

fn end(world: World) {
    drop(fresh(world));
    step_of(world, 3, 0);
}
