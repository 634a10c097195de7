//! A process group whose ranks are threads of one process.
//!
//! Each operation is one or two *rounds*. In a round every rank posts its call with a copy of its input and waits; the
//! last to post publishes all posts to all ranks. The next round needs a post of every rank, hence cannot begin before
//! every rank has taken the posts of this one: operations never mix, and one round needs no second barrier.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::call::{self, Call};
use crate::{Error, Operation, ProcessGroup, tree};

/// Makes the ranks of a new group, rank 0 first; move each to its own thread.
///
/// Dropping a rank tells the others: see [`Error::PeerLeft`]. While an operation runs the group holds one copy of
/// every rank's input.
///
/// # Panics
/// If `world_size` is 0.
///
/// ```
/// use hearth_collective::{ProcessGroup, threads};
///
/// std::thread::scope(|scope| {
///     for mut group in threads::group(4) {
///         scope.spawn(move || {
///             let mut buffer = [group.rank() as f32, 1.0];
///             group.all_reduce(&mut buffer).expect("nobody leaves");
///             assert_eq!(buffer, [6.0, 4.0]);
///         });
///     }
/// });
/// ```
pub fn group(world_size: usize) -> Vec<ThreadGroup> {
    assert!(world_size > 0, "a process group has at least one rank");
    let posted = (0..world_size).map(|_| None).collect();
    let state = State { posted, round: 0, published: Arc::default(), untaken: 0, left: None };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    (0..world_size).map(|rank| ThreadGroup { rank, world_size, shared: shared.clone() }).collect()
}

/// One rank of a group of threads.
pub struct ThreadGroup {
    rank: usize,
    world_size: usize,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when a round is published or a rank leaves.
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
    /// The first rank that left.
    left: Option<usize>,
}

/// A rank's call with what the other ranks read of its input.
struct Post {
    call: Call,
    /// Input of a reduction.
    elements: Vec<f32>,
    /// Input of an operation that moves bytes.
    bytes: Vec<u8>,
}

impl Shared {
    /// The state is consistent whenever the lock is free, a panic elsewhere included.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
}

impl ThreadGroup {
    /// One round: posts, waits for every rank, and checks all calls.
    fn exchange(&mut self, post: Post) -> Result<Arc<Vec<Post>>, Error> {
        let operation = post.call.operation;
        let mut state = self.shared.lock();
        if let Some(rank) = state.left {
            return Err(Error::PeerLeft { rank, operation });
        }
        let round = state.round;
        state.posted[self.rank] = Some(post);
        if state.publish_if_complete() {
            self.shared.changed.notify_all();
        }
        let waiting = |state: &mut State| state.round == round && state.left.is_none();
        let mut state =
            self.shared.changed.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner);
        // A rank may leave as soon as the round is published: the round is valid all the same.
        if let (true, Some(rank)) = (state.round == round, state.left) {
            return Err(Error::PeerLeft { rank, operation });
        }
        let posts = state.take_published();
        drop(state);
        call::check(&posts.iter().map(|post| post.call).collect::<Vec<_>>())?;
        Ok(posts)
    }

    /// The part of `length` elements that this rank sums in an all-reduce.
    fn share(&self, length: usize) -> std::ops::Range<usize> {
        let share = length.div_ceil(self.world_size);
        (self.rank * share).min(length)..((self.rank + 1) * share).min(length)
    }
}

/// A call of `operation` that posts `elements`.
fn reduction(operation: Operation, elements: &[f32], output: usize) -> Post {
    let call = Call { operation, input: elements.len(), output, root: 0 };
    Post { call, elements: elements.to_vec(), bytes: Vec::new() }
}

/// A call of `operation` that posts `bytes`.
fn movement(operation: Operation, bytes: &[u8], output: usize) -> Post {
    let call = Call { operation, input: bytes.len(), output, root: 0 };
    Post { call, elements: Vec::new(), bytes: bytes.to_vec() }
}

/// Elements `range` of every rank's input.
fn parts(posts: &[Post], range: std::ops::Range<usize>) -> Vec<&[f32]> {
    posts.iter().map(|post| &post.elements[range.clone()]).collect()
}

impl ProcessGroup for ThreadGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    /// Each rank sums its share, then the shares are exchanged.
    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<(), Error> {
        let length = buffer.len();
        let posts = self.exchange(reduction(Operation::AllReduce, buffer, length))?;
        let share = self.share(length);
        let mut sum = vec![0.0; share.len()];
        tree::sum(&parts(&posts, share), &mut sum);
        drop(posts);
        // Every share is checked as the whole buffer: the last ones are shorter.
        let call = Call { operation: Operation::AllReduce, input: length, output: length, root: 0 };
        let shares = self.exchange(Post { call, elements: sum, bytes: Vec::new() })?;
        let mut rest = buffer;
        for post in shares.iter() {
            let (here, behind) = rest.split_at_mut(post.elements.len());
            here.copy_from_slice(&post.elements);
            rest = behind;
        }
        Ok(())
    }

    fn reduce_scatter(&mut self, input: &[f32], partition: &mut [f32]) -> Result<(), Error> {
        let posts = self.exchange(reduction(Operation::ReduceScatter, input, partition.len()))?;
        let start = self.rank * partition.len();
        tree::sum(&parts(&posts, start..start + partition.len()), partition);
        Ok(())
    }

    fn all_gather(&mut self, partition: &[u8], output: &mut [u8]) -> Result<(), Error> {
        let posts = self.exchange(movement(Operation::AllGather, partition, output.len()))?;
        for (rank, post) in posts.iter().enumerate() {
            output[rank * partition.len()..][..partition.len()].copy_from_slice(&post.bytes);
        }
        Ok(())
    }

    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<(), Error> {
        let posts = self.exchange(movement(Operation::AllToAll, input, output.len()))?;
        let part = input.len() / self.world_size;
        for (rank, post) in posts.iter().enumerate() {
            output[rank * part..][..part].copy_from_slice(&post.bytes[self.rank * part..][..part]);
        }
        Ok(())
    }

    fn broadcast(&mut self, root: usize, buffer: &mut [u8]) -> Result<(), Error> {
        let call = Call { operation: Operation::Broadcast, input: buffer.len(), output: buffer.len(), root };
        let bytes = if root == self.rank { buffer.to_vec() } else { Vec::new() };
        let posts = self.exchange(Post { call, elements: Vec::new(), bytes })?;
        if root != self.rank {
            buffer.copy_from_slice(&posts[root].bytes);
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.exchange(movement(Operation::Barrier, &[], 0)).map(drop)
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.left.get_or_insert(self.rank);
        // The round under way cannot complete any more.
        state.posted.fill_with(|| None);
        self.shared.changed.notify_all();
    }
}
