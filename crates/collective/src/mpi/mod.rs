//! Ranks are processes that an MPI launcher started, on one machine or several.
//!
//! # Layout
//! - [`launched`], `launch`: who started this process, which library it loads.
//! - this file: [`connect`], and what ranks do before and after the data of an operation: the start together, the
//!   watchdog, the end.
//! - `collectives`: the operations.
//! - `message`: what ranks tell each other beside the data.
//! - `ffi`: the library's functions, and `Transfer`, which owns the memory of messages under way.
//!
//! # Design
//! Only point-to-point messages that do not block are used. A blocking collective of the library cannot be
//! interrupted: if a link goes down in it, it never returns. Here every wait is a loop that tests for the end of
//! messages and looks at the clock and at what other ranks say. Each operation begins with a message from every rank to
//! every other that carries its call: so calls that do not fit are refused on all ranks, and a rank that does not come
//! is known by name. Groups differ by their tags; splitting one costs no communicator.
//!
//! A direct exchange sends as many bytes per rank as a ring and is as fast where every pair of ranks has the same link.

mod collectives;
mod ffi;
mod launch;
mod message;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};
use std::{process, thread};

pub use launch::{Launch, launched};

use crate::call::{self, Call};
use crate::watchdog::Watch;
use crate::{Buffer, DEFAULT_TIMEOUT, Error, ProcessGroup};
use ffi::{Library, Transfer};
use message::{Inbox, Message, Notice, Place};

/// How long a rank that ends a group waits for its last words to be on their way.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long a rank whose group broke waits for the others before it ends without a word to the library.
const BROKEN: Duration = Duration::from_secs(2);

/// Joins the world that a launcher started, or gives None if no launcher started this process. Once per process.
///
/// The library is looked for under the names that the launcher's own family has (`libmpi.so.40`, `libmpich.so.12`), then
/// under the other's; the environment variable `HEARTH_MPI_LIBRARY` names another file. When the last group is dropped,
/// the library is finished with: launchers report a rank that ends without that as failed.
///
/// # Errors
/// [`Error::NoLibrary`] without an MPI library, [`Error::NotConnected`] if the ranks do not know of each other,
/// [`Error::Mpi`] if the library fails or this is the second call.
pub fn connect() -> Result<Option<Box<dyn ProcessGroup>>, Error> {
    static CONNECTED: AtomicBool = AtomicBool::new(false);
    let Some(launch) = launched() else { return Ok(None) };
    if CONNECTED.swap(true, SeqCst) {
        return Err(Error::Mpi("this process has already joined its world".into()));
    }
    let library = Arc::new(launch.join()?);
    LIBRARY.set(Arc::downgrade(&library)).expect("a process joins its world once");
    let (rank, world_size) = (library.rank, library.world_size);
    let watch = Watch::new(rank, world_size, DEFAULT_TIMEOUT);
    let process = Process { library, tags_given: AtomicUsize::new(1), ended: Mutex::default() };
    let mut group = MpiGroup::open(Arc::new(process), watch, (0..world_size).collect(), 0)?;
    group.is_world = true;
    Ok(Some(Box::new(group)))
}

/// The library of this process's world.
static LIBRARY: OnceLock<Weak<Library>> = OnceLock::new();

/// How long the library may take to end the processes of a job.
const ABORT: Duration = Duration::from_secs(2);

/// Ends this process with exit code `code`, and the whole job with it if a launcher started this process.
///
/// Launchers tell of a job by the codes of its processes, and some mix that of the first to end with those of the ranks
/// they kill after it; asked by the library, they give `code`.
pub fn end_job(code: i32) -> ! {
    if let Some(library) = LIBRARY.get().and_then(Weak::upgrade) {
        // Where the library is busy or cannot reach the launcher, the process must still end.
        thread::spawn(move || library.abort(code));
        thread::sleep(ABORT);
    }
    process::exit(code)
}

/// What the groups of this process share.
struct Process {
    library: Arc<Library>,
    /// How many tags this process has given to parts; the world has the first.
    tags_given: AtomicUsize,
    /// Of groups that this rank has left: the last words of the others are still to come, and some libraries complain
    /// about messages that nobody took.
    ended: Mutex<Vec<Inbox>>,
}

impl Process {
    /// Takes over `inboxes` of an ended group and lets go of those in which the last words have come.
    fn outlive(&self, inboxes: impl Iterator<Item = Inbox>) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.extend(inboxes);
        ended.retain_mut(|inbox| matches!(inbox.hear_end(&self.library), Ok(false)));
    }
}

/// One rank's end of a group of processes.
struct MpiGroup {
    process: Arc<Process>,
    watch: Watch,
    /// World ranks, by rank in this group.
    members: Vec<usize>,
    /// Of messages; data has the next one.
    tag: usize,
    /// By rank in this group; None for this rank.
    inboxes: Vec<Option<Inbox>>,
    /// Why there will be no further operation.
    end: Option<End>,
    /// Set from any thread.
    abort: Arc<AtomicBool>,
    /// Whether the library is finished with when this group is.
    is_world: bool,
}

#[derive(Clone, Copy)]
struct End {
    rank: usize,
    notice: Notice,
}

/// What a rank waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// That every rank calls.
    Calls,
    /// That data arrives.
    Data,
}

impl MpiGroup {
    fn open(process: Arc<Process>, watch: Watch, members: Vec<usize>, tag: usize) -> Result<Self, Error> {
        let inbox = |(rank, member): (usize, &usize)| {
            (rank != watch.rank).then(|| Inbox::open(&process.library, *member, tag)).transpose()
        };
        let inboxes = members.iter().enumerate().map(inbox).collect::<Result<_, _>>()?;
        let (end, abort) = (None, Arc::default());
        Ok(Self { process, watch, members, tag, inboxes, end, abort, is_world: false })
    }

    /// Ranks other than this one.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.watch.rank;
        (0..self.watch.world_size).filter(move |peer| *peer != rank)
    }

    /// A message from this rank to every other.
    fn tell(&self, message: Message) -> Result<Transfer, Error> {
        let words: Box<dyn Buffer> = Box::new(message.encode());
        let (words, mut transfer) = (Arc::new(words), Transfer::new(&self.process.library, None));
        for peer in self.peers() {
            transfer.send(&words, 0..words.bytes().len(), self.members[peer], self.tag)?;
        }
        Ok(transfer)
    }

    /// The start of an operation: waits until every rank has called, and checks all calls. Gives the places.
    fn begin(&mut self, call: Call, place: Place) -> Result<Vec<Place>, Error> {
        self.watch.begin(call);
        if let Some(end) = self.end {
            return Err(self.over(end));
        }
        if self.abort.load(SeqCst) {
            let aborted = self.over(End { rank: self.watch.rank, notice: Notice::Aborted });
            return Err(self.broken(aborted));
        }
        let told = self.tell(Message::Call { call, place });
        told.and_then(|told| self.wait(told, Stage::Calls)).map_err(|error| self.broken(error))?;
        let (mut calls, mut places) = (vec![call; self.watch.world_size], vec![place; self.watch.world_size]);
        for peer in self.peers() {
            let inbox = self.inboxes[peer].as_mut().expect("every peer has one");
            (calls[peer], places[peer]) = inbox.take_call(&self.process.library)?;
        }
        call::check(&calls)?;
        Ok(places)
    }

    /// Waits for the data of `transfer` and gives its target.
    fn complete(&mut self, transfer: Transfer) -> Result<Option<Box<dyn Buffer>>, Error> {
        self.wait(transfer, Stage::Data).map_err(|error| self.broken(error))
    }

    fn wait(&mut self, mut transfer: Transfer, stage: Stage) -> Result<Option<Box<dyn Buffer>>, Error> {
        let mut pause = Pause::new(stage);
        loop {
            let is_complete = transfer.is_complete()?;
            self.inboxes.iter_mut().flatten().try_for_each(Inbox::poll)?;
            self.heed(stage)?;
            let missing = |rank: &usize| self.inboxes[*rank].as_ref().is_some_and(|x| x.message.is_none());
            if is_complete && (stage == Stage::Data || !self.peers().any(|rank| missing(&rank))) {
                return Ok(transfer.finish());
            }
            if self.watch.is_over() {
                let missing =
                    if stage == Stage::Calls { self.peers().filter(missing).collect() } else { vec![] };
                let stalled: Vec<_> = transfer.peers().map(|peer| self.rank_of(peer)).collect();
                return Err(self.timed_out(missing, stalled));
            }
            pause.rest(transfer.open());
        }
    }

    /// Heeds what ends the operation from outside: another rank, or this one's abort.
    fn heed(&mut self, stage: Stage) -> Result<(), Error> {
        if self.abort.load(SeqCst) {
            return Err(self.over(End { rank: self.watch.rank, notice: Notice::Aborted }));
        }
        for rank in self.peers() {
            let Some(Message::End(notice)) = self.inboxes[rank].as_ref().and_then(|inbox| inbox.message)
            else {
                continue;
            };
            match (notice, stage) {
                // It has finished this operation and calls no other.
                (Notice::Left, Stage::Data) => {}
                // This rank waits for the same data in vain, hence says so too.
                (Notice::TimedOut, Stage::Data) => return Err(self.timed_out(vec![], vec![rank])),
                _ => {
                    let end = *self.end.get_or_insert(End { rank, notice });
                    return Err(self.over(end));
                }
            }
        }
        Ok(())
    }

    fn timed_out(&self, missing: Vec<usize>, mut stalled: Vec<usize>) -> Error {
        stalled.sort_unstable();
        stalled.dedup();
        self.watch.timed_out(missing, stalled)
    }

    /// The rank of a member.
    fn rank_of(&self, member: usize) -> usize {
        self.members.iter().position(|known| *known == member).expect("messages go between members")
    }

    /// What a rank is told that comes after the end.
    fn over(&self, end: End) -> Error {
        let (rank, operation) = (end.rank, self.watch.operation());
        match end.notice {
            Notice::Left => Error::PeerLeft { rank, operation },
            Notice::Aborted | Notice::TimedOut => Error::Aborted { rank, operation },
        }
    }

    /// Ends the group after `error` and tells the others, unless one of them has told this rank.
    fn broken(&mut self, error: Error) -> Error {
        if self.end.is_none() {
            let notice = match error {
                Error::TimedOut(_) => Notice::TimedOut,
                _ => Notice::Aborted,
            };
            self.end = Some(End { rank: self.watch.rank, notice });
            self.announce(notice);
        }
        error
    }

    /// Tells the others that this rank ends the group, as far as that is possible.
    fn announce(&self, notice: Notice) {
        let Ok(mut told) = self.tell(Message::End(notice)) else { return };
        let deadline = Instant::now() + LAST_WORDS;
        while !matches!(told.is_complete(), Ok(true) | Err(_)) && Instant::now() < deadline {
            thread::yield_now();
        }
    }

    /// Waits until every rank has ended the group: only then may the library be finished with, which waits for all.
    fn part(&mut self) -> bool {
        let limit = if self.end.is_some() { BROKEN.min(self.watch.timeout) } else { self.watch.timeout };
        let (started, mut pause) = (Instant::now(), Pause::new(Stage::Calls));
        while started.elapsed() < limit {
            let library = &self.process.library;
            let heard = self.inboxes.iter_mut().flatten().map(|inbox| inbox.hear_end(library));
            match heard.collect::<Result<Vec<_>, _>>() {
                Ok(heard) if heard.iter().all(|heard| *heard) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
            pause.rest(0);
        }
        false
    }
}

impl Drop for MpiGroup {
    fn drop(&mut self) {
        let told = self.end.is_some_and(|end| end.rank == self.watch.rank);
        if !told {
            self.announce(if self.abort.load(SeqCst) { Notice::Aborted } else { Notice::Left });
        }
        if self.is_world && !self.part() {
            self.process.library.abandon();
        }
        self.process.outlive(std::mem::take(&mut self.inboxes).into_iter().flatten());
    }
}

/// Rests between two looks at the messages. A rank that waits leaves the processor to those that compute, but the
/// library moves long messages only while it is asked about them.
struct Pause {
    patience: Duration,
    open: usize,
    since: Instant,
}

impl Pause {
    fn new(stage: Stage) -> Self {
        let patience = Duration::from_millis(if stage == Stage::Calls { 1 } else { 50 });
        Self { patience, open: usize::MAX, since: Instant::now() }
    }

    fn rest(&mut self, open: usize) {
        if open != self.open {
            (self.open, self.since) = (open, Instant::now());
        }
        if self.since.elapsed() < self.patience {
            thread::yield_now();
        } else {
            thread::sleep(Duration::from_micros(50));
        }
    }
}
