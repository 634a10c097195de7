use crate::support::{best, pattern};
use hearth_memory::stream::WriteBehind;
use hearth_memory::{Error, Ledger, Tier};
use std::sync::Arc;

#[test]
fn what_is_written_behind_is_in_the_file_when_it_is_finished_whatever_the_number_of_buffers() {
    let (_directory, file) = best(10 * 8192);
    let (file, bytes) = (Arc::new(file), pattern(10 * 8192, 3));
    for buffers in 1..5 {
        let ledger = Ledger::default();
        let mut behind =
            WriteBehind::new(file.clone(), buffers, 8192, &ledger, Tier::Host).expect("no limit");
        assert_eq!(ledger.used(Tier::Host), 8192 * buffers as u64);
        file.write_at(0, &vec![0; bytes.len()]).expect("the disk works");
        // Backwards, and the last one short.
        for (at, part) in bytes.chunks(8192).enumerate().rev() {
            let len = if at == 0 { 5000 } else { part.len() };
            let mut buffer = behind.buffer(len).expect("one is free");
            buffer.copy_from_slice(&part[..len]);
            behind.write(8192 * at as u64, buffer).expect("inside the file");
        }
        behind.finish().expect("the disk works");
        let mut expected = bytes.clone();
        expected[5000..8192].fill(0);
        let mut found = vec![0; bytes.len()];
        file.read_at(0, &mut found).expect("the disk works");
        assert!(found == expected, "{buffers} buffers");
        drop(behind);
        assert_eq!(ledger.used(Tier::Host), 0);
    }
}

#[test]
fn a_write_behind_that_cannot_be_says_so_and_loses_no_buffer() {
    let (_directory, file) = best(8192);
    let mut behind =
        WriteBehind::new(Arc::new(file), 1, 4096, &Ledger::default(), Tier::Host).expect("no limit");
    assert!(matches!(behind.buffer(4097), Err(Error::Ring { .. })));
    let buffer = behind.buffer(4096).expect("one is free");
    assert!(matches!(behind.buffer(1), Err(Error::Ring { .. })), "the caller has it");
    assert!(matches!(behind.write(4097, buffer), Err(Error::Range { .. })));
    let buffer = behind.buffer(4096).expect("it came back");
    behind.write(4096, buffer).expect("inside the file");
    behind.finish().expect("the disk works");
}
