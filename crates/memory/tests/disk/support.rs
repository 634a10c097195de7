use hearth_memory::NvmeFile;
use hearth_memory::nvme::{BACKENDS, Backend};
use std::path::Path;
use tempfile::TempDir;

/// Runs `check` with a file of `len` zero bytes for each backend that works here.
pub fn with_every_backend(len: u64, check: impl Fn(&NvmeFile)) {
    for (directory, backend) in places() {
        match file(directory.path(), backend, len) {
            Some(file) => check(&file),
            None => eprintln!("skipped: {} does not work at {}", backend.name, directory.path().display()),
        }
    }
}

/// A disk and a memory file system, with each backend.
fn places() -> impl Iterator<Item = (TempDir, &'static Backend)> {
    BACKENDS.iter().flat_map(|backend| {
        let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a writable disk");
        let memory = tempfile::tempdir_in("/dev/shm").ok();
        [Some(disk), memory].into_iter().flatten().map(move |directory| (directory, backend))
    })
}

fn file(directory: &Path, backend: &'static Backend, len: u64) -> Option<NvmeFile> {
    let made = NvmeFile::create_with(std::slice::from_ref(backend), &directory.join("bytes"), len, None);
    made.inspect_err(|error| eprintln!("{error}")).ok()
}

/// A file on a disk, through the best backend.
pub fn best(len: u64) -> (TempDir, NvmeFile) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a writable disk");
    let file = NvmeFile::create(&directory.path().join("bytes"), len, None).expect("a small file fits");
    (directory, file)
}

/// Bytes that differ from their neighbours and from page to page.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}
