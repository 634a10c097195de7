//! Every kernel launched from Rust against the CPU's, with the driver that runs kernels on the CPU.

use hearth_cuda::runtime::{Device, Libraries};
use hearth_cuda_stand_in::StandIn;
use hearth_gpu::checks;
use hearth_memory::Ledger;

#[test]
fn every_check_holds_and_together_they_launch_every_kernel() {
    let driver = StandIn::new();
    let card = Device::open_with(0, &Ledger::default(), &Libraries::from(driver.path())).expect("a card");
    let outcomes = checks::run(&card, |outcome| {
        println!(
            "{:6.2} s  {}  {}",
            outcome.seconds,
            outcome.claim,
            outcome.failure.as_deref().unwrap_or("ok")
        );
    });
    let failures: Vec<_> = outcomes.expect("a stream").into_iter().filter(|o| o.failure.is_some()).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(driver.idle(), [""; 0], "kernels that nothing checks");
}

#[test]
fn a_lost_card_ends_the_checks_with_a_sentence() {
    let driver = StandIn::new();
    driver.set("launches", 5);
    let card = Device::open_with(0, &Ledger::default(), &Libraries::from(driver.path())).expect("a card");
    let outcomes = checks::run(&card, |_| ()).expect("a stream");
    let failure = outcomes.last().and_then(|outcome| outcome.failure.clone()).expect("it failed");
    assert!(failure.starts_with("the card was lost at "), "{failure}");
    assert!(outcomes.len() < checks::CHECKS.len());
}
