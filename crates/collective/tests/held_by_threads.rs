//! What ranks that are threads hold. A test of its own, since the allocator counts for the process.
#![forbid(unsafe_code)]

mod held;

use std::thread;

use hearth_collective::{Ordered, Watchdog, threads};

#[test]
fn a_rank_holds_what_the_plan_is_told_and_nothing_afterwards() {
    let ranks = threads::group(3).into_iter().map(|group| {
        thread::spawn(move || held::check(Ordered::start(Box::new(group), Watchdog::default())))
    });
    for rank in ranks.collect::<Vec<_>>() {
        rank.join().expect("no rank fails");
    }
}
