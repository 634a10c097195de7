//! Operations that run beside the computation, in the order of their calls.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use bytemuck::Pod;

use crate::buffer::{into_vec, zeroed};
use crate::{Buffer, Error, ProcessGroup, Watchdog};

/// What one communication thread does next.
type Job = Box<dyn FnOnce(&mut dyn ProcessGroup) + Send>;

/// One rank's end of a process group, for a program that computes while buffers move.
///
/// The blocking group lives on a thread of its own. A call hands its buffer over and returns at once with a
/// [`Pending`] result; the thread runs the calls one after the other. Every rank makes the same calls in the same
/// order: if several threads share an `Ordered`, they agree on an order first. A `Pending` that is dropped changes
/// nothing: its operation runs all the same. Dropping the `Ordered` waits until all that was called has run, then the
/// rank leaves.
///
/// # Memory
/// From its call to the end of its operation a rank holds the buffer it passed; from the operation's start on also what
/// [`Operation::held_bytes`](crate::Operation::held_bytes) counts, result included, and afterwards the result alone. A
/// plan that charges [`held_bytes`](crate::Operation::held_bytes) from the call until [`Pending::wait`] is never
/// exceeded.
///
/// In a world of one rank there is neither thread nor copy: the buffer comes back at once.
pub struct Ordered {
    rank: usize,
    world_size: usize,
    /// None in a world of one.
    thread: Option<Communication>,
}

/// The thread that runs the operations.
struct Communication {
    /// Emptied to end the thread.
    jobs: Option<Sender<Job>>,
    handle: Option<JoinHandle<()>>,
    abort: Arc<dyn Fn() + Send + Sync>,
    watchdog: Watchdog,
}

/// The group of a program that runs alone.
pub fn single() -> Ordered {
    Ordered { rank: 0, world_size: 1, thread: None }
}

impl Ordered {
    /// Moves `group` to its own thread and gives each of its operations the watchdog's time.
    ///
    /// # Panics
    /// If the system has no thread to give.
    pub fn start(mut group: Box<dyn ProcessGroup>, watchdog: Watchdog) -> Self {
        let (rank, world_size) = (group.rank(), group.world_size());
        if world_size == 1 {
            return single();
        }
        group.set_timeout(watchdog.timeout);
        let abort = group.aborter();
        let (jobs, queue) = channel::<Job>();
        let handle = thread::Builder::new()
            .name(format!("collective {rank}"))
            .spawn(move || queue.iter().for_each(|job| job(&mut *group)))
            .expect("a thread for communication");
        let thread = Communication { jobs: Some(jobs), handle: Some(handle), abort, watchdog };
        Self { rank, world_size, thread: Some(thread) }
    }

    /// This rank, `0..world_size`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks, at least 1.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// See [`ProcessGroup::all_reduce`]: `[n]` to `[n]`.
    pub fn all_reduce(&self, buffer: Vec<f32>) -> Pending<Vec<f32>> {
        self.run(buffer, |group, buffer| group.all_reduce(buffer))
    }

    /// See [`ProcessGroup::reduce_scatter`]: `[world_size × n]` to `[n]`.
    pub fn reduce_scatter(&self, input: Vec<f32>) -> Pending<Vec<f32>> {
        self.run(input, |group, input| group.reduce_scatter(input))
    }

    /// See [`ProcessGroup::all_gather`]: `[n]` to `[world_size × n]`.
    pub fn all_gather<T: Pod + Send + Sync>(&self, partition: Vec<T>) -> Pending<Vec<T>> {
        self.run(partition, all_gather)
    }

    /// As [`all_gather`](Self::all_gather), into `output` `[world_size × n]`: memory that is used again and again costs
    /// no page faults.
    pub fn all_gather_into<T: Pod + Send + Sync>(
        &self,
        partition: Vec<T>,
        output: Vec<T>,
    ) -> Pending<Vec<T>> {
        if self.world_size == 1 {
            return Pending(State::Ready(Ok(partition)));
        }
        self.submit(move |group| group.all_gather(Box::new(partition), Box::new(output)).map(into_vec))
    }

    /// The buffers of all ranks, by rank; they may differ in length. Meant for small things, JSON for one: on the wire
    /// each is as long as the longest.
    pub fn all_gather_varied(&self, bytes: Vec<u8>) -> Pending<Vec<Vec<u8>>> {
        if self.world_size == 1 {
            return Pending(State::Ready(Ok(vec![bytes])));
        }
        self.submit(move |group| {
            let lengths = all_gather(group, vec![bytes.len() as u64])?;
            let longest = lengths.iter().max().map_or(0, |longest| *longest as usize);
            let mut padded = bytes;
            padded.resize(longest, 0);
            let all = all_gather(group, padded)?;
            let part = |(rank, length): (usize, &u64)| all[rank * longest..][..*length as usize].to_vec();
            Ok(lengths.iter().enumerate().map(part).collect())
        })
    }

    /// See [`ProcessGroup::all_to_all`]: `[world_size × n]` to `[world_size × n]`, `n` whole elements.
    pub fn all_to_all<T: Pod + Send + Sync>(&self, input: Vec<T>) -> Pending<Vec<T>> {
        self.run(input, |group, input| {
            let output = zeroed::<T>(input.len());
            group.all_to_all(Box::new(input), Box::new(output)).map(into_vec)
        })
    }

    /// See [`ProcessGroup::broadcast`]: `[n]` to `[n]`.
    pub fn broadcast<T: Pod + Send + Sync>(&self, root: usize, buffer: Vec<T>) -> Pending<Vec<T>> {
        if root >= self.world_size {
            return Pending(State::Ready(Err(Error::NoSuchRoot { root, world_size: self.world_size })));
        }
        self.run(buffer, move |group, buffer| group.broadcast(root, Box::new(buffer)).map(into_vec))
    }

    /// See [`ProcessGroup::barrier`].
    pub fn barrier(&self) -> Pending<()> {
        self.run((), |group, ()| group.barrier())
    }

    /// See [`ProcessGroup::split`]; the part gets a thread of its own and the same watchdog.
    pub fn split(&self, color: usize, key: usize) -> Pending<Ordered> {
        let Some(thread) = &self.thread else { return Pending(State::Ready(Ok(single()))) };
        let watchdog = thread.watchdog.clone();
        self.submit(move |group| Ok(Ordered::start(group.split(color, key)?, watchdog)))
    }

    /// Ends the group at once, the operation under way included; see [`ProcessGroup::aborter`].
    pub fn abort(&self) {
        if let Some(thread) = &self.thread {
            (thread.abort)();
            // If nothing is under way: a call that fails, and tells the others.
            drop(self.barrier());
        }
    }

    /// Runs `operation` on `input`, or gives `input` back in a world of one.
    fn run<T: Send + 'static>(
        &self,
        input: T,
        operation: impl FnOnce(&mut dyn ProcessGroup, T) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        match self.world_size {
            1 => Pending(State::Ready(Ok(input))),
            _ => self.submit(move |group| operation(group, input)),
        }
    }

    /// Runs `operation` after all that was called before.
    fn submit<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut dyn ProcessGroup) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        let (sender, receiver) = channel();
        let thread = self.thread.as_ref().expect("a world of one submits nothing");
        let on_timeout = thread.watchdog.on_timeout.clone();
        let job: Job = Box::new(move |group| {
            let result = operation(group);
            if let Err(Error::TimedOut(diagnosis)) = &result {
                on_timeout(diagnosis);
            }
            // Nobody listens if the result was not wanted.
            sender.send(result).ok();
        });
        // If the thread has died, the job and its sender are dropped and `wait` says so.
        thread.jobs.as_ref().and_then(|jobs| jobs.send(job).err());
        Pending(State::Running(Mutex::new(receiver)))
    }
}

fn all_gather<T: Pod + Send + Sync>(
    group: &mut dyn ProcessGroup,
    partition: Vec<T>,
) -> Result<Vec<T>, Error> {
    let output = zeroed::<T>(partition.len() * group.world_size());
    let partition: Box<dyn Buffer> = Box::new(partition);
    group.all_gather(partition, Box::new(output)).map(into_vec)
}

impl Drop for Communication {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(handle) = self.handle.take() {
            // A panic there has reached every `wait` as an error.
            handle.join().ok();
        }
    }
}

/// The result of an operation, once it is there.
#[must_use = "an operation may fail"]
pub struct Pending<T>(State<T>);

enum State<T> {
    Ready(Result<T, Error>),
    /// In a mutex so that what holds a `Pending` can be shared between threads.
    Running(Mutex<Receiver<Result<T, Error>>>),
}

impl<T> Pending<T> {
    /// Waits until the operation has run.
    ///
    /// # Errors
    /// As the operation; [`Error::Stopped`] if the communication thread panicked.
    pub fn wait(self) -> Result<T, Error> {
        match self.0 {
            State::Ready(result) => result,
            State::Running(receiver) => {
                let receiver = receiver.into_inner().unwrap_or_else(PoisonError::into_inner);
                receiver.recv().unwrap_or(Err(Error::Stopped))
            }
        }
    }
}
