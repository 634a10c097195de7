//! Nothing keeps running after a pass. One test, since threads are the process's.
#![cfg(target_os = "linux")]

use hearth_memory::nvme::BACKENDS;
use hearth_memory::stream::{Ahead, Prefetcher, update_tiles};
use hearth_memory::{AlignedBuffer, Error, Ledger, NvmeFile, Tier};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Threads and open files of this process. The kernel's workers behind io_uring are not ours to count.
fn running() -> (usize, usize) {
    let tasks = fs::read_dir("/proc/self/task").expect("Linux").flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    let threads = names.filter(|name| !name.starts_with("iou-")).count();
    (threads, fs::read_dir("/proc/self/fd").expect("Linux").count())
}

#[test]
fn no_thread_and_no_file_outlives_a_pass_that_ends_in_any_way() {
    let directory = tempfile::tempdir().expect("a writable disk");
    let before = running();
    for backend in &BACKENDS {
        let path = directory.path().join("bytes");
        let Ok(file) = NvmeFile::create_with(std::slice::from_ref(backend), &path, 64 << 12, None) else {
            continue;
        };
        let file = Arc::new(file);
        let tiles: Vec<_> = (0..16).map(|i| i << 14..(i + 1) << 14).collect();
        let mut ring: Vec<_> = (0..4).map(|_| AlignedBuffer::new(1 << 14)).collect();
        for end in 0..3 {
            let pass = AssertUnwindSafe(|| {
                update_tiles(&file, &tiles, &mut ring, &mut |tile, _| match (end, tile) {
                    (1, 7) => Err(Error::Ring { why: "the caller's error".into() }),
                    (2, 7) => panic!("the caller's panic"),
                    _ => Ok(()),
                })
            });
            let ended = catch_unwind(pass);
            assert_eq!((matches!(ended, Ok(Ok(_))), ended.is_err()), (end == 0, end == 2));
        }
        let ahead = Ahead { look_ahead: 3, leases: 1 };
        let mut prefetcher =
            Prefetcher::new(file, tiles, ahead, &Ledger::default(), Tier::Host).expect("no limit");
        assert!(prefetcher.next().expect("the disk works").is_some());
    }
    assert_eq!(running(), before);
}
