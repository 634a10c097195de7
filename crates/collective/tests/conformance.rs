//! The conformance suite over the backends whose ranks live in this process. `tests/mpi.rs` runs it under launchers.
#![forbid(unsafe_code)]

mod suite;

use std::thread;
use std::time::Duration;

use hearth_collective::{BACKENDS, Diagnosis, Error, Operation, Ordered, Watchdog, measure, single};

#[test]
fn every_backend_keeps_every_promise() {
    for backend in BACKENDS.iter().filter(|backend| (backend.is_here)()) {
        for world_size in [1, 2, 3, 4, 7] {
            let groups = (backend.open)(world_size).expect("opens");
            let ranks =
                groups.into_iter().map(|mut group| thread::spawn(move || suite::run_all(&mut *group)));
            for (rank, thread) in ranks.collect::<Vec<_>>().into_iter().enumerate() {
                assert!(thread.join().is_ok(), "{}: rank {rank} of {world_size} failed", backend.name);
            }
        }
    }
}

#[test]
fn a_world_of_one_gives_the_same_buffer_back() {
    let group = single();
    let buffer = vec![1.5f32; 100];
    let address = buffer.as_ptr();
    let buffer = group.all_reduce(buffer).wait().expect("alone");
    let buffer = group.reduce_scatter(buffer).wait().expect("alone");
    let buffer = group.all_gather(buffer).wait().expect("alone");
    let buffer = group.all_to_all(buffer).wait().expect("alone");
    let buffer = group.broadcast(0, buffer).wait().expect("alone");
    assert_eq!((buffer.as_ptr(), buffer), (address, vec![1.5; 100]));
}

#[test]
fn every_operation_that_moves_data_is_measured() {
    let groups = (BACKENDS.last().expect("threads").open)(2).expect("opens");
    let ranks = groups.into_iter().map(|group| {
        thread::spawn(move || {
            measure(&Ordered::start(group, Watchdog::default()), 1 << 20).expect("measures")
        })
    });
    for rank in ranks.collect::<Vec<_>>() {
        let rates = rank.join().expect("no rank fails");
        assert_eq!(rates.len(), 5);
        for rate in rates {
            println!("{rate:?}");
            assert!(rate.bytes == 1 << 20 && rate.gb_s > 0.0, "{rate:?}");
        }
    }
}

#[test]
fn messages_name_the_operation_the_rank_and_the_numbers() {
    let (operation, world_size) = (Operation::ReduceScatter, 4);
    let diagnosis = |missing: &[usize], stalled: &[usize]| {
        Error::TimedOut(Diagnosis {
            rank: 1,
            world_size,
            operation,
            sequence: 17,
            length: 4096,
            elapsed: Duration::from_millis(30_040),
            timeout: Duration::from_secs(30),
            missing: missing.to_vec(),
            stalled: stalled.to_vec(),
        })
    };
    let waited = "rank 1 of 4: reduce_scatter (operation 17 of its group, 4096 elements) has lasted 30.0 s, limit 30.0 s";
    let waited = |why| format!("{waited}: {why}");
    let stopped = waited("the transfer with rank 0 stopped");
    let (one, two) = (waited("rank 2 did not come"), waited("ranks 2, 3 did not come"));
    let cases = [
        (diagnosis(&[], &[0]), stopped.as_str()),
        (diagnosis(&[2], &[]), one.as_str()),
        (diagnosis(&[2, 3], &[]), two.as_str()),
        (Error::PeerLeft { rank: 2, operation }, "reduce_scatter: rank 2 left the process group"),
        (Error::Aborted { rank: 2, operation }, "reduce_scatter: rank 2 aborted the process group"),
        (
            Error::Diverged { rank: 1, operation, expected: Operation::Barrier },
            "process group: rank 0 called barrier, rank 1 called reduce_scatter",
        ),
        (
            Error::LengthMismatch { operation, rank: 3, length: 5, expected: 4 },
            "reduce_scatter: rank 3 passed 5 elements, rank 0 passed 4",
        ),
        (
            Error::NotDivisible { operation, length: 5, world_size },
            "reduce_scatter: 5 elements do not divide by 4 ranks",
        ),
        (
            Error::OutputLength { operation: Operation::AllGather, rank: 1, length: 7, expected: 8 },
            "all_gather: the output of rank 1 holds 7 bytes, needs 8",
        ),
        (
            Error::RootMismatch { rank: 1, root: 1, expected: 0 },
            "broadcast: rank 1 named root 1, rank 0 named root 0",
        ),
        (Error::NoSuchRoot { root: 4, world_size }, "broadcast: root 4 is not below the world size 4"),
    ];
    for (error, message) in cases {
        assert_eq!(error.to_string(), message);
    }
}
