//! What will be read, asked for in time.
//!
//! While a sequence generates, products wait for memory. A CPU looks a few hundred bytes ahead by itself; memory answers as
//! fast as it can only if more is under way, so a thread asks for what lies [`AHEAD`] bytes further on its way ([`Way`]).
//!
//! Between two products memory would wait: for a norm, for rounding, for the slower thread. A model's products follow one
//! another in the same order token after token, so each loop remembers which one came after it: a thread's way goes on there,
//! and a thread that waits asks for more of it. A wrong guess costs a little bandwidth and changes nothing else: asking for an
//! address reads nothing and cannot fail.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Matrices that one loop reads at most.
const PARTS: usize = 3;
/// How far ahead a thread asks: what memory gives it in the time that it takes to answer, several times over, and a small
/// part of its second-level cache.
const AHEAD: usize = 24 << 10;
/// Bytes that a thread asks for between two looks for work: a few hundred nanoseconds' worth.
const STEP: usize = 1 << 10;
/// Bytes that a thread asks for at most before a loop begins, a part of its second-level cache.
const MOST: usize = 384 << 10;
/// Loops remembered, more than any model's pass has.
const REMEMBERED: usize = 1 << 11;
const LINE: usize = 64;

/// What a loop reads; each thread begins at its own share, as [`super::pool`] gives numbers out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reads {
    /// First address and bytes of each matrix.
    parts: [(usize, usize); PARTS],
    /// Whether a share is one of each matrix, instead of one of all of them one after the other.
    abreast: bool,
}

impl Reads {
    /// All of `images`, at most three, one after the other.
    pub fn in_turn(images: &[&[u8]]) -> Self {
        Self::new(images, false)
    }

    /// The same part of each of `images`, at most three, at a time.
    pub fn abreast(images: &[&[u8]]) -> Self {
        Self::new(images, true)
    }

    fn new(images: &[&[u8]], abreast: bool) -> Self {
        let mut parts = [(0, 0); PARTS];
        for (part, image) in parts.iter_mut().zip(images) {
            *part = (image.as_ptr() as usize, image.len());
        }
        Self { parts, abreast }
    }

    /// Where the `n`-th [`STEP`] of a thread's share lies; `None` after the last.
    fn step(&self, thread: usize, threads: usize, n: usize) -> Option<usize> {
        let bytes = |(_, len): &(usize, usize)| *len;
        if self.abreast {
            let matrices = self.parts.iter().filter(|part| bytes(part) > 0).count().max(1);
            let (start, len) = self.parts[n % matrices];
            let at = n / matrices * STEP;
            return (at < len / threads).then(|| start + thread * len / threads + at);
        }
        let all: usize = self.parts.iter().map(bytes).sum();
        let mut at = n * STEP;
        if at >= all / threads {
            return None;
        }
        at += thread * all / threads;
        for (start, len) in self.parts {
            if at < len {
                return Some(start + at);
            }
            at -= len;
        }
        None
    }

    /// The matrices' addresses that belong to one of `threads` shares.
    fn share(&self, thread: usize, threads: usize) -> [Range<usize>; PARTS] {
        let all: usize = self.parts.iter().map(|(_, len)| len).sum();
        let mut before = 0;
        self.parts.map(|(start, len)| {
            let (from, to) = match self.abreast {
                true => (thread * len / threads, (thread + 1) * len / threads),
                false => {
                    let within = |at: usize| at.saturating_sub(before).min(len);
                    (within(thread * all / threads), within((thread + 1) * all / threads))
                }
            };
            before += len;
            start + from..start + to
        })
    }

    /// Where it is remembered: matrices lie on cache lines.
    fn place(&self) -> usize {
        self.parts[0].0 / LINE % REMEMBERED
    }
}

/// [`Reads`] that threads may look at while another changes them: what they see half changed is a wrong guess.
struct Slot {
    parts: [(AtomicUsize, AtomicUsize); PARTS],
    abreast: AtomicUsize,
}

impl Slot {
    const fn new() -> Self {
        let parts = [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; PARTS];
        Self { parts, abreast: AtomicUsize::new(0) }
    }

    fn set(&self, reads: Reads) {
        for ((start, len), value) in self.parts.iter().zip(reads.parts) {
            start.store(value.0, Ordering::Relaxed);
            len.store(value.1, Ordering::Relaxed);
        }
        self.abreast.store(usize::from(reads.abreast), Ordering::Relaxed);
    }

    fn get(&self) -> Reads {
        let mut reads = Reads::default();
        for (value, (start, len)) in reads.parts.iter_mut().zip(&self.parts) {
            *value = (start.load(Ordering::Relaxed), len.load(Ordering::Relaxed));
        }
        reads.abreast = self.abreast.load(Ordering::Relaxed) == 1;
        reads
    }
}

/// By the first address that a loop reads: what the loop after it read.
static FOLLOWERS: [Slot; REMEMBERED] = [const { Slot::new() }; REMEMBERED];
/// What the next loop is expected to read, and how often that changed.
static NEXT: Slot = Slot::new();
static CHANGES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Where the thread's last loop is remembered.
    static LAST: Cell<Option<usize>> = const { Cell::new(None) };
    /// The change of [`NEXT`] that the thread works on, and its steps so far.
    static STEPS: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    static WAY: Cell<Way> = const { Cell::new([Stretch { start: 0, end: 0, then: 0, reach: 0 }; PARTS]) };
}

/// Says that a loop begins, and from now on expects the one that came after it the last time.
pub(super) fn begin(reads: Reads) {
    let last = LAST.replace(Some(reads.place()));
    NEXT.set(expected(&FOLLOWERS, last, reads));
    CHANGES.fetch_add(1, Ordering::Release);
}

/// Remembers that `reads` came after the loop at place `last`; returns what came after `reads` the last time.
fn expected(followers: &[Slot; REMEMBERED], last: Option<usize>, reads: Reads) -> Reads {
    if let Some(last) = last {
        followers[last].set(reads);
    }
    followers[reads.place()].get()
}

/// What a thread reads one after the other, and where it goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stretch {
    start: usize,
    end: usize,
    /// What follows upon `end`.
    then: usize,
    /// How far ahead it asks.
    reach: usize,
}

impl Stretch {
    /// What lies ahead of `address`, if that is on this stretch.
    fn ahead(&self, address: usize) -> Option<usize> {
        (self.start..self.end).contains(&address).then(|| match address + self.reach {
            to if to < self.end => to,
            beyond => self.then + (beyond - self.end),
        })
    }
}

/// A thread's way through a loop.
type Way = [Stretch; PARTS];

fn way(reads: Reads, next: Reads, thread: usize, threads: usize) -> Way {
    let first = |reads: Reads| reads.share(thread, threads).into_iter().find(|range| !range.is_empty());
    let (share, after) = (reads.share(thread, threads), first(next).map_or(0, |range| range.start));
    let beside =
        if reads.abreast { share.iter().filter(|range| !range.is_empty()).count().max(1) } else { 1 };
    let mut way = Way::default();
    for (i, range) in share.iter().enumerate() {
        let following = share[i + 1..].iter().find(|range| !range.is_empty() && !reads.abreast);
        let reach = AHEAD / beside;
        let then = following.map_or(after + if reads.abreast { i * reach } else { 0 }, |range| range.start);
        way[i] = Stretch { start: range.start, end: range.end, then, reach };
    }
    way
}

/// Says that this thread works on share `thread` of a loop that [`begin`] was called for.
pub(super) fn enter(reads: Reads, thread: usize, threads: usize) {
    WAY.set(way(reads, NEXT.get(), thread, threads));
}

/// What a thread that reads on from `address` asks for meanwhile, as far as it reads.
#[inline]
pub(super) fn ahead(address: usize) -> usize {
    WAY.with(|way| way.get().iter().find_map(|stretch| stretch.ahead(address))).unwrap_or(address + AHEAD)
}

/// Asks for a few of the lines that this thread will read in the loop expected, if there are some left.
#[inline]
pub(super) fn fetch(thread: usize, threads: usize) {
    let change = CHANGES.load(Ordering::Acquire);
    let (seen, steps) = STEPS.get();
    let n = if seen == change { steps } else { 0 };
    if n == MOST / STEP {
        return;
    }
    match NEXT.get().step(thread, threads, n) {
        Some(address) => {
            (0..STEP).step_by(LINE).for_each(|line| ask(address + line));
            STEPS.set((change, n + 1));
        }
        None => STEPS.set((change, MOST / STEP)),
    }
}

/// Has the line of `address` brought to the second-level cache, where many lines may be on their way at a time.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn ask(address: usize) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a hint, which nothing happens for where no memory is.
    #[allow(unused_unsafe)]
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn ask(_address: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses of all steps of a thread.
    fn steps(reads: Reads, thread: usize, threads: usize) -> Vec<usize> {
        (0..).map_while(|n| reads.step(thread, threads, n)).collect()
    }

    #[test]
    fn threads_take_their_own_shares_in_order() {
        let images = vec![0u8; 12 * STEP];
        let base = images.as_ptr() as usize;
        let (first, second) = images.split_at(4 * STEP);
        let at = |range: std::ops::Range<usize>| range.map(|n| base + n * STEP).collect::<Vec<_>>();
        for (thread, expected) in [(0, at(0..4)), (1, at(4..8)), (2, at(8..12))] {
            assert_eq!(steps(Reads::in_turn(&[first, second]), thread, 3), expected, "{thread}");
        }
        let (first, second) = images.split_at(6 * STEP);
        let expected = [3, 9, 4, 10, 5, 11].map(|n| base + n * STEP);
        assert_eq!(steps(Reads::abreast(&[first, second]), 1, 2), expected);
        assert!(steps(Reads::default(), 0, 2).is_empty());
    }

    #[test]
    fn a_way_goes_through_a_threads_share_and_on_into_its_next_one() {
        let share = AHEAD * 4;
        let (q, k, next) = (1 << 30, 1 << 31, 1 << 32);
        // The first of two threads has all of q and half of k, the second the rest of k.
        let reads = Reads { parts: [(q, share), (k, 3 * share), (0, 0)], abreast: false };
        let after = Reads { parts: [(next, 2 * share), (0, 0), (0, 0)], abreast: false };
        let ahead = |way: Way, address: usize| way.iter().find_map(|s| s.ahead(address));
        let first = way(reads, after, 0, 2);
        assert_eq!(ahead(first, q), Some(q + AHEAD));
        assert_eq!(ahead(first, q + share - 10), Some(k + AHEAD - 10));
        assert_eq!(ahead(first, k + share - 10), Some(next + AHEAD - 10));
        assert_eq!(ahead(first, k + share), None, "the other thread's");
        let second = way(reads, after, 1, 2);
        assert_eq!(ahead(second, k + 3 * share - 10), Some(next + share + AHEAD - 10));
        // Side by side each matrix has its part of what is under way.
        let reads = Reads { abreast: true, parts: [(q, share), (k, share), (0, 0)] };
        let way = way(reads, after, 0, 2);
        assert_eq!(ahead(way, q), Some(q + AHEAD / 2));
        assert_eq!(ahead(way, q + share / 2 - 10), Some(next + AHEAD / 2 - 10));
        assert_eq!(ahead(way, k + share / 2 - 10), Some(next + AHEAD - 10));
    }

    #[test]
    fn a_loop_remembers_what_came_after_it() {
        let images: Vec<Vec<u8>> = (1..4).map(|n| vec![0; n << 12]).collect();
        let reads = |i: usize| Reads::in_turn(&[&images[i]]);
        let followers = [const { Slot::new() }; REMEMBERED];
        let mut last = None;
        let mut pass = || {
            [0, 1, 2].map(|i| {
                let next = expected(&followers, last, reads(i));
                last = Some(reads(i).place());
                next
            })
        };
        assert_eq!(pass()[0], Reads::default());
        assert_eq!(pass()[..2], [reads(1), reads(2)]);
        assert_eq!(pass(), [reads(1), reads(2), reads(0)]);
    }
}
