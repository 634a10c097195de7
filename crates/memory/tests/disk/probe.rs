use hearth_memory::probe;

#[test]
fn the_probes_measure_and_leave_nothing_behind() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a writable disk");
    let disk = probe::disk(directory.path(), 64 << 20).expect("64 MiB fit");
    let memory = probe::memory();
    println!("{disk:.2?}\n{memory:.2?}");
    let speeds = [
        disk.read_gb_s,
        disk.write_gb_s,
        disk.mixed_gb_s,
        memory.read_gb_s,
        memory.copy_gb_s,
        memory.adam_gb_s,
    ];
    assert!(speeds.iter().all(|speed| speed.is_finite() && *speed > 0.0));
    assert!(disk.figures.iter().chain(&memory.figures).all(|figure| figure.samples.len() == 5));
    assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 0);
}

#[test]
fn a_disk_that_cannot_hold_the_probe_says_so() {
    let directory = tempfile::tempdir().expect("a writable disk");
    let error = probe::disk(directory.path(), 1 << 60).expect_err("no disk holds an exbibyte").to_string();
    assert!(error.contains("needs 1152921504606846976 bytes, the disk has "), "{error}");
}
