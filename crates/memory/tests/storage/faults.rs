use hearth_memory::tier::{Fault, Faulty, HostStorage, Storage};
use hearth_memory::{Error, Kind, Ledger};
use std::io::ErrorKind;

const LEN: usize = 1000;

fn faulty(seed: u64, faults: &[Fault]) -> Faulty<HostStorage> {
    let host = HostStorage::new(&Ledger::default());
    host.create("k", Kind::Weights, LEN as u64).expect("no limit");
    Faulty::new(host, seed, faults.to_vec())
}

fn content(storage: &Faulty<HostStorage>) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    storage.inner().read("k", 0, &mut bytes).expect("it is there");
    bytes
}

#[test]
fn a_full_disk_takes_what_fits_and_refuses_the_rest_for_good() {
    let storage = faulty(0, &[Fault::FullAfter { bytes: 150 }]);
    storage.write("k", 0, &[1; 100]).expect("fits");
    for _ in 0..2 {
        let error = storage.write("k", 100, &[2; 100]).expect_err("does not fit");
        assert!(
            matches!(error, Error::Io { kind: ErrorKind::StorageFull, offset: 100, len: 100, .. }),
            "{error}"
        );
    }
    let bytes = content(&storage);
    assert_eq!((bytes[99], bytes[149], bytes[150]), (1, 2, 0));
}

#[test]
fn a_short_write_claims_success_and_keeps_a_prefix() {
    let storage = faulty(3, &[Fault::ShortWrite { write: 1 }]);
    storage.write("k", 0, &[1; 100]).expect("whole");
    storage.write("k", 100, &[2; 100]).expect("it says so");
    storage.write("k", 200, &[3; 100]).expect("whole");
    let bytes = content(&storage);
    let kept = bytes[100..200].iter().take_while(|&&byte| byte == 2).count();
    assert!(kept < 100 && bytes[100 + kept..200].iter().all(|&byte| byte == 0));
    assert_eq!((bytes[99], bytes[200]), (1, 3));
}

#[test]
fn a_flipped_bit_is_one_bit_and_the_seed_chooses_it() {
    let flipped = |seed| {
        let storage = faulty(seed, &[Fault::FlippedBit { write: 0 }]);
        storage.write("k", 0, &[0; LEN]).expect("it says so");
        let bytes = content(&storage);
        assert_eq!(bytes.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        bytes
    };
    assert_eq!(flipped(1), flipped(1));
    assert_ne!(flipped(1), flipped(2));
}

#[test]
fn every_operation_in_turn_can_be_made_to_fail_and_does_nothing_then() {
    let calls = |storage: &Faulty<HostStorage>| -> Vec<bool> {
        let results = [
            storage.create("new", Kind::Weights, 10),
            storage.write("k", 0, &[1; 4]),
            storage.sync("k"),
            storage.read("k", 0, &mut [0; 4]),
            storage.remove("k"),
        ];
        results.iter().map(Result::is_ok).collect()
    };
    let total = {
        let storage = faulty(0, &[]);
        assert_eq!(calls(&storage), [true; 5]);
        storage.operations()
    };
    for operation in 0..total {
        let storage = faulty(0, &[Fault::Failing { operation }]);
        let failed: Vec<usize> =
            calls(&storage).iter().enumerate().filter(|(_, ok)| !**ok).map(|(i, _)| i).collect();
        assert_eq!(failed, [operation as usize]);
        assert_eq!(
            storage.inner().read("k", 0, &mut [0]).is_ok(),
            operation == 4,
            "a failed removal removes nothing"
        );
    }
}
