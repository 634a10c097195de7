//! A process group whose ranks are threads of one process.
//!
//! Each operation is a few *rounds*. In a round every rank posts its call with a share in its input and waits; the
//! last to post publishes all posts to all ranks. The next round needs a post of every rank, hence cannot begin before
//! every rank has taken the posts of this one: operations never mix, and one round needs no second barrier. The last
//! round of an operation carries nothing: it says that this rank has read what it needs, so that nobody's input
//! outlives the operation.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::call::{self, Call};
use crate::watchdog::Watch;
use crate::{Buffer, DEFAULT_TIMEOUT, Error, Operation, ProcessGroup, tree};

/// Makes the ranks of a new group, rank 0 first; move each to its own thread.
///
/// Dropping a rank tells the others: see [`Error::PeerLeft`].
///
/// # Panics
/// If `world_size` is 0.
///
/// ```
/// use hearth_collective::{Ordered, Watchdog, threads};
///
/// std::thread::scope(|scope| {
///     for group in threads::group(4) {
///         scope.spawn(move || {
///             let group = Ordered::start(Box::new(group), Watchdog::default());
///             let sum = group.all_reduce(vec![group.rank() as f32, 1.0]);
///             // Here there is time to compute.
///             assert_eq!(sum.wait().expect("nobody leaves"), [6.0, 4.0]);
///         });
///     }
/// });
/// ```
pub fn group(world_size: usize) -> Vec<ThreadGroup> {
    assert!(world_size > 0, "a process group has at least one rank");
    let shared = Shared::new(world_size);
    let rank =
        |rank| ThreadGroup { watch: Watch::new(rank, world_size, DEFAULT_TIMEOUT), shared: shared.clone() };
    (0..world_size).map(rank).collect()
}

/// One rank of a group of threads.
pub struct ThreadGroup {
    watch: Watch,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when a round is published or the group ends.
    changed: Condvar,
}

struct State {
    /// Posts of the round under way, by rank.
    posted: Vec<Option<Post>>,
    /// Number of rounds published.
    round: u64,
    /// Posts of the last round published, by rank.
    published: Arc<Vec<Post>>,
    /// Ranks that have yet to take `published`; the last one empties it.
    untaken: usize,
    /// Why there will be no further round.
    end: Option<End>,
}

/// Why a group is over; the first reason stays.
enum End {
    Left(usize),
    Aborted(usize),
    TimedOut {
        rank: usize,
        /// Who had not posted then.
        missing: Vec<usize>,
    },
}

/// A rank's call with what the other ranks read of it.
struct Post {
    call: Call,
    input: Option<Input>,
}

#[derive(Clone)]
enum Input {
    /// Of a reduction.
    Elements(Arc<Vec<f32>>),
    /// Of an operation that moves bytes.
    Bytes(Arc<Box<dyn Buffer>>),
    /// Of a split: color and key.
    Place(usize, usize),
    /// Of a split: the new group that this rank opens.
    Group(Arc<Shared>),
}

impl Post {
    fn elements(&self) -> &[f32] {
        match &self.input {
            Some(Input::Elements(elements)) => elements,
            _ => &[],
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.input {
            Some(Input::Bytes(buffer)) => buffer.bytes(),
            _ => &[],
        }
    }
}

impl Shared {
    fn new(world_size: usize) -> Arc<Self> {
        let posted = (0..world_size).map(|_| None).collect();
        let state = State { posted, round: 0, published: Arc::default(), untaken: 0, end: None };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The state is consistent whenever the lock is free, a panic elsewhere included.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, end: End) {
        self.lock().end(end);
        self.changed.notify_all();
    }
}

impl State {
    /// Publishes the round once every rank has posted.
    fn publish_if_complete(&mut self) -> bool {
        if self.posted.iter().any(Option::is_none) {
            return false;
        }
        self.untaken = self.posted.len();
        self.published = Arc::new(self.posted.iter_mut().filter_map(Option::take).collect());
        self.round += 1;
        true
    }

    fn take_published(&mut self) -> Arc<Vec<Post>> {
        self.untaken -= 1;
        if self.untaken == 0 { std::mem::take(&mut self.published) } else { self.published.clone() }
    }

    fn end(&mut self, end: End) {
        self.end.get_or_insert(end);
        // The round under way cannot complete any more.
        self.posted.fill_with(|| None);
    }

    fn missing(&self) -> Vec<usize> {
        (0..self.posted.len()).filter(|rank| self.posted[*rank].is_none()).collect()
    }
}

/// `operation` with lengths in its unit.
fn call(operation: Operation, input: usize, output: usize) -> Call {
    Call { operation, input, output, root: 0 }
}

/// What was shared for others to read and no longer is.
fn reclaim<T>(shared: Arc<T>) -> T {
    Arc::into_inner(shared).expect("every rank has finished with it")
}

impl ThreadGroup {
    /// The first round of an operation: posts, waits for every rank, and checks all calls.
    fn begin(&mut self, call: Call, input: Option<Input>) -> Result<Arc<Vec<Post>>, Error> {
        self.watch.begin(call);
        let posts = self.round(Post { call, input })?;
        call::check(&posts.iter().map(|post| post.call).collect::<Vec<_>>())?;
        Ok(posts)
    }

    /// The last round of an operation: returns once every rank has finished with `posts`.
    fn finish(&mut self, posts: Arc<Vec<Post>>) -> Result<(), Error> {
        drop(posts);
        self.round(Post { call: self.watch.call(), input: None }).map(drop)
    }

    fn round(&self, post: Post) -> Result<Arc<Vec<Post>>, Error> {
        let mut state = self.shared.lock();
        if let Some(end) = &state.end {
            return Err(self.over(end));
        }
        let round = state.round;
        state.posted[self.watch.rank] = Some(post);
        if state.publish_if_complete() {
            self.shared.changed.notify_all();
        }
        let waiting = |state: &mut State| state.round == round && state.end.is_none();
        let (mut state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, self.watch.remaining(), waiting)
            .unwrap_or_else(PoisonError::into_inner);
        // The group may end as soon as the round is published: the round is valid all the same.
        if state.round != round {
            return Ok(state.take_published());
        }
        if let Some(End::TimedOut { missing, .. }) = &state.end {
            return Err(self.watch.timed_out(missing.clone(), vec![]));
        }
        if let Some(end) = &state.end {
            return Err(self.over(end));
        }
        let missing = state.missing();
        state.end(End::TimedOut { rank: self.watch.rank, missing: missing.clone() });
        self.shared.changed.notify_all();
        Err(self.watch.timed_out(missing, vec![]))
    }

    /// What a rank is told that comes after the end.
    fn over(&self, end: &End) -> Error {
        let operation = self.watch.operation();
        match *end {
            End::Left(rank) => Error::PeerLeft { rank, operation },
            End::Aborted(rank) | End::TimedOut { rank, .. } => Error::Aborted { rank, operation },
        }
    }

    /// The part of `length` elements that this rank sums in an all-reduce.
    fn share(&self, length: usize) -> std::ops::Range<usize> {
        let share = length.div_ceil(self.watch.world_size);
        (self.watch.rank * share).min(length)..((self.watch.rank + 1) * share).min(length)
    }
}

/// The sum of elements `range` of every rank's input.
fn sum(posts: &[Post], range: std::ops::Range<usize>) -> Vec<f32> {
    let mut sum = vec![0.0; range.len()];
    let parts: Vec<_> = posts.iter().map(|post| &post.elements()[range.clone()]).collect();
    tree::sum(&parts, &mut sum);
    sum
}

impl ProcessGroup for ThreadGroup {
    fn rank(&self) -> usize {
        self.watch.rank
    }

    fn world_size(&self) -> usize {
        self.watch.world_size
    }

    /// Each rank sums its share, then the shares are exchanged.
    fn all_reduce(&mut self, buffer: Vec<f32>) -> Result<Vec<f32>, Error> {
        let length = buffer.len();
        let buffer = Arc::new(buffer);
        let input = Input::Elements(buffer.clone());
        let posts = self.begin(call(Operation::AllReduce, length, length), Some(input))?;
        let share = Arc::new(sum(&posts, self.share(length)));
        drop(posts);
        let shares = self.round(Post { call: self.watch.call(), input: Some(Input::Elements(share)) })?;
        let mut buffer = reclaim(buffer);
        let mut rest = buffer.as_mut_slice();
        for post in shares.iter() {
            let (here, behind) = rest.split_at_mut(post.elements().len());
            here.copy_from_slice(post.elements());
            rest = behind;
        }
        self.finish(shares)?;
        Ok(buffer)
    }

    fn reduce_scatter(&mut self, input: Vec<f32>) -> Result<Vec<f32>, Error> {
        let part = input.len() / self.watch.world_size;
        let call = call(Operation::ReduceScatter, input.len(), part);
        let posts = self.begin(call, Some(Input::Elements(Arc::new(input))))?;
        let start = self.watch.rank * part;
        let partition = sum(&posts, start..start + part);
        self.finish(posts)?;
        Ok(partition)
    }

    fn all_gather(
        &mut self,
        partition: Box<dyn Buffer>,
        mut output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error> {
        let part = partition.bytes().len();
        let call = call(Operation::AllGather, part, output.bytes().len());
        let posts = self.begin(call, Some(Input::Bytes(Arc::new(partition))))?;
        let target = output.bytes_mut();
        for (rank, post) in posts.iter().enumerate() {
            target[rank * part..][..part].copy_from_slice(post.bytes());
        }
        self.finish(posts)?;
        Ok(output)
    }

    fn all_to_all(
        &mut self,
        input: Box<dyn Buffer>,
        mut output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error> {
        let part = input.bytes().len() / self.watch.world_size;
        let call = call(Operation::AllToAll, input.bytes().len(), output.bytes().len());
        let posts = self.begin(call, Some(Input::Bytes(Arc::new(input))))?;
        let target = output.bytes_mut();
        for (rank, post) in posts.iter().enumerate() {
            target[rank * part..][..part].copy_from_slice(&post.bytes()[self.watch.rank * part..][..part]);
        }
        self.finish(posts)?;
        Ok(output)
    }

    fn broadcast(&mut self, root: usize, mut buffer: Box<dyn Buffer>) -> Result<Box<dyn Buffer>, Error> {
        let length = buffer.bytes().len();
        let call = Call { root, ..call(Operation::Broadcast, length, length) };
        if root == self.watch.rank {
            let buffer = Arc::new(buffer);
            let posts = self.begin(call, Some(Input::Bytes(buffer.clone())))?;
            self.finish(posts)?;
            return Ok(reclaim(buffer));
        }
        let posts = self.begin(call, None)?;
        buffer.bytes_mut().copy_from_slice(posts[root].bytes());
        self.finish(posts)?;
        Ok(buffer)
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.begin(call(Operation::Barrier, 0, 0), None).map(drop)
    }

    /// The first rank of each part opens its group and posts it to the others.
    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn ProcessGroup>, Error> {
        let posts = self.begin(call(Operation::Split, 0, 0), Some(Input::Place(color, key)))?;
        let places = posts.iter().map(|post| match post.input {
            Some(Input::Place(color, key)) => (color, key),
            _ => unreachable!("every rank calls split"),
        });
        let members = call::part(&places.collect::<Vec<_>>(), color);
        drop(posts);
        let opened = (members[0] == self.watch.rank).then(|| Input::Group(Shared::new(members.len())));
        let posts = self.round(Post { call: self.watch.call(), input: opened })?;
        let Some(Input::Group(shared)) = &posts[members[0]].input else {
            unreachable!("the first rank of a part opens its group")
        };
        let rank = members.iter().position(|member| *member == self.watch.rank).expect("in its own part");
        Ok(Box::new(ThreadGroup { watch: self.watch.of_part(rank, members.len()), shared: shared.clone() }))
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.watch.timeout = timeout;
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        let (shared, rank) = (self.shared.clone(), self.watch.rank);
        Arc::new(move || shared.end(End::Aborted(rank)))
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        self.shared.end(End::Left(self.watch.rank));
    }
}
