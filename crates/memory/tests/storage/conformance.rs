use hearth_memory::tier::{Faulty, NvmeStorage, STORAGES, Storage};
use hearth_memory::{Error, Kind, Ledger, Tier};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::Path;

/// Runs `check` on every storage with a budget of 1 MiB in each tier, bare and behind a wrapper without faults.
fn with_every_storage(check: impl Fn(&dyn Storage, &Ledger)) {
    let limited = || Ledger::new("device=1MiB,host=1MiB,nvme=1MiB".parse().expect("well formed"));
    for entry in &STORAGES {
        let open =
            |directory: &Path, ledger: &Ledger| (entry.open)(directory, ledger).expect("a writable disk");
        let (directory, ledger) = (tempfile::tempdir().expect("a writable disk"), limited());
        check(&*open(directory.path(), &ledger), &ledger);
        let (directory, ledger) = (tempfile::tempdir().expect("a writable disk"), limited());
        check(&Faulty::new(open(directory.path(), &ledger), 0, Vec::new()), &ledger);
    }
}

fn used(ledger: &Ledger) -> u64 {
    Tier::ALL.into_iter().map(|tier| ledger.used(tier)).sum()
}

#[test]
fn a_new_entry_is_zeros_and_keeps_what_is_written() {
    with_every_storage(|storage, _| {
        storage.create("layer.0.weight", Kind::Optimizer, 10_000).expect("fits");
        let mut bytes = [1; 100];
        storage.read("layer.0.weight", 9_900, &mut bytes).expect("it is there");
        assert_eq!(bytes, [0; 100]);
        storage.write("layer.0.weight", 5_000, &[9; 100]).expect("it is there");
        storage.sync("layer.0.weight").expect("the disk confirms");
        storage.read("layer.0.weight", 5_000, &mut bytes).expect("it is there");
        assert_eq!(bytes, [9; 100]);
    });
}

#[test]
fn what_is_not_there_is_named() {
    with_every_storage(|storage, _| {
        let missing = Error::NoEntry { storage: storage.name().into(), key: "missing".into() };
        assert_eq!(storage.read("missing", 0, &mut [0]), Err(missing.clone()));
        assert_eq!(storage.write("missing", 0, &[0]), Err(missing.clone()));
        assert_eq!(storage.sync("missing"), Err(missing));
        storage.remove("missing").expect("nothing to do");
        storage.create("short", Kind::Weights, 10).expect("fits");
        for (offset, len) in [(0, 11), (10, 1), (u64::MAX, 2)] {
            let error = storage.read("short", offset, &mut vec![0; len]).expect_err("too far");
            assert!(matches!(error, Error::Range { size: 10, .. }), "{error}");
        }
    });
}

#[test]
fn keys_that_lead_elsewhere_are_refused() {
    with_every_storage(|storage, ledger| {
        let long = "k".repeat(201);
        for key in ["", ".", "..", "../key", "a/b", "/etc/passwd", "a\0b", ".new-a", "ключ", &long] {
            let error = storage.create(key, Kind::Weights, 1).expect_err(key);
            assert!(matches!(error, Error::Key { .. }), "{error}");
        }
        assert_eq!(used(ledger), 0);
    });
}

#[test]
fn the_budget_holds_and_a_refused_entry_leaves_the_old_one() {
    with_every_storage(|storage, ledger| {
        assert_eq!(storage.capacity(), Some(1 << 20));
        storage.create("state", Kind::Optimizer, 600 << 10).expect("fits");
        storage.write("state", 0, b"old").expect("it is there");
        let error = storage.create("state", Kind::Optimizer, 600 << 10).expect_err("both do not fit");
        assert!(matches!(error, Error::OverBudget { limit: 0x10_0000, .. }), "{error}");
        let mut bytes = [0; 3];
        storage.read("state", 0, &mut bytes).expect("it is there");
        assert_eq!(&bytes, b"old");
        storage.remove("state").expect("it is there");
        assert_eq!(used(ledger), 0);
        assert!(storage.read("state", 0, &mut bytes).is_err());
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn a_storage_is_a_map_of_byte_arrays(
        calls in prop::collection::vec((0..3usize, 0..4usize, 0..9000u64, 0..5000usize, any::<u8>()), 1..25)
    ) {
        with_every_storage(|storage, _| {
            let mut model: HashMap<String, Vec<u8>> = HashMap::new();
            for &(key, call, offset, len, fill) in &calls {
                let key = format!("k{key}");
                match (call, model.get_mut(&key)) {
                    (0, _) => {
                        storage.create(&key, Kind::Weights, offset).expect("fits");
                        model.insert(key, vec![0; offset as usize]);
                    }
                    (1, _) => {
                        storage.remove(&key).expect("it works");
                        model.remove(&key);
                    }
                    (2, Some(bytes)) if offset as usize + len <= bytes.len() => {
                        storage.write(&key, offset, &vec![fill; len]).expect("inside");
                        bytes[offset as usize..offset as usize + len].fill(fill);
                    }
                    (3, Some(bytes)) => {
                        let mut read = vec![1; bytes.len()];
                        storage.read(&key, 0, &mut read).expect("inside");
                        assert_eq!(&read, bytes);
                    }
                    (_, _) => assert!(storage.read(&key, offset, &mut vec![0; 10_000]).is_err()),
                }
            }
        });
    }
}

#[test]
fn entries_on_a_disk_outlive_the_storage_that_made_them() {
    let directory = tempfile::tempdir().expect("a writable disk");
    let open = || NvmeStorage::new(directory.path(), &Ledger::default()).expect("a writable disk");
    let first = open();
    first.create("state", Kind::Optimizer, 5).expect("fits");
    first.write("state", 0, b"bytes").expect("it is there");
    drop(first);
    let mut bytes = [0; 5];
    open().read("state", 0, &mut bytes).expect("it is there");
    assert_eq!(&bytes, b"bytes");
    assert_eq!(open().file("state").expect("it is there").len(), 5);
}
