//! Whatever fails, a complete checkpoint is left and found.

use super::{Dice, assert_state, companions, files, save};
use crate::faulty_disk::{Fault, FaultyDisk};
use hearth_train::checkpoint::{self, StateDtype, begin, prune, search, step_path, sweep};
use hearth_train::{Disk, Files};
use std::path::Path;

/// A disk without a fault, and without the wait for one that spins.
fn calm() -> FaultyDisk {
    FaultyDisk::new(Fault::Dies, usize::MAX)
}

/// A directory with a complete step-1 and a damaged step-2.
fn damaged_run() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    save(&calm(), dir.path(), 1, 2, 1).expect("saves");
    let path = save(&calm(), dir.path(), 2, 2, 1).expect("saves").join(checkpoint::OPTIMIZER_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
    dir
}

/// Saves step-2 anew and step-3 by three ranks, pruning after each. Returns the newest step whose save came back well.
fn go_on(disk: &dyn Files, dir: &Path) -> u64 {
    let mut newest = 1;
    for step in 2..=3 {
        if save(disk, dir, step, 3, step).is_err() {
            break;
        }
        newest = step;
        if prune(disk, dir, 1).is_err() {
            break;
        }
    }
    newest
}

/// What has to hold after [`go_on`] met a fault: the newest complete checkpoint is found and holds the state of its
/// step, those that are not are named, and a run goes on from there.
fn assert_recovers(disk: &FaultyDisk, fault: Fault, dir: &Path, saved: u64, dice: &mut Dice, case: &str) {
    disk.cut_power(|| dice.next(2) == 0);
    let found = search(dir).expect("reads");
    let newest = found.newest.unwrap_or_else(|| panic!("{case}: nothing is left: {:?}", found.skipped));
    let step = newest.manifest.progress.step;
    assert_state(&newest);
    for skipped in &found.skipped {
        let name = skipped.path.file_name().unwrap().to_string_lossy();
        assert!(name.contains("step-") && !skipped.why.is_empty(), "{case}: {skipped:?}");
    }
    match fault {
        // What was written wrong is found when it is read.
        Fault::Flips => {
            assert!(step == saved || found.skipped.len() as u64 >= saved - step, "{case}: {step} of {saved}")
        }
        _ => assert!(step >= saved, "{case}: step {step} is left, {saved} was saved"),
    }
    sweep(&Disk, dir).expect("sweeps");
    let again = search(dir).expect("reads").newest.expect("sweeping takes no complete checkpoint");
    assert_eq!(again.manifest, newest.manifest, "{case}");
    save(&calm(), dir, step + 1, 2, 9).expect("the disk is well again");
    let next = search(dir).expect("reads").newest.expect("the one just written");
    assert!(next.manifest.progress.step > step, "{case}");
    assert_state(&next);
}

/// Operations of [`go_on`] when nothing fails.
fn operations() -> usize {
    let (dir, disk) = (damaged_run(), calm());
    assert_eq!(go_on(&disk, dir.path()), 3);
    assert_eq!(search(dir.path()).unwrap().newest.unwrap().manifest.progress.step, 3);
    disk.operations()
}

#[test]
fn every_operation_of_a_save_may_fail_or_be_the_last_one() {
    let operations = operations();
    assert!(operations > 80, "{operations} operations");
    for at in 0..operations {
        for fault in [Fault::Dies, Fault::Fails, Fault::Fills, Fault::Short, Fault::Flips] {
            let (dir, disk) = (damaged_run(), FaultyDisk::new(fault, at));
            let saved = go_on(&disk, dir.path());
            if fault == Fault::Short {
                assert_eq!(saved, 3, "a short write at operation {at} goes on where it stopped");
            }
            let case = format!("{fault:?} at operation {at}");
            assert_recovers(&disk, fault, dir.path(), saved, &mut Dice(at as u64), &case);
        }
    }
}

#[test]
fn a_run_survives_faults_at_random_points_of_random_layouts() {
    let faults = [Fault::Dies, Fault::Fills, Fault::Short, Fault::Flips];
    for seed in 0..240 {
        let mut dice = Dice(seed);
        let (dir, fault) = (tempfile::tempdir().unwrap(), faults[dice.next(4)]);
        save(&calm(), dir.path(), 1, 1, seed).expect("saves");
        let disk = FaultyDisk::new(fault, dice.next(150));
        let mut saved = 1;
        for step in 2..6 {
            let world = 1 + dice.next(6);
            if save(&disk, dir.path(), step, world, seed + step).is_err() {
                break;
            }
            saved = step;
            if prune(&disk, dir.path(), 1 + dice.next(2)).is_err() {
                break;
            }
        }
        assert_recovers(&disk, fault, dir.path(), saved, &mut dice, &format!("{fault:?}, seed {seed}"));
    }
}

#[test]
fn a_disk_too_small_is_known_before_a_rank_writes() {
    let (dir, layout) = (damaged_run(), files(StateDtype::F32));
    let disk = FaultyDisk::new(Fault::Fills, 2);
    let error = begin(&disk, dir.path(), 3, &layout, &[], false).expect_err("has no room").to_string();
    assert!(error.contains("step-3 was not saved: no space left on device"), "{error}");
    assert!(!checkpoint::partial_path(dir.path(), 3).exists());
}

#[test]
fn what_killed_saves_left_is_removed_by_a_clean_begin() {
    let dir = damaged_run();
    begin(&Disk, dir.path(), 7, &files(StateDtype::F32), &companions(), false).expect("begins");
    std::fs::rename(step_path(dir.path(), 2), dir.path().join(".step-2.replaced")).unwrap();
    begin(&Disk, dir.path(), 8, &files(StateDtype::F32), &[], true).expect("begins");
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [".step-8.partial", "step-1", "step-2"]);
}
