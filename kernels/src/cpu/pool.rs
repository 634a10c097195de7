//! One persistent pool of threads that spin for work before they sleep.
//!
//! A token's worth of inference is hundreds of parallel loops of a few microseconds each; waking a sleeping thread
//! takes longer than most of them. Workers therefore keep looking for the next loop for [`SPIN`] and only then go to
//! sleep. The caller takes part in its own loop, so a loop is finished even if no worker ever wakes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// How long a worker looks for the next loop before it sleeps.
const SPIN: Duration = Duration::from_micros(150);

/// Threads that take part in a loop, the caller among them: as many as rayon's.
pub fn threads() -> usize {
    pool().workers + 1
}

/// Calls `f(0) … f(count − 1)`, each once, on all threads; returns when all are done. The order is not defined.
///
/// # Panics
/// With the panic of any call, after all the others have ended.
pub fn for_each(count: usize, f: impl Fn(usize) + Sync) {
    let pool = pool();
    if count <= 1 || pool.workers == 0 {
        return (0..count).for_each(f);
    }
    let loop_ = Arc::new(Loop::new(count, &f));
    pool.shared.publish(&loop_);
    loop_.work();
    pool.shared.withdraw(&loop_);
    loop_.wait();
    // `f` may be borrowed no longer: every call of it has returned, and no worker starts another.
    if loop_.panicked.load(Ordering::Acquire) {
        let panic = loop_.panic.lock().expect("no panic is raised while it is held").take();
        resume_unwind(panic.unwrap_or_else(|| Box::new("a parallel loop panicked")));
    }
}

/// Splits `data` into chunks of `len` (the last one shorter) and calls `f(i, chunk i)` for each.
pub fn for_each_chunk<T: Send>(data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let total = data.len();
    let base = Base(data.as_mut_ptr());
    for_each(total.div_ceil(len.max(1)), |i| {
        let start = i * len;
        // SAFETY: chunks of different numbers do not overlap, each number is called once, and all end within
        // `data`, which stays borrowed until the loop is done.
        let chunk = unsafe { std::slice::from_raw_parts_mut(base.at(start), len.min(total - start)) };
        f(i, chunk);
    });
}

/// Calls `f(0, …) … f(count − 1, …)`, each once, in as many threads at a time as there are `spaces`: each call has one
/// to itself, which is as the call before left it.
///
/// # Panics
/// As [`for_each`].
pub fn for_each_with<S: Send>(count: usize, spaces: &mut [S], f: impl Fn(usize, &mut S) + Sync) {
    let next = AtomicUsize::new(0);
    for_each_chunk(spaces, 1, |_, space| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            f(i, &mut space[0]);
        }
    });
}

struct Base<T>(*mut T);

// SAFETY: only disjoint chunks are made from it, of elements that may be sent.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    /// # Safety
    /// `i` lies within the slice.
    unsafe fn at(&self, i: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(i) }
    }
}

/// A parallel loop in progress.
struct Loop {
    /// The body, with its lifetime erased: called only for numbers below `count`, and all of those calls have
    /// returned before [`for_each`] does.
    body: *const (dyn Fn(usize) + Sync),
    count: usize,
    /// Next number to be taken.
    next: AtomicUsize,
    /// Calls that have returned.
    done: AtomicUsize,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

// SAFETY: the body is `Sync`; it is only reached through `work`, see `body`.
unsafe impl Send for Loop {}
// SAFETY: as above.
unsafe impl Sync for Loop {}

impl Loop {
    fn new<'a>(count: usize, body: &'a (dyn Fn(usize) + Sync + 'a)) -> Self {
        // SAFETY: only the lifetime changes; `for_each` keeps the borrow alive for as long as calls are made.
        let body: *const (dyn Fn(usize) + Sync + 'static) =
            unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
        Self {
            body,
            count,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
        }
    }

    /// Takes numbers until none is left.
    fn work(&self) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.count {
                return;
            }
            // SAFETY: `i < count`, so `for_each` has not returned and the body is alive.
            let body = unsafe { &*self.body };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(i))) {
                *self.panic.lock().expect("no panic is raised while it is held") = Some(panic);
                self.panicked.store(true, Ordering::Release);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }

    fn exhausted(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.count
    }

    /// Until all calls have returned.
    fn wait(&self) {
        let mut turns = 0u32;
        while self.done.load(Ordering::Acquire) < self.count {
            turns += 1;
            // A worker that was taken off its core needs ours.
            if turns.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// What callers and workers share.
struct Shared {
    /// Grows with every loop published: what spinning workers watch.
    published: AtomicUsize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    loops: Vec<Arc<Loop>>,
    sleeping: usize,
}

impl Shared {
    fn publish(&self, loop_: &Arc<Loop>) {
        let mut state = self.state.lock().expect("nothing panics while it is held");
        state.loops.push(loop_.clone());
        self.published.fetch_add(1, Ordering::Release);
        if state.sleeping > 0 {
            self.wake.notify_all();
        }
    }

    fn withdraw(&self, loop_: &Arc<Loop>) {
        let mut state = self.state.lock().expect("nothing panics while it is held");
        state.loops.retain(|l| !Arc::ptr_eq(l, loop_));
    }

    fn find(&self) -> Option<Arc<Loop>> {
        let state = self.state.lock().expect("nothing panics while it is held");
        state.loops.iter().find(|l| !l.exhausted()).cloned()
    }

    /// A worker's life.
    fn serve(&self) {
        let mut seen = 0;
        loop {
            seen = self.next_after(seen);
            while let Some(loop_) = self.find() {
                loop_.work();
            }
        }
    }

    /// Waits until more than `seen` loops were published and returns how many: spinning first, then asleep.
    fn next_after(&self, seen: usize) -> usize {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                let published = self.published.load(Ordering::Acquire);
                if published != seen {
                    return published;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                return self.sleep(seen);
            }
        }
    }

    fn sleep(&self, seen: usize) -> usize {
        let mut state = self.state.lock().expect("nothing panics while it is held");
        state.sleeping += 1;
        // `published` changes under the lock only, so no wake-up is missed.
        while self.published.load(Ordering::Acquire) == seen {
            state = self.wake.wait(state).expect("nothing panics while it is held");
        }
        state.sleeping -= 1;
        self.published.load(Ordering::Acquire)
    }
}

struct Pool {
    shared: Arc<Shared>,
    workers: usize,
}

/// The process's pool, made at its first use.
fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let shared = Arc::new(Shared {
            published: AtomicUsize::new(0),
            state: Mutex::new(State::default()),
            wake: Condvar::new(),
        });
        let wanted = rayon::current_num_threads().saturating_sub(1);
        let spawn = |i: usize| {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(format!("kernel-{i}"));
            thread.spawn(move || shared.serve()).is_ok()
        };
        // Fewer threads than wished for are slower, not wrong.
        let workers = (0..wanted).take_while(|i| spawn(*i)).count();
        Pool { shared, workers }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_number_is_called_once() {
        for count in [0, 1, 2, 3, 100, 10_000] {
            let calls: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::new(0)).collect();
            for_each(count, |i| {
                calls[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{count}");
        }
    }

    #[test]
    fn many_short_loops_from_many_callers_all_end() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..2000u64 {
                        let sum = AtomicU64::new(0);
                        for_each(7, |i| {
                            sum.fetch_add(round + i as u64, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 7 * round + 21);
                    }
                });
            }
        });
    }

    #[test]
    fn loops_may_nest() {
        let sum = AtomicU64::new(0);
        for_each(5, |i| {
            for_each(5, |j| {
                sum.fetch_add((i * j) as u64, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 100);
    }

    #[test]
    fn sleeping_workers_wake_for_the_next_loop() {
        for _ in 0..3 {
            std::thread::sleep(4 * SPIN);
            every_number_is_called_once();
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_the_other_calls() {
        let calls = AtomicU64::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            for_each(50, |i| {
                calls.fetch_add(1, Ordering::Relaxed);
                assert!(i != 13, "thirteen");
            });
        }));
        assert!(result.is_err());
        assert_eq!(calls.into_inner(), 50);
        every_number_is_called_once();
    }

    #[test]
    fn chunks_are_disjoint_and_cover_all() {
        let mut data = vec![0usize; 103];
        for_each_chunk(&mut data, 10, |i, chunk| {
            for x in chunk {
                *x += i + 1;
            }
        });
        assert!(data.iter().enumerate().all(|(i, x)| *x == i / 10 + 1));
    }

    #[test]
    fn every_number_is_called_once_with_a_space_of_its_own() {
        let mut spaces = vec![Vec::new(); 3];
        for_each_with(100, &mut spaces, |i, space: &mut Vec<usize>| space.push(i));
        let mut all = spaces.concat();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }
}
