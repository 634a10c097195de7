use crate::support::{pattern, with_every_backend};
use hearth_memory::nvme::BACKENDS;
use hearth_memory::{AlignedBuffer, Budget, Error, Kind, Ledger, NvmeFile, Tier};
use proptest::prelude::*;
use std::fs;

const LEN: u64 = 3 * 4096 + 100;

#[test]
fn a_new_file_reads_as_zeros_to_its_last_byte() {
    with_every_backend(LEN, |file| {
        let mut bytes = vec![1; LEN as usize];
        file.read_at(0, &mut bytes).expect("it is there");
        assert!(bytes.iter().all(|&byte| byte == 0));
        assert_eq!(fs::metadata(file.path()).expect("it is there").len(), LEN);
    });
}

#[test]
fn bytes_outside_the_file_are_refused_with_its_size() {
    with_every_backend(LEN, |file| {
        for (offset, len) in [(0, LEN + 1), (LEN, 1), (u64::MAX, 1), (u64::MAX, 0)] {
            let mut bytes = vec![0; len as usize];
            let read = file.read_at(offset, &mut bytes).expect_err("too far");
            let written = file.write_at(offset, &bytes).expect_err("too far");
            assert_eq!(read, written);
            assert!(read.to_string().contains("it holds 12388"), "{read}");
        }
        file.read_at(LEN, &mut []).expect("nothing is everywhere");
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Writes at any offset, from memory of any alignment, leave exactly what a plain array would hold.
    #[test]
    fn a_file_is_an_array_of_bytes(
        writes in prop::collection::vec((0..5 * 4096u64, 0..3 * 4096usize, 0..2usize, any::<u64>()), 1..12)
    ) {
        let len = 6 * 4096 + 17;
        with_every_backend(len, |file| {
            let mut expected = vec![0; len as usize];
            for &(offset, count, odd, seed) in &writes {
                let count = count.min((len - offset) as usize);
                let mut memory = AlignedBuffer::new(count + odd);
                memory[odd..].copy_from_slice(&pattern(count, seed));
                file.write_at(offset, &memory[odd..]).expect("inside the file");
                expected[offset as usize..][..count].copy_from_slice(&memory[odd..]);
                memory.fill(0);
                file.read_at(offset, &mut memory[odd..]).expect("inside the file");
                assert_eq!(memory[odd..], expected[offset as usize..][..count]);
            }
            file.sync().expect("the disk confirms");
            assert_eq!(fs::read(file.path()).expect("it is there"), expected);
        });
    }
}

#[test]
fn threads_may_write_neighbours_within_one_page() {
    with_every_backend(16 * 4096, |file| {
        let (expected, threads) = (pattern(16 * 4096, 7), 4);
        let share = expected.len() / threads;
        std::thread::scope(|scope| {
            for (thread, part) in expected.chunks(share).enumerate() {
                scope.spawn(move || {
                    for (i, piece) in part.chunks(1000).enumerate() {
                        file.write_at((thread * share + i * 1000) as u64, piece).expect("inside the file");
                    }
                });
            }
        });
        assert_eq!(fs::read(file.path()).expect("it is there"), expected);
    });
}

#[test]
fn a_temporary_file_leaves_nothing_behind_and_works_meanwhile() {
    let directory = tempfile::tempdir().expect("a writable disk");
    let file = NvmeFile::temporary(&directory.path().join("state"), LEN, None).expect("fits");
    file.write_at(5, b"bytes").expect("inside the file");
    let mut bytes = [0; 5];
    file.read_at(5, &mut bytes).expect("inside the file");
    assert_eq!(&bytes, b"bytes");
    assert_eq!(fs::read_dir(directory.path()).expect("readable").count(), 0);
}

#[test]
fn a_file_holds_its_charge_while_it_is_open() {
    let directory = tempfile::tempdir().expect("a writable disk");
    let ledger = Ledger::new("nvme=1MiB".parse().expect("well formed"));
    let charge = ledger.charge(Tier::Nvme, Kind::Optimizer, LEN).expect("fits");
    let file = NvmeFile::temporary(&directory.path().join("state"), LEN, charge).expect("fits");
    assert_eq!(ledger.used(Tier::Nvme), LEN);
    drop(file);
    assert_eq!(ledger.used(Tier::Nvme), 0);
    assert_eq!(ledger.budget(), Budget { nvme: ledger.budget().nvme, ..Budget::UNLIMITED });
}

#[test]
fn a_file_larger_than_the_disk_is_refused_with_both_sizes_and_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a writable disk");
    let path = directory.path().join("huge");
    match NvmeFile::create(&path, 1 << 60, None).expect_err("no disk holds an exbibyte") {
        Error::DiskFull { needed, free, .. } => assert!(needed == 1 << 60 && free < needed),
        other => panic!("{other}"),
    }
    assert!(!path.exists());
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let error = NvmeFile::create("/no/such/place".as_ref(), 1, None).expect_err("no such directory");
    assert!(error.to_string().starts_with("creating /no/such/place: "), "{error}");
}

#[test]
fn an_existing_file_opens_to_be_read() {
    let directory = tempfile::tempdir().expect("a writable disk");
    let path = directory.path().join("weights");
    fs::write(&path, pattern(5000, 3)).expect("writable");
    let file = NvmeFile::open(&path).expect("it is there");
    let mut bytes = vec![0; 5000];
    file.read_at(0, &mut bytes).expect("it is whole");
    assert_eq!((file.len(), bytes), (5000, pattern(5000, 3)));
    let error = file.write_at(0, &[1]).expect_err("opened to be read").to_string();
    assert!(error.starts_with("writing 1 bytes at offset 0 of "), "{error}");
}

#[test]
fn a_file_that_shrinks_under_us_is_an_error_not_zeros() {
    with_every_backend(8 * 4096, |file| {
        fs::OpenOptions::new()
            .write(true)
            .open(file.path())
            .and_then(|f| f.set_len(4096))
            .expect("truncated");
        let error = file.read_at(0, &mut AlignedBuffer::new(8 * 4096)).expect_err("short").to_string();
        assert!(error.starts_with("reading ") && error.contains("bytes at offset 4096 of "), "{error}");
    });
}

#[test]
fn backend_names_are_unique() {
    let mut names: Vec<_> = BACKENDS.iter().map(|backend| backend.name).collect();
    names.dedup();
    assert_eq!(names.len(), BACKENDS.len());
}

/// Mounts a file system for one test and unmounts it whatever happens.
#[cfg(target_os = "linux")]
struct Mount(tempfile::TempDir);

#[cfg(target_os = "linux")]
impl Mount {
    /// `None`, loudly, where the test may not mount.
    fn new(kind: &str, options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().expect("a writable disk");
        let mut mount = std::process::Command::new("mount");
        let mounted = mount.args(["-t", kind, "-o", options, "none"]).arg(directory.path()).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Mount(directory));
        }
        eprintln!("SKIPPED: this test mounts a {kind}, which is not permitted here");
        None
    }

    fn path(&self) -> &std::path::Path {
        self.0.path()
    }
}

#[cfg(target_os = "linux")]
impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(self.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_refused_before_the_first_write_and_takes_what_fits() {
    let Some(disk) = Mount::new("tmpfs", "size=1m") else { return };
    let (half, _) =
        (1 << 19, NvmeFile::create(&disk.path().join("first"), 1 << 19, None).expect("half fits"));
    match NvmeFile::create(&disk.path().join("second"), half + 4096, None)
        .expect_err("more than half is left")
    {
        Error::DiskFull { path, needed, free } => {
            assert_eq!((path, needed), (disk.path().join("second"), half + 4096));
            assert!(free <= half);
        }
        other => panic!("{other}"),
    }
    assert!(!disk.path().join("second").exists());
    NvmeFile::create(&disk.path().join("second"), half / 2, None).expect("this fits");
}

#[test]
#[cfg(target_os = "linux")]
fn a_disk_without_direct_io_is_used_through_the_page_cache_and_says_why() {
    let Some(disk) = Mount::new("ramfs", "mode=700") else { return };
    let file = NvmeFile::create(&disk.path().join("state"), LEN, None).expect("memory is there");
    assert!(!file.direct());
    let why = file.fallback().expect("a notice");
    assert!(why.starts_with("direct I/O: "), "{why}");
    let (bytes, mut read) = (pattern(LEN as usize, 4), vec![0; LEN as usize]);
    file.write_at(0, &bytes).expect("inside the file");
    file.read_at(0, &mut read).expect("inside the file");
    assert_eq!(read, bytes);
}
