use crate::support::{best, pattern};
use hearth_memory::nvme::BACKENDS;
use hearth_memory::stream::{Ahead, Prefetcher};
use hearth_memory::{Budget, Error, Ledger, NvmeFile, Size, Tier};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use tempfile::TempDir;

fn filled(len: usize) -> (TempDir, Arc<NvmeFile>, Vec<u8>) {
    let (directory, file) = best(len as u64);
    let bytes = pattern(len, 11);
    file.write_at(0, &bytes).expect("inside the file");
    (directory, Arc::new(file), bytes)
}

fn blocks(count: u64, len: u64) -> Vec<Range<u64>> {
    (0..count).map(|i| i * len..(i + 1) * len).collect()
}

fn prefetcher(file: &Arc<NvmeFile>, sequence: Vec<Range<u64>>, look_ahead: usize) -> Prefetcher {
    let ahead = Ahead { look_ahead, leases: 1 };
    Prefetcher::new(file.clone(), sequence, ahead, &Ledger::default(), Tier::Host).expect("fits")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn ranges_arrive_in_order_with_the_bytes_of_the_file(
        starts in prop::collection::vec((0..60_000u64, 0..5000u64), 0..20), look_ahead in 0..5usize,
        backend in 0..BACKENDS.len(),
    ) {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a writable disk");
        let path = directory.path().join("bytes");
        let backends = &BACKENDS[backend..];
        let file = Arc::new(NvmeFile::create_with(backends, &path, 65_000, None).expect("the last always works"));
        let bytes = pattern(65_000, 2);
        file.write_at(0, &bytes).expect("inside the file");
        let sequence: Vec<_> = starts.iter().map(|&(start, len)| start..start + len).collect();
        let mut prefetcher = prefetcher(&file, sequence.clone(), look_ahead);
        for _ in 0..2 {
            for range in &sequence {
                let lease = prefetcher.next().expect("the disk works").expect("not the last");
                assert_eq!(*lease, bytes[range.start as usize..range.end as usize]);
            }
            assert!(prefetcher.next().expect("the disk works").is_none());
            prefetcher.restart();
        }
    }
}

#[test]
fn forward_then_backward_then_the_updated_bytes_after_a_restart() {
    let (_directory, file, bytes) = filled(6 * 8192);
    let mut sequence = blocks(6, 8192);
    sequence.extend(blocks(6, 8192).into_iter().rev());
    let mut prefetcher = prefetcher(&file, sequence.clone(), 3);
    for range in &sequence {
        let lease = prefetcher.next().expect("the disk works").expect("not the last");
        assert_eq!(*lease, bytes[range.start as usize..range.end as usize]);
    }
    file.write_at(0, &[7; 8192]).expect("inside the file");
    prefetcher.restart();
    assert_eq!(*prefetcher.next().expect("the disk works").expect("the first"), [7; 8192]);
}

#[test]
fn the_ring_is_charged_once_and_refunded_with_the_last_lease() {
    let (_directory, file, _) = filled(8 * 5000);
    let ledger = Ledger::new(Budget { host: Some(Size(5 * 8192)), ..Budget::UNLIMITED });
    let ahead = Ahead { look_ahead: 3, leases: 2 };
    assert_eq!(ahead.ring_bytes(&blocks(8, 5000)), 5 * 8192);
    let mut prefetcher =
        Prefetcher::new(file.clone(), blocks(8, 5000), ahead, &ledger, Tier::Host).expect("fits");
    let mut lease = prefetcher.next().expect("the disk works");
    while let Some(next) = prefetcher.next().expect("two leases at once are planned for") {
        lease = Some(next);
        assert_eq!(ledger.used(Tier::Host), 5 * 8192);
    }
    let over = Prefetcher::new(file, blocks(1, 5000), ahead, &ledger, Tier::Host).err().expect("full");
    assert!(matches!(over, Error::OverBudget { .. }), "{over}");
    drop(prefetcher);
    assert_eq!(ledger.used(Tier::Host), 8192);
    drop(lease);
    assert_eq!(ledger.used(Tier::Host), 0);
}

#[test]
fn leasing_every_buffer_is_an_error_and_dropping_one_goes_on() {
    let (_directory, file, bytes) = filled(4 * 4096);
    let mut prefetcher = prefetcher(&file, blocks(4, 4096), 1);
    let mut leases: Vec<_> =
        (0..2).map(|_| prefetcher.next().expect("free").expect("not the last")).collect();
    let error = prefetcher.next().err().expect("both are leased").to_string();
    assert_eq!(error, "buffer ring: all 2 buffers are leased; drop one first");
    leases.pop();
    let third = prefetcher.next().expect("one is free").expect("not the last");
    assert_eq!(*third, bytes[2 * 4096..3 * 4096]);
}

#[test]
fn a_range_that_cannot_be_read_is_named_and_the_next_one_comes() {
    let (_directory, file, bytes) = filled(6 * 4096);
    std::fs::OpenOptions::new()
        .write(true)
        .open(file.path())
        .and_then(|f| f.set_len(4096))
        .expect("truncated");
    let sequence = vec![0..4096, 8192..12288, 0..4096];
    let mut prefetcher = prefetcher(&file, sequence, 2);
    assert_eq!(*prefetcher.next().expect("it is there").expect("the first"), bytes[..4096]);
    let error = prefetcher.next().err().expect("past the end").to_string();
    assert!(error.starts_with("reading 4096 bytes at offset 8192 of "), "{error}");
    assert_eq!(*prefetcher.next().expect("it is there").expect("the third"), bytes[..4096]);
    assert!(prefetcher.next().expect("the end").is_none());
}

#[test]
fn a_sequence_outside_the_file_or_the_ring_is_refused_and_the_old_one_goes_on() {
    let (_directory, file, bytes) = filled(4 * 4096);
    let mut prefetcher = prefetcher(&file, blocks(4, 4096), 2);
    let first = *prefetcher.next().expect("it is there").expect("the first").first().expect("not empty");
    assert!(matches!(prefetcher.restart_with(blocks(5, 4096)), Err(Error::Range { .. })));
    assert!(matches!(prefetcher.restart_with(blocks(1, 8192)), Err(Error::Ring { .. })));
    let second = prefetcher.next().expect("it is there").expect("the second");
    assert_eq!((first, &*second), (bytes[0], &bytes[4096..8192]));
}
