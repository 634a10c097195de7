//! A disk that fails once, fills up, writes short, flips a bit or dies; and what a power cut leaves of it.
//!
//! It keeps books of what was not synced: `sync` costs nothing here, and only what was synced survives
//! [`FaultyDisk::cut_power`] for sure.

use hearth_train::checkpoint::WriteAt;
use hearth_train::{Disk, Files};
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// What the chosen operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Half its work, then nothing works any more.
    Dies,
    /// Half its work and an error; later ones work.
    Fails,
    /// Half its work and `ENOSPC`; from there on nothing can be written, but renamed and removed.
    Fills,
    /// Writes half of what it was given and says so.
    Short,
    /// Writes one bit wrong and says nothing.
    Flips,
}

/// Cloned, it is the same disk.
#[derive(Clone)]
pub struct FaultyDisk(Arc<Mutex<State>>);

struct State {
    fault: Fault,
    at: usize,
    operations: usize,
    dead: bool,
    full: bool,
    unsynced: BTreeSet<PathBuf>,
    /// Directory entries that are not synced.
    entries: BTreeSet<PathBuf>,
    renames: Vec<(PathBuf, PathBuf)>,
}

/// What is left of an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Whole,
    Half,
    Short,
    Flipped,
}

impl FaultyDisk {
    pub fn new(fault: Fault, at: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            fault,
            at,
            operations: 0,
            dead: false,
            full: false,
            unsynced: BTreeSet::new(),
            entries: BTreeSet::new(),
            renames: Vec::new(),
        })))
    }

    /// Operations so far.
    pub fn operations(&self) -> usize {
        self.state().operations
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The next operation; `writes` says that it needs room.
    fn operation<T>(&self, writes: bool, work: impl FnOnce(Work) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state();
        let error = |full| match full {
            true => io::Error::new(io::ErrorKind::StorageFull, "no space left on device"),
            false => io::Error::other("input/output error"),
        };
        if state.dead || state.full && writes {
            return Err(error(state.full));
        }
        let chosen = state.operations == state.at;
        state.operations += 1;
        let fault = state.fault;
        if !chosen {
            drop(state);
            return work(Work::Whole);
        }
        state.dead = fault == Fault::Dies;
        state.full = fault == Fault::Fills;
        drop(state);
        match fault {
            Fault::Dies | Fault::Fails | Fault::Fills => {
                work(Work::Half).and_then(|_| Err(error(fault == Fault::Fills)))
            }
            Fault::Short => work(Work::Short),
            Fault::Flips => work(Work::Flipped),
        }
    }

    /// The machine stops: of what was not synced, `coin` says whether it is lost.
    pub fn cut_power(&self, mut coin: impl FnMut() -> bool) {
        let mut state = self.state();
        let State { unsynced, entries, renames, .. } = &mut *state;
        for path in unsynced.iter().filter(|path| path.is_file()) {
            if coin() {
                let mut bytes = fs::read(path).unwrap();
                bytes.truncate(bytes.len() / 2);
                fs::write(path, bytes).unwrap();
            }
        }
        for path in entries.iter().filter(|path| path.is_file()) {
            if coin() {
                fs::remove_file(path).unwrap();
            }
        }
        let kept = (0..=renames.len()).find(|_| coin()).unwrap_or(renames.len());
        for (from, to) in renames[kept..].iter().rev() {
            fs::rename(to, from).unwrap();
        }
    }
}

/// One write of an operation.
fn write(bytes: &[u8], work: Work, mut to: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
    match work {
        Work::Whole => to(bytes),
        Work::Half | Work::Short => to(&bytes[..bytes.len().div_ceil(2)]),
        Work::Flipped => {
            let mut wrong = bytes.to_vec();
            let middle = wrong.len() / 2;
            wrong[middle] ^= 0x10;
            to(&wrong)
        }
    }
}

struct Opened {
    disk: FaultyDisk,
    path: PathBuf,
    file: Box<dyn WriteAt>,
}

impl WriteAt for Opened {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.disk.state().unsynced.insert(self.path.clone());
        let file = &mut self.file;
        self.disk.operation(true, |work| write(bytes, work, |bytes| file.write_at(offset, bytes)))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.sync(&self.path)
    }
}

struct Created(FaultyDisk, Box<dyn Write>);

impl Write for Created {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Self(disk, file) = self;
        disk.operation(true, |work| write(bytes, work, |bytes| file.write(bytes)))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

impl Files for FaultyDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.operation(true, |work| if work == Work::Half { Ok(()) } else { Disk.create_dir(path) })
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Write>> {
        self.operation(true, |_| {
            let file = Disk.create(path)?;
            let mut state = self.state();
            state.unsynced.insert(path.to_owned());
            state.entries.insert(path.to_owned());
            Ok(Box::new(Created(self.clone(), file)) as Box<dyn Write>)
        })
    }

    fn allocate(&self, path: &Path, bytes: u64) -> io::Result<()> {
        self.operation(true, |work| {
            fs::File::create(path)?.set_len(if work == Work::Half { bytes / 2 } else { bytes })?;
            self.state().entries.insert(path.to_owned());
            Ok(())
        })
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn WriteAt>> {
        self.operation(false, |_| {
            let opened = Opened { disk: self.clone(), path: path.to_owned(), file: Disk.open(path)? };
            Ok(Box::new(opened) as Box<dyn WriteAt>)
        })
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.operation(false, |work| {
            let mut state = self.state();
            if work != Work::Half {
                state.unsynced.remove(path);
                state.entries.retain(|entry| entry.parent() != Some(path));
                state.renames.retain(|(_, to)| to.parent() != Some(path));
            }
            Ok(())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operation(false, |work| {
            if work == Work::Half {
                return Ok(());
            }
            fs::rename(from, to)?;
            let moved = |path: &PathBuf| match path.strip_prefix(from) {
                Ok(rest) => to.join(rest),
                Err(_) => path.clone(),
            };
            let mut state = self.state();
            state.unsynced = state.unsynced.iter().map(moved).collect();
            state.entries = state.entries.iter().map(moved).collect();
            state.renames.push((from.to_owned(), to.to_owned()));
            Ok(())
        })
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.operation(false, |work| {
            if work == Work::Half {
                // A directory half removed has lost some file.
                let first = fs::read_dir(path)?.next().transpose()?;
                return first.map_or(Ok(()), |entry| fs::remove_file(entry.path()));
            }
            // What is removed was renamed before, or never will be: it cannot come back.
            self.state().renames.retain(|(_, to)| to != path);
            fs::remove_dir_all(path)
        })
    }
}
