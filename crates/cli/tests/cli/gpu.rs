//! `hearth gpu` from outside, with a driver that runs kernels on the CPU and with none.

use crate::support::{hearth, stderr};
use hearth_cuda_stand_in::StandIn;
use serde_json::Value;
use std::fs;
use std::process::Output;

/// With this driver and compiler, these settings of it, and a cache of its own.
fn gpu(driver: &StandIn, settings: &str, arguments: &[&str]) -> Output {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let mut command = hearth(&[&["gpu"], arguments].concat());
    command.env("HEARTH_CUDA_DRIVER", driver.path()).env("HEARTH_NVRTC", driver.path());
    command.env("HEARTH_STAND_IN", settings).env("XDG_CACHE_HOME", cache.path());
    command.output().expect("the binary starts")
}

#[test]
fn a_bench_checks_first_and_leaves_one_report_as_json_and_markdown() {
    let (driver, folder) = (StandIn::new(), tempfile::tempdir().expect("a temporary folder"));
    let out = folder.path().join("new").display().to_string();
    let output = gpu(&driver, "", &["bench", "--tiny", "--out", &out]);
    assert!(output.status.success(), "{}", stderr(&output));
    let read = |name| fs::read_to_string(folder.path().join("new").join(name)).expect("a report");
    let json: Value = serde_json::from_str(&read("gpu.json")).expect("JSON");
    let all = |key: &str| json[key].as_array().cloned().unwrap_or_default();
    assert!(all("checks").len() > 10 && all("checks").iter().all(|check| check["failure"].is_null()));
    assert_eq!((json["card"].as_str(), json["tiny"].as_bool()), (Some("stand-in"), Some(true)));
    let page = read("gpu.md");
    for line in [
        "copy within the card",
        "q4_k product, 1 rows",
        "AdamW",
        "weights streamed while computing",
        "decoding tiny in q8_0",
    ] {
        assert!(page.contains(line), "{line}: {page}");
        assert!(
            all("speeds").iter().any(|s| s["what"].as_str().is_some_and(|what| what.contains(line))),
            "{line}"
        );
    }
    let steps = all("training");
    assert_eq!(steps.len(), 2, "{page}");
    for steps in &steps {
        assert_eq!(steps["planned_bytes"], steps["ledger_bytes"], "{steps}");
        assert!(steps["what"].as_str().is_some_and(|what| page.contains(what)), "{steps}");
    }
    assert!(steps[1]["units_on_host"].as_u64() > Some(0), "the budget moves something: {}", steps[1]);
}

#[test]
fn the_doctor_lists_a_card_with_what_it_measured() {
    let driver = StandIn::new();
    let mut doctor = hearth(&["doctor", "--json"]);
    doctor.env("HEARTH_CUDA_DRIVER", driver.path()).env("HEARTH_STAND_IN", "total_bytes=16777216");
    let output = doctor.output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let card = &report["gpus"]["cards"][0];
    assert_eq!((card["name"].as_str(), card["free_bytes"].as_u64()), (Some("stand-in"), Some(1 << 24)));
    for copies in ["within", "to_card", "to_host"] {
        assert!(card["copies"][copies].as_f64().is_some_and(|speed| speed > 0.0), "{copies}: {card}");
    }
}

#[test]
fn a_card_that_fails_is_a_sentence_and_an_exit_code() {
    let driver = StandIn::new();
    let cases = [
        (
            "version=11040",
            "the NVIDIA driver is made for CUDA 11.4, 12.0 or newer is needed: update the driver",
        ),
        ("count=0", "the NVIDIA driver finds no card"),
        ("major=7", "stand-in has compute capability 7.0, 8.0 or newer is needed"),
    ];
    for (settings, sentence) in cases {
        let output = gpu(&driver, settings, &["check"]);
        assert!(!output.status.success() && stderr(&output).contains(sentence), "{}", stderr(&output));
    }
    let lost = gpu(&driver, "launches=20", &["check"]);
    assert!(!lost.status.success() && stderr(&lost).contains("the card was lost at"), "{}", stderr(&lost));
    let small = gpu(&driver, "", &["bench", "--tiny", "--budget", "1KiB"]);
    assert!(!small.status.success() && stderr(&small).contains("device tier: needs"), "{}", stderr(&small));
    let none = gpu(&driver, "", &["check", "--device", "cuda:3"]);
    assert!(stderr(&none).contains("there is no card cuda:3: the driver lists 1"), "{}", stderr(&none));
}
