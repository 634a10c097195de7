//! The counting allocator, installed. One test, since the counts are the process's.

use hearth_memory::heap::{self, CountingAllocator};
use hearth_memory::{AlignedBuffer, Error, Kind, Ledger, Tier};
use std::hint::black_box;
use std::time::Instant;

#[global_allocator]
static HEAP: CountingAllocator = CountingAllocator;

const MIB: u64 = 1 << 20;

/// What other threads of the test harness may allocate meanwhile.
const NOISE: u64 = 64 << 10;

#[test]
fn the_heap_is_counted_peaks_are_kept_and_the_limit_refuses() {
    buffers_count_what_the_ledger_charges();
    growing_and_shrinking_is_counted_as_the_difference();
    beyond_the_limit_there_is_no_memory();
    print_the_cost_of_counting();
}

fn now() -> u64 {
    heap::current().expect("installed")
}

fn near(counted: u64, expected: u64) {
    assert!(counted.abs_diff(expected) < NOISE, "{counted} bytes counted, {expected} expected");
}

fn buffers_count_what_the_ledger_charges() {
    let (ledger, before) = (Ledger::default(), now());
    heap::reset_peak();
    let buffer = AlignedBuffer::charged(&ledger, Tier::Host, Kind::Staging, 5 << 20).expect("fits");
    near(now() - before, ledger.used(Tier::Host));
    drop(buffer);
    near(now(), before);
    near(heap::peak().expect("installed") - before, ledger.peak(Tier::Host));
    heap::reset_peak();
    near(heap::peak().expect("installed"), before);
}

fn growing_and_shrinking_is_counted_as_the_difference() {
    let before = now();
    let mut bytes: Vec<u8> = Vec::with_capacity(1 << 20);
    bytes.reserve_exact(8 << 20);
    near(now() - before, 8 * MIB);
    bytes.shrink_to(2 << 20);
    near(now() - before, 2 * MIB);
    drop(black_box(bytes));
    near(now(), before);
}

fn beyond_the_limit_there_is_no_memory() {
    heap::set_limit(Some(now() + 4 * MIB));
    let ledger = Ledger::default();
    let charged = |len| AlignedBuffer::charged(&ledger, Tier::Host, Kind::Staging, len);
    let (small, large) = (charged(2 << 20), charged(3 << 20));
    let vector = Vec::<u8>::new().try_reserve_exact(3 << 20);
    heap::set_limit(None);
    assert!(small.is_ok() && vector.is_err());
    assert_eq!(large.expect_err("beyond the limit"), Error::OutOfMemory { bytes: 3 * MIB });
    assert_eq!(ledger.used(Tier::Host), 2 * MIB, "a refused buffer is not charged");
}

fn print_the_cost_of_counting() {
    use std::alloc::{GlobalAlloc, Layout, System};
    const PAIRS: u32 = 2_000_000;
    let time = |allocator: &dyn Fn()| {
        let begun = Instant::now();
        (0..PAIRS).for_each(|_| allocator());
        begun.elapsed().as_nanos() as f64 / f64::from(PAIRS)
    };
    let layout = Layout::from_size_align(64, 8).expect("well formed");
    // SAFETY: the layout is not empty, and each block goes back to where it came from.
    let counted = time(&|| unsafe { HEAP.dealloc(black_box(HEAP.alloc(layout)), layout) });
    // SAFETY: as above.
    let plain = time(&|| unsafe { System.dealloc(black_box(System.alloc(layout)), layout) });
    println!("allocate and free 64 bytes: {plain:.1} ns, counted {counted:.1} ns");
}
