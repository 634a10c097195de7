//! One persistent pool of threads that spin for work before they sleep.
//!
//! A token's worth of inference is hundreds of parallel loops of a few microseconds each; waking a sleeping thread
//! takes longer than most of them. Workers therefore keep looking for the next loop for [`SPIN`] and only then go to
//! sleep. The caller takes part in its own loop, so a loop is finished even if no worker ever wakes.
//!
//! A loop costs a handful of atomic operations and no allocation: it lies in one of a few places ([`Place`]), from which
//! threads take its numbers; a caller that finds all places taken runs its loop alone.

use super::foresight;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// How long a worker looks for the next loop before it sleeps.
const SPIN: Duration = Duration::from_micros(150);

/// Loops that may be shared out at a time: as many callers as a process usually has, and loops within their loops.
const PLACES: usize = 8;

/// Parts of a loop whose numbers are counted one by one; with more threads some begin in the same part.
const PARTS: usize = 32;

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
    let taken = (count > 1 && count < 1 << COUNT_BITS && pool.workers > 0).then(|| pool.shared.take_place());
    let Some(place) = taken.flatten() else {
        return (0..count).for_each(f);
    };
    let loop_ = Loop { body: &f, count, panic: Mutex::new(None) };
    pool.shared.publish(place, &loop_);
    place.work(0, pool.workers + 1);
    place.wait(count, pool.workers + 1);
    // Every call of `f` has returned and no number of it is left: nobody looks at `loop_` any more.
    place.taken.store(false, Ordering::Release);
    if let Some(panic) = loop_.panic.into_inner().expect("nothing panics while it is held") {
        resume_unwind(panic);
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

/// A parallel loop in progress, on its caller's stack.
struct Loop<'a> {
    body: &'a (dyn Fn(usize) + Sync),
    count: usize,
    /// Of the call that panicked last.
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

impl Loop<'_> {
    fn call(&self, i: usize) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.body)(i))) {
            *self.panic.lock().expect("nothing panics while it is held") = Some(panic);
        }
    }
}

/// Bits of a ticket that count what is left of a loop.
const COUNT_BITS: u32 = 24;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

/// Where a loop lies while its numbers are given out.
#[repr(align(128))]
struct Place {
    /// Whether a caller has it.
    taken: AtomicBool,
    /// The low [`COUNT_BITS`] say how many numbers are left, the rest how many loops have lain here: numbers are taken by
    /// exchanging a ticket for the next lower one, which fails if it is another loop's.
    ticket: AtomicU64,
    /// The [`Loop`], of the lifetime that the loop has.
    loop_: AtomicPtr<Loop<'static>>,
    /// How many numbers were taken of each thread's own part.
    next: [AtomicUsize; PARTS],
    /// Calls that have returned.
    done: AtomicUsize,
}

/// Numbers of a loop that one thread takes first, in ascending order: where they are memory, it is read as it lies, and a
/// thread knows beforehand where it will begin ([`foresight`]).
fn part(count: usize, part: usize, parts: usize) -> Range<usize> {
    part * count / parts..(part + 1) * count / parts
}

impl Place {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            ticket: AtomicU64::new(0),
            loop_: AtomicPtr::new(null_mut()),
            next: [const { AtomicUsize::new(0) }; PARTS],
            done: AtomicUsize::new(0),
        }
    }

    /// Puts a loop here. The place is the caller's and no numbers are left in it.
    fn put(&self, loop_: &Loop<'_>) {
        let before = self.ticket.load(Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.next.iter().for_each(|next| next.store(0, Ordering::Relaxed));
        // Release: whoever sees this loop sees that no number of the one before was left, and fails to take one.
        self.loop_.store(std::ptr::from_ref(loop_).cast_mut().cast(), Ordering::Release);
        let number = (before >> COUNT_BITS).wrapping_add(1);
        self.ticket.store(number << COUNT_BITS | loop_.count as u64, Ordering::Release);
    }

    /// Takes numbers until none is left. Returns whether it got one.
    fn work(&self, thread: usize, threads: usize) -> bool {
        let mut ticket = self.ticket.load(Ordering::Acquire);
        let mut worked = false;
        while ticket & COUNT > 0 {
            let loop_ = self.loop_.load(Ordering::Acquire);
            match self.ticket.compare_exchange_weak(ticket, ticket - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: the ticket was still the one that was seen before `loop_` was loaded, so it is the loop
                    // that lay here then. Its caller leaves it alive until as many calls have returned as it has
                    // numbers, and this one has not.
                    let loop_ = unsafe { &*loop_ };
                    let number = self.number(loop_.count, thread, threads);
                    loop_.call(number);
                    self.done.fetch_add(1, Ordering::Release);
                    worked = true;
                    ticket = self.ticket.load(Ordering::Acquire);
                }
                Err(now) => ticket = now,
            }
        }
        worked
    }

    /// One of the numbers left, from the thread's own part if it has some. There is one: as many were left as tickets.
    fn number(&self, count: usize, thread: usize, threads: usize) -> usize {
        let parts = threads.min(PARTS);
        for p in (thread..thread + parts).map(|p| p % parts).cycle() {
            let part = part(count, p, parts);
            let taken = self.next[p].fetch_add(1, Ordering::Relaxed);
            if taken < part.len() {
                return part.start + taken;
            }
        }
        unreachable!("the parts go round for ever")
    }

    /// Until `count` calls have returned.
    fn wait(&self, count: usize, threads: usize) {
        let mut turns = 0u32;
        while self.done.load(Ordering::Acquire) < count {
            turns += 1;
            foresight::fetch(0, threads);
            // A worker that was taken off its core needs ours.
            if turns.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// What callers and workers share.
struct Shared {
    /// Grows with every loop published: what spinning workers watch.
    published: AtomicUsize,
    places: [Place; PLACES],
    /// Workers that are asleep or about to be.
    sleeping: AtomicUsize,
    /// Held by workers that fall asleep and by callers that wake them.
    bed: Mutex<()>,
    wake: Condvar,
}

impl Shared {
    /// A place for a loop, if one is free.
    fn take_place(&self) -> Option<&Place> {
        let free = |place: &&Place| {
            !place.taken.load(Ordering::Relaxed) && !place.taken.swap(true, Ordering::Acquire)
        };
        self.places.iter().find(free)
    }

    fn publish(&self, place: &Place, loop_: &Loop<'_>) {
        place.put(loop_);
        // Sequentially consistent, as in `sleep`: either this sees the sleeper or the sleeper sees this.
        self.published.fetch_add(1, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            drop(self.bed.lock().expect("nothing panics while it is held"));
            self.wake.notify_all();
        }
    }

    /// A worker's life.
    fn serve(&self, thread: usize, threads: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_after(seen, thread, threads);
            while self.places.iter().any(|place| place.work(thread, threads)) {}
        }
    }

    /// Waits until more than `seen` loops were published and returns how many: spinning first, then asleep.
    fn next_after(&self, seen: usize, thread: usize, threads: usize) -> usize {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                let published = self.published.load(Ordering::Acquire);
                if published != seen {
                    return published;
                }
                foresight::fetch(thread, threads);
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                return self.sleep(seen);
            }
        }
    }

    fn sleep(&self, seen: usize) -> usize {
        let mut bed = self.bed.lock().expect("nothing panics while it is held");
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        while self.published.load(Ordering::SeqCst) == seen {
            bed = self.wake.wait(bed).expect("nothing panics while it is held");
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
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
            places: [const { Place::new() }; PLACES],
            sleeping: AtomicUsize::new(0),
            bed: Mutex::new(()),
            wake: Condvar::new(),
        });
        let wanted = rayon::current_num_threads().saturating_sub(1);
        let spawn = |i: usize| {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(format!("kernel-{i}"));
            thread.spawn(move || shared.serve(i + 1, wanted + 1)).is_ok()
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
