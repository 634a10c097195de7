//! What every backend promises, over its registry. A new backend gets this suite with its registry line.
#![forbid(unsafe_code)]

mod support;

use hearth_collective::{Backend, Error, Operation, ProcessGroup};
use support::{bytes, elements, for_every_group, hash, run, run_survivors, tree_sum};

type Group<'a> = &'a mut dyn ProcessGroup;

/// The sum over all ranks of `elements(seed, rank, length)`, as bits.
fn reduced(seed: u64, world_size: usize, length: usize) -> Vec<u32> {
    let inputs: Vec<_> = (0..world_size).map(|rank| elements(seed, rank, length)).collect();
    (0..length).map(|i| tree_sum(&inputs.iter().map(|x| x[i]).collect::<Vec<_>>()).to_bits()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn ranks_are_numbered_in_order() {
    for_every_group(|backend, n| {
        let seen = run(backend, n, |group: Group| (group.rank(), group.world_size()));
        assert_eq!(seen, (0..n).map(|rank| (rank, n)).collect::<Vec<_>>());
    });
}

#[test]
fn all_reduce_sums_in_the_fixed_tree_bit_for_bit() {
    for_every_group(|backend, n| {
        for length in [0, 1, 2, 5, 64, 5000] {
            let results = run(backend, n, move |group: Group| {
                let mut buffer = elements(7, group.rank(), length);
                group.all_reduce(&mut buffer).expect("all_reduce");
                bits(&buffer)
            });
            let expected = reduced(7, n, length);
            assert!(results.iter().all(|result| *result == expected), "{n} ranks, {length} elements");
        }
    });
}

#[test]
fn reduce_scatter_gives_each_rank_its_part_of_the_same_tree() {
    for_every_group(|backend, n| {
        for part in [0, 1, 3, 3000] {
            let results = run(backend, n, move |group: Group| {
                let mut partition = vec![f32::NAN; part];
                let input = elements(8, group.rank(), n * part);
                group.reduce_scatter(&input, &mut partition).expect("reduce_scatter");
                bits(&partition)
            });
            assert_eq!(results.concat(), reduced(8, n, n * part), "{n} ranks, {part} elements each");
        }
    });
}

#[test]
fn the_order_of_sums_matters_to_these_values() {
    let inputs: Vec<_> = (0..4).map(|rank| elements(7, rank, 64)).collect();
    let in_order = (0..64).map(|i| (inputs[0][i] + inputs[1][i] + inputs[2][i] + inputs[3][i]).to_bits());
    assert_ne!(in_order.collect::<Vec<_>>(), reduced(7, 4, 64));
}

#[test]
fn sums_do_not_depend_on_who_arrives_first() {
    for_every_group(|backend, n| {
        let all_equal = run(backend, n, move |group: Group| {
            let expected = reduced(9, n, 40);
            (0..100).all(|round| {
                (0..hash(&[round, group.rank() as u64]) % 20).for_each(|_| std::thread::yield_now());
                let mut buffer = elements(9, group.rank(), 40);
                group.all_reduce(&mut buffer).expect("all_reduce");
                bits(&buffer) == expected
            })
        });
        assert!(all_equal.into_iter().all(|equal| equal), "{n} ranks");
    });
}

#[test]
fn all_gather_puts_partitions_in_order_of_rank() {
    for_every_group(|backend, n| {
        for part in [0, 1, 5] {
            let results = run(backend, n, move |group: Group| {
                let mut output = vec![0; n * part];
                group.all_gather(&bytes(1, group.rank(), part), &mut output).expect("all_gather");
                output
            });
            let expected: Vec<u8> = (0..n).flat_map(|rank| bytes(1, rank, part)).collect();
            assert!(results.iter().all(|result| *result == expected), "{n} ranks, {part} bytes each");
        }
    });
}

#[test]
fn all_to_all_transposes_ranks_and_parts() {
    for_every_group(|backend, n| {
        let part = 3;
        let results = run(backend, n, move |group: Group| {
            let mut output = vec![0; n * part];
            group.all_to_all(&bytes(2, group.rank(), n * part), &mut output).expect("all_to_all");
            output
        });
        for (to, result) in results.iter().enumerate() {
            let expected: Vec<u8> =
                (0..n).flat_map(|from| bytes(2, from, n * part)[to * part..][..part].to_vec()).collect();
            assert_eq!(*result, expected, "{n} ranks, to rank {to}");
        }
    });
}

#[test]
fn broadcast_from_any_root_reaches_every_rank() {
    for_every_group(|backend, n| {
        for root in 0..n {
            let results = run(backend, n, move |group: Group| {
                let mut buffer = bytes(3, group.rank(), 11);
                group.broadcast(root, &mut buffer).expect("broadcast");
                buffer
            });
            assert!(results.iter().all(|result| *result == bytes(3, root, 11)), "{n} ranks, root {root}");
        }
    });
}

#[test]
fn no_rank_passes_a_barrier_before_all_have_come() {
    use std::sync::{Arc, atomic::AtomicUsize, atomic::Ordering::SeqCst};
    for_every_group(|backend, n| {
        let arrived = Arc::new(AtomicUsize::new(0));
        let seen = run(backend, n, move |group: Group| {
            (0..50).all(|round| {
                arrived.fetch_add(1, SeqCst);
                group.barrier().expect("barrier");
                let complete = arrived.load(SeqCst) >= (round + 1) * n;
                group.barrier().expect("barrier");
                complete
            })
        });
        assert!(seen.into_iter().all(|complete| complete), "{n} ranks");
    });
}

#[test]
fn operations_of_a_group_used_again_do_not_mix() {
    for_every_group(|backend, n| {
        run(backend, n, |group: Group| {
            (0..50).for_each(|step| (0..5).for_each(|kind| step_of(group, step, kind)))
        });
    });
}

#[test]
fn a_thousand_random_operations_are_all_right() {
    for_every_group(|backend, n| {
        run(backend, n, |group: Group| (0..1000).for_each(|step| step_of(group, step, hash(&[step]) % 6)));
    });
}

/// Runs one operation on values that only this step has, and checks them.
fn step_of(group: Group, step: u64, kind: u64) {
    let (rank, n) = (group.rank(), group.world_size());
    let part = (hash(&[step, 1]) % 40) as usize;
    let root = (hash(&[step, 2]) % n as u64) as usize;
    let mut output = vec![0; n * part];
    match kind {
        0 => {
            let mut buffer = elements(step, rank, part);
            group.all_reduce(&mut buffer).expect("all_reduce");
            assert_eq!(bits(&buffer), reduced(step, n, part), "step {step}");
        }
        1 => {
            let mut partition = vec![0.0; part];
            group.reduce_scatter(&elements(step, rank, n * part), &mut partition).expect("reduce_scatter");
            assert_eq!(bits(&partition), reduced(step, n, n * part)[rank * part..][..part], "step {step}");
        }
        2 => {
            group.all_gather(&bytes(step, rank, part), &mut output).expect("all_gather");
            (0..n).for_each(|from| {
                assert_eq!(output[from * part..][..part], bytes(step, from, part), "step {step}")
            });
        }
        3 => {
            group.all_to_all(&bytes(step, rank, n * part), &mut output).expect("all_to_all");
            for from in 0..n {
                let sent = bytes(step, from, n * part);
                assert_eq!(output[from * part..][..part], sent[rank * part..][..part], "step {step}");
            }
        }
        4 => {
            let mut buffer = bytes(step, rank, part);
            group.broadcast(root, &mut buffer).expect("broadcast");
            assert_eq!(buffer, bytes(step, root, part), "step {step}");
        }
        _ => group.barrier().expect("barrier"),
    }
}

#[test]
fn a_rank_that_returns_is_reported_to_every_other_now_and_later() {
    for_every_group(|backend, n| {
        for _ in 0..20 {
            let leaver = n - 1;
            let mut seen = run(backend, n, move |group: Group| {
                if group.rank() == leaver {
                    return vec![];
                }
                let mut buffer = [1.5];
                let first = group.all_reduce(&mut buffer);
                assert_eq!(buffer, [1.5], "a failed operation writes nothing");
                vec![first, group.barrier(), group.broadcast(0, &mut [])]
            });
            seen.pop();
            let operations = [Operation::AllReduce, Operation::Barrier, Operation::Broadcast];
            let expected = operations.map(|operation| Err(Error::PeerLeft { rank: leaver, operation }));
            assert!(seen.iter().all(|errors| *errors == expected), "{n} ranks: {seen:?}");
        }
    });
}

#[test]
fn a_rank_that_panics_is_reported_to_every_other() {
    for_every_group(|backend, n| {
        let survivors = run_survivors(backend, n, |group: Group| {
            group.barrier().expect("all are here");
            if group.rank() == 0 {
                std::panic::resume_unwind(Box::new("a planned panic"));
            }
            group.all_gather(&[1], &mut vec![0; group.world_size()])
        });
        let expected = Err(Error::PeerLeft { rank: 0, operation: Operation::AllGather });
        assert_eq!(survivors, (1..n).map(|rank| (rank, expected.clone())).collect::<Vec<_>>());
    });
}

#[test]
fn a_rank_that_leaves_after_the_last_operation_disturbs_nobody() {
    for_every_group(|backend, n| {
        for _ in 0..100 {
            let results = run(backend, n, |group: Group| group.all_reduce(&mut [1.0; 9]));
            assert!(results.iter().all(Result::is_ok), "{n} ranks: {results:?}");
        }
    });
}

/// A call that a rank makes, given the world size and 1 on the last rank, 0 on the others.
type Call = fn(Group, usize, usize) -> Result<(), Error>;

/// Every rank makes `call`, which must be refused on all of them with `expected`; then the group must still work.
fn refused(backend: &Backend, n: usize, expected: Error, call: Call) {
    let results = run(backend, n, move |group: Group| {
        let last = usize::from(group.rank() + 1 == n);
        let refusal = call(group, n, last);
        step_of(group, 5, 0);
        refusal
    });
    assert!(results.iter().all(|result| *result == Err(expected.clone())), "{expected}: {results:?}");
}

#[test]
fn lengths_that_differ_between_ranks_are_refused_on_every_rank() {
    for_every_group(|backend, n| {
        if n == 1 {
            return;
        }
        let calls: [(Operation, Call); 5] = [
            (Operation::AllReduce, |g, _, last| g.all_reduce(&mut vec![0.0; 4 + last])),
            (Operation::ReduceScatter, |g, _, last| g.reduce_scatter(&vec![0.0; 4 + last], &mut [])),
            (Operation::AllGather, |g, _, last| g.all_gather(&vec![0; 4 + last], &mut [])),
            (Operation::AllToAll, |g, _, last| g.all_to_all(&vec![0; 4 + last], &mut [])),
            (Operation::Broadcast, |g, _, last| g.broadcast(0, &mut vec![0; 4 + last])),
        ];
        for (operation, call) in calls {
            refused(
                backend,
                n,
                Error::LengthMismatch { operation, rank: n - 1, length: 5, expected: 4 },
                call,
            );
        }
    });
}

#[test]
fn an_input_that_does_not_divide_by_the_ranks_is_refused() {
    for_every_group(|backend, n| {
        if n == 1 {
            return;
        }
        let calls: [(Operation, Call); 2] = [
            (Operation::ReduceScatter, |g, n, _| g.reduce_scatter(&vec![0.0; n + 1], &mut [0.0])),
            (Operation::AllToAll, |g, n, _| g.all_to_all(&vec![0; n + 1], &mut vec![0; n + 1])),
        ];
        for (operation, call) in calls {
            refused(backend, n, Error::NotDivisible { operation, length: n + 1, world_size: n }, call);
        }
    });
}

#[test]
fn an_output_of_the_wrong_length_on_one_rank_is_refused_on_every_rank() {
    for_every_group(|backend, n| {
        let error =
            |operation, length, expected| Error::OutputLength { operation, rank: n - 1, length, expected };
        refused(backend, n, error(Operation::ReduceScatter, 2, 1), |g, n, last| {
            g.reduce_scatter(&vec![0.0; n], &mut vec![0.0; 1 + last])
        });
        refused(backend, n, error(Operation::AllGather, 2 * n - 1, 2 * n), |g, n, last| {
            g.all_gather(&[0, 0], &mut vec![0; 2 * n - last])
        });
        refused(backend, n, error(Operation::AllToAll, n + 1, n), |g, n, last| {
            g.all_to_all(&vec![0; n], &mut vec![0; n + last])
        });
    });
}

#[test]
fn a_root_that_is_no_rank_or_not_agreed_on_is_refused() {
    for_every_group(|backend, n| {
        let nobody = Error::NoSuchRoot { root: n, world_size: n };
        refused(backend, n, nobody, |g, n, _| g.broadcast(n, &mut [0]));
        if n > 1 {
            let disagreed = Error::RootMismatch { rank: n - 1, root: 1, expected: 0 };
            refused(backend, n, disagreed, |g, _, last| g.broadcast(last, &mut [0]));
        }
    });
}

#[test]
fn ranks_that_call_different_operations_are_told_which() {
    for_every_group(|backend, n| {
        if n == 1 {
            return;
        }
        let (operation, expected) = (Operation::Barrier, Operation::AllReduce);
        refused(backend, n, Error::Diverged { rank: n - 1, operation, expected }, |g, _, last| {
            if last == 1 { g.barrier() } else { g.all_reduce(&mut [1.0]) }
        });
    });
}

#[test]
fn messages_name_the_operation_the_rank_and_the_numbers() {
    let (operation, world_size) = (Operation::ReduceScatter, 4);
    let cases = [
        (Error::PeerLeft { rank: 2, operation }, "reduce_scatter: rank 2 left the process group"),
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
