//! How groups end: nobody waits for ever, and everybody is told why.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth_collective::{Diagnosis, Error, Operation, Ordered, ProcessGroup, Watchdog};

use super::{Case, World, fresh, gather, spread};

/// Long beside the time that a busy machine takes to let every rank run, short beside a person's patience.
const TIMEOUT: Duration = Duration::from_millis(600);

/// Turns a hang into a failure; no test comes near it.
const HANG: Duration = Duration::from_secs(60);

pub const CASES: &[Case] = &[
    ("a rank that leaves is reported to every other, now and later", leaves),
    ("a rank that panics is reported to every other", panics),
    ("a rank that leaves after the last operation disturbs nobody", leaves_last),
    ("a rank that skips an operation is named on every other rank in time", skips),
    ("a rank that comes after the others gave up is told in time", comes_late),
    ("an operation that is aborted fails on every rank", aborted),
    ("a watchdog tells of a timeout before the caller waits", watchdog),
];

fn last(group: &dyn ProcessGroup) -> bool {
    group.rank() + 1 == group.world_size()
}

fn leaves(world: World) {
    for _ in 0..20 {
        let mut group = fresh(world);
        let rank = group.world_size() - 1;
        if last(&*group) {
            continue;
        }
        let seen =
            [group.all_reduce(vec![1.5]).map(drop), group.barrier(), spread(&mut *group, 0, &[]).map(drop)];
        let operations = [Operation::AllReduce, Operation::Barrier, Operation::Broadcast];
        assert_eq!(seen, operations.map(|operation| Err(Error::PeerLeft { rank, operation })));
    }
}

fn panics(world: World) {
    let mut group = fresh(world);
    group.barrier().expect("all are here");
    if group.rank() == 0 {
        let program = move || {
            let _group = group;
            resume_unwind(Box::new("a planned panic"))
        };
        catch_unwind(AssertUnwindSafe(program)).expect_err("a panic");
        return;
    }
    let n = group.world_size();
    let expected = Err(Error::PeerLeft { rank: 0, operation: Operation::AllGather });
    assert_eq!(gather(&mut *group, &[1], n), expected);
}

fn leaves_last(world: World) {
    for round in 0..100 {
        let n = world.world_size();
        let sum = fresh(world).all_reduce(vec![1.0; 9]);
        assert_eq!(sum, Ok(vec![n as f32; 9]), "round {round}");
    }
}

/// What a rank that waited too long must say, but for how long it waited.
fn check(diagnosis: &Diagnosis, rank: usize, world_size: usize, sequence: u64, length: usize) {
    let expected = Diagnosis {
        rank,
        world_size,
        operation: Operation::AllReduce,
        sequence,
        length,
        elapsed: diagnosis.elapsed,
        timeout: TIMEOUT,
        missing: vec![world_size - 1],
        stalled: vec![],
    };
    assert_eq!(*diagnosis, expected);
    assert!(diagnosis.elapsed < TIMEOUT + HANG, "{diagnosis}");
}

fn skips(world: World) {
    let mut group = fresh(world);
    group.barrier().expect("all are here");
    group.set_timeout(TIMEOUT);
    let n = group.world_size();
    if !last(&*group) {
        match group.all_reduce(vec![0.0; 12]) {
            Err(Error::TimedOut(diagnosis)) => check(&diagnosis, group.rank(), n, 1, 12),
            other => panic!("{other:?}"),
        }
        assert!(matches!(group.barrier(), Err(Error::Aborted { operation: Operation::Barrier, .. })));
    }
    // The last rank keeps its end until the others have given up.
    world.barrier().expect("the whole still works");
}

fn comes_late(world: World) {
    let mut group = fresh(world);
    group.set_timeout(TIMEOUT);
    let n = group.world_size();
    if n == 1 {
        return;
    }
    if !last(&*group) {
        assert!(matches!(group.all_reduce(vec![1.0; 4]), Err(Error::TimedOut(_))));
        return world.barrier().expect("the whole still works");
    }
    world.barrier().expect("the whole still works");
    let late = group.all_reduce(vec![1.0; 4]);
    assert!(matches!(late, Err(Error::Aborted { .. } | Error::TimedOut(_))), "{late:?}");
}

fn aborted(world: World) {
    let mut group = fresh(world);
    group.set_timeout(HANG);
    let (rank, n) = (group.rank(), group.world_size());
    if n == 1 {
        return;
    }
    let group = Ordered::start(group, Watchdog::new(HANG));
    let expected = Err(Error::Aborted { rank: n - 1, operation: Operation::Barrier });
    if rank + 1 < n {
        return assert_eq!(group.barrier().wait(), expected);
    }
    group.abort();
    assert_eq!(group.barrier().wait(), expected);
}

fn watchdog(world: World) {
    let told = Arc::new(Mutex::new(None));
    let (sink, group) = (told.clone(), fresh(world));
    let on_timeout = move |diagnosis: &Diagnosis| *sink.lock().expect("one writer") = Some(diagnosis.clone());
    let group = Ordered::start(group, Watchdog { timeout: TIMEOUT, on_timeout: Arc::new(on_timeout) });
    let (rank, n) = (group.rank(), group.world_size());
    if rank + 1 < n {
        let result = group.all_reduce(vec![1.0; 3]).wait();
        let diagnosis = told.lock().expect("one writer").take().expect("told");
        check(&diagnosis, rank, n, 0, 3);
        assert_eq!(result, Err(Error::TimedOut(diagnosis)));
    }
    world.barrier().expect("the whole still works");
}
