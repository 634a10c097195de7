//! Runs one closure per rank and makes values that every rank can predict.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hearth_collective::{BACKENDS, Backend, ProcessGroup};

/// What turns a hang into a failure; no test comes near it.
const HANG: Duration = Duration::from_secs(60);

/// Every backend with every world size of the suite.
pub fn for_every_group(check: impl Fn(&Backend, usize)) {
    for backend in BACKENDS {
        for world_size in [1, 2, 3, 4, 7] {
            check(backend, world_size);
        }
    }
}

/// Runs `program` on each rank of a new group, a thread each; the results by rank.
pub fn run<T, F>(backend: &Backend, world_size: usize, program: F) -> Vec<T>
where
    T: Send + 'static,
    F: Fn(&mut dyn ProcessGroup) -> T + Send + Sync + 'static,
{
    let results = run_survivors(backend, world_size, program);
    assert_eq!(results.len(), world_size, "{}: a rank of {world_size} panicked", backend.name);
    results.into_iter().map(|(_, result)| result).collect()
}

/// As [`run`], for programs that let some ranks panic: the ranks that did not, with their results.
pub fn run_survivors<T, F>(backend: &Backend, world_size: usize, program: F) -> Vec<(usize, T)>
where
    T: Send + 'static,
    F: Fn(&mut dyn ProcessGroup) -> T + Send + Sync + 'static,
{
    let (program, (sender, receiver)) = (Arc::new(program), mpsc::channel());
    for mut group in (backend.open)(world_size) {
        let (program, sender) = (program.clone(), sender.clone());
        thread::spawn(move || {
            let result = program(&mut *group);
            // Nobody listens any more once another rank has failed the test.
            sender.send((group.rank(), result)).ok();
        });
    }
    drop(sender);
    let (mut results, deadline) = (Vec::new(), Instant::now() + HANG);
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(result) => results.push(result),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("{}: a rank of {world_size} hangs", backend.name),
        }
    }
    results.sort_by_key(|(rank, _)| *rank);
    results
}

/// The documented order, one element at a time.
pub fn tree_sum(x: &[f32]) -> f32 {
    match x {
        [one] => *one,
        _ => {
            let half = (0..).map(|k| 1 << k).take_while(|h| *h < x.len()).last().expect("two or more");
            tree_sum(&x[..half]) + tree_sum(&x[half..])
        }
    }
}

/// A well-mixed function of `words` (splitmix64's finaliser after each).
pub fn hash(words: &[u64]) -> u64 {
    words.iter().fold(0, |state: u64, word| {
        let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// Elements of both signs over eight orders of magnitude, so that the order of a sum shows.
pub fn elements(seed: u64, rank: usize, length: usize) -> Vec<f32> {
    let element = |i| {
        let z = hash(&[seed, rank as u64, i]);
        ((z >> 32) as i32 as f32) * 10f32.powi((z % 9) as i32 - 4)
    };
    (0..length as u64).map(element).collect()
}

/// Bytes that differ between seeds and ranks.
pub fn bytes(seed: u64, rank: usize, length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| hash(&[seed, rank as u64, i]) as u8).collect()
}
