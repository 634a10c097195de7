//! What the KV cache stores: its bytes, and what it costs in accuracy.

use crate::support::{json, root, run, stderr, tiny_model};

#[test]
fn a_kv_cache_of_bytes_hardly_changes_the_perplexity() {
    let folder = tempfile::tempdir().expect("folder");
    let text = folder.path().join("text").display().to_string();
    let license = std::fs::read_to_string(root().join("LICENSE-APACHE")).expect("the license");
    std::fs::write(&text, &license[..4000]).expect("written");
    let of = |kind: &str| {
        let report = json(&["eval", &tiny_model(), "--perplexity", &text, "--kv-dtype", kind]);
        report["perplexity"].as_f64().expect("a number")
    };
    let exact = of("f32");
    for (kind, share) in [("f16", 1e-3), ("bf16", 1e-2), ("int8", 1e-2)] {
        let found = of(kind);
        assert!((found / exact - 1.0).abs() < share && found != exact, "{kind}: {found}, f32 {exact}");
    }
}

#[test]
fn a_plan_counts_the_bytes_of_what_the_kv_cache_stores() {
    let plan = |more: &[&str]| {
        let report = json(&[&["plan", "--serve", &tiny_model(), "--memory", "2MiB"], more].concat());
        let kinds = &report["tiers"]["device"]["by_kind"];
        let bytes = |kind: &str| kinds[kind].as_u64().unwrap_or_else(|| panic!("{kind}: {kinds}"));
        (report["kv_tokens"].as_u64().expect("tokens"), bytes("kv_cache"))
    };
    let [f32, f16, int8] = ["f32", "f16", "int8"].map(|kind| plan(&["--kv-dtype", kind]));
    assert!(f32.0 < f16.0 && f16.0 < int8.0, "{f32:?} {f16:?} {int8:?}");
    // Two layers, two heads of 8, keys and values: 2 × 2 × (2 × 8 numbers + padding of the values, and 2 scales).
    let per_token = |(tokens, bytes): (u64, u64)| bytes / tokens;
    assert_eq!([f32, f16, int8].map(per_token), [4 * 4 * 24, 2 * 4 * 24, 4 * (24 + 8)]);
}

#[test]
fn an_unknown_type_is_refused_with_those_there_are() {
    let output = run(&["generate", &tiny_model(), "--tokens", "1", "--kv-dtype", "int4"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("f32, f16, bf16, int8"), "{}", stderr(&output));
}

#[test]
fn a_plan_counts_kv_blocks_kept_on_the_host() {
    let plan = |more: &[&str]| {
        let memory = "device=2MiB,host=1MiB";
        json(&[&["plan", "--serve", &tiny_model(), "--memory", memory, "--kv-dtype", "f32"], more].concat())
    };
    // A block of 16 tokens takes 6144 bytes.
    let kept = plan(&["--kv-host", "300KiB"]);
    assert_eq!(
        (&kept["kv_host_tokens"], &kept["tiers"]["host"]["peak_bytes"]),
        (&800.into(), &307_200.into())
    );
    assert_eq!(kept["tiers"]["host"]["by_kind"]["kv_cache"], 307_200);
    let without = plan(&[]);
    assert_eq!((&without["kv_host_tokens"], &without["tiers"]["host"]["peak_bytes"]), (&0.into(), &0.into()));
    assert_eq!(kept["kv_tokens"], without["kv_tokens"], "the device keeps as many");
}

#[test]
fn host_memory_for_kv_blocks_that_is_not_there_is_refused() {
    let model = tiny_model();
    for (sizes, words) in [
        (["device=2MiB,host=100KiB", "101KiB"], "--kv-host: host tier: needs 103424 bytes, 102400 free"),
        (["device=2MiB,host=100KiB", "1KiB"], "one takes"),
    ] {
        let [memory, kept] = sizes;
        let output = run(&["plan", "--serve", &model, "--memory", memory, "--kv-host", kept]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    let output = run(&["plan", "recipe.toml", "--kv-host", "1MiB"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}
