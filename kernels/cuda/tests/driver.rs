//! Listing cards, through a stand-in for the driver: a library with the same functions, compiled here.

use hearth_cuda::driver::{Card, Driver, Error};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A driver with these definitions, as a library of its own.
fn stand_in(name: &str, definitions: &[&str]) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = target.join(format!("libstand-in-{name}-{}.so", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in_driver.c");
    let defaults = ["-DINIT=0", "-DVERSION=12040", "-DCOUNT=2"];
    let mut compile = Command::new("cc");
    compile
        .args(["-shared", "-fPIC", "-w"])
        .args(defaults)
        .args(definitions)
        .arg("-o")
        .args([&library, &source]);
    let status = compile.status().expect("a C compiler is needed; on Debian: apt install build-essential");
    assert!(status.success(), "{compile:?}");
    library
}

fn open(name: &str, definitions: &[&str]) -> Result<Driver, Error> {
    let library = stand_in(name, definitions);
    let driver = Driver::open_at(&library);
    std::fs::remove_file(library).expect("our own file");
    driver
}

fn sentence(name: &str, definitions: &[&str]) -> String {
    match open(name, definitions) {
        Ok(driver) => driver.cards().expect_err("nothing to list").to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn cards_are_listed_with_capability_and_memory() {
    let driver = open("cards", &[]).expect("a good driver");
    assert_eq!(driver.version().expect("its version"), (12, 4));
    let card = |name: &str, capability, total: u64, free_bytes| Card {
        name: name.into(),
        capability,
        total_bytes: total << 30,
        free_bytes,
    };
    let cards = driver.cards().expect("two cards");
    assert_eq!(cards, [card("Card A", (9, 0), 40, Some(5)), card("Card B", (7, 5), 41, None)]);
    assert_eq!(cards.iter().map(Card::is_supported).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn every_reason_for_no_cards_is_one_sentence() {
    let missing =
        Driver::open_at(Path::new("/nowhere/libcuda.so.1")).err().expect("there is none").to_string();
    assert_eq!(missing, "no NVIDIA driver: libcuda.so.1 cannot be loaded");
    let old = "the NVIDIA driver is made for CUDA 11.4, 12.0 or newer is needed: update the driver";
    assert_eq!(sentence("old", &["-UVERSION", "-DVERSION=11040"]), old);
    assert_eq!(sentence("none", &["-UINIT", "-DINIT=100"]), "the NVIDIA driver finds no card");
    assert_eq!(sentence("zero", &["-UCOUNT", "-DCOUNT=0"]), "the NVIDIA driver finds no card");
    let failed = "the NVIDIA driver: cuInit failed with code 802 (system not yet initialized)";
    assert_eq!(sentence("failed", &["-UINIT", "-DINIT=802"]), failed);
    assert!(sentence("unknown", &["-UINIT", "-DINIT=999"]).ends_with("code 999 (unknown)"));
    assert!(
        sentence("foreign", &["-DFOREIGN"]).ends_with("is not an NVIDIA driver: it lacks cuMemGetInfo_v2")
    );
}
