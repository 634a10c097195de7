//! Listing cards, through the stand-in for the driver.

use hearth_cuda::driver::{Card, Driver, Error};
use hearth_cuda_stand_in::StandIn;
use std::path::Path;

/// A stand-in with these settings, opened.
fn open(settings: &[(&str, i64)]) -> (StandIn, Result<Driver, Error>) {
    let stand_in = StandIn::new();
    settings.iter().for_each(|(name, value)| stand_in.set(name, *value));
    let driver = Driver::open_at(stand_in.path());
    (stand_in, driver)
}

fn sentence(settings: &[(&str, i64)]) -> String {
    let (_stand_in, driver) = open(settings);
    match driver {
        Ok(driver) => driver.cards().expect_err("nothing to list").to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn cards_are_listed_with_capability_and_memory() {
    let (stand_in, driver) = open(&[("count", 2), ("version", 12040), ("total_bytes", 5 << 20)]);
    let driver = driver.expect("a good driver");
    assert_eq!(driver.version().expect("its version"), (12, 4));
    let card = |capability| Card {
        name: "stand-in".into(),
        capability,
        total_bytes: 5 << 20,
        free_bytes: Some(5 << 20),
    };
    assert_eq!(driver.cards().expect("two cards"), [card((9, 0)), card((9, 0))]);
    stand_in.set("major", 7);
    stand_in.set("minor", 5);
    let old = driver.cards().expect("two cards");
    assert_eq!(old, [card((7, 5)), card((7, 5))]);
    assert!(card((9, 0)).is_supported() && !old[0].is_supported());
}

#[test]
fn every_reason_for_no_cards_is_one_sentence() {
    let at = |path: &str| Driver::open_at(Path::new(path)).err().expect("no driver").to_string();
    assert_eq!(at("/nowhere/libcuda.so.1"), "no NVIDIA driver: /nowhere/libcuda.so.1 cannot be loaded");
    let foreign = at("libc.so.6");
    assert!(foreign.contains(" is not an NVIDIA driver: it lacks cu"), "{foreign}");
    let old = "the NVIDIA driver is made for CUDA 11.4, 12.0 or newer is needed: update the driver";
    assert_eq!(sentence(&[("version", 11040)]), old);
    assert_eq!(sentence(&[("init", 100)]), "the NVIDIA driver finds no card");
    assert_eq!(sentence(&[("count", 0)]), "the NVIDIA driver finds no card");
    let failed =
        "the NVIDIA driver: cuInit failed with code 46 (CUDA-capable device(s) is/are busy or unavailable)";
    assert_eq!(sentence(&[("init", 46)]), failed);
    assert!(sentence(&[("init", 999)]).ends_with("code 999 (unknown)"));
}
