//! The operations over messages between pairs of ranks.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::ffi::Transfer;
use super::message::Place;
use super::{MpiGroup, call};
use crate::buffer::into_vec;
use crate::call::Call;
use crate::{Buffer, Error, Operation, ProcessGroup, SCRATCH_BYTES, tree};

/// The most bytes a reduction receives from one rank at a time.
const PIECE_BYTES: usize = 1 << 20;

/// A buffer that messages are sent from.
type Source = Arc<Box<dyn Buffer>>;

fn source(buffer: impl Buffer) -> Source {
    Arc::new(Box::new(buffer))
}

/// The buffer, once no message is sent from it.
fn reclaim(source: Source) -> Box<dyn Buffer> {
    Arc::into_inner(source).expect("a complete transfer has let go of its sources")
}

fn bytes(elements: Range<usize>) -> Range<usize> {
    4 * elements.start..4 * elements.end
}

impl MpiGroup {
    fn call(&mut self, operation: Operation, input: usize, output: usize) -> Result<(), Error> {
        self.begin(Call { operation, input, output, root: 0 }, Place::default()).map(drop)
    }

    /// Sends range `sent(peer)` of `source` to each peer and receives range `received(peer)` of `target` from it.
    fn exchange(
        &mut self,
        source: &Source,
        target: Box<dyn Buffer>,
        sent: impl Fn(usize) -> Range<usize>,
        received: impl Fn(usize) -> Range<usize>,
    ) -> Result<Box<dyn Buffer>, Error> {
        let mut transfer = Transfer::new(&self.process.library, Some(target));
        for peer in self.peers() {
            transfer.receive(received(peer), self.members[peer], self.tag + 1)?;
        }
        for peer in self.peers() {
            transfer.send(source, sent(peer), self.members[peer], self.tag + 1)?;
        }
        self.complete(transfer).map(|target| target.expect("there is one"))
    }

    /// The sum over ranks of this rank's part of `input`; part `r` is `part(r)`, of elements, the first the longest.
    fn reduce(&mut self, input: &Source, part: impl Fn(usize) -> Range<usize>) -> Result<Vec<f32>, Error> {
        let (rank, others) = (self.watch.rank, self.watch.world_size - 1);
        let piece = PIECE_BYTES.min(SCRATCH_BYTES / 2 / others.max(1)) / 4;
        let cut = |rank: usize, start: usize| {
            let part = part(rank);
            (part.start + start).min(part.end)..(part.start + start + piece).min(part.end)
        };
        let mut sum = vec![0.0; part(rank).len()];
        let mut scratch = vec![0f32; others * piece.min(part(rank).len())];
        for start in (0..part(0).len()).step_by(piece) {
            let here = cut(rank, start);
            let slot = |peer: usize| (peer - usize::from(peer > rank)) * here.len();
            let received = |peer: usize| bytes(slot(peer)..slot(peer) + here.len());
            let sent = |peer| bytes(cut(peer, start));
            scratch = into_vec(self.exchange(input, Box::new(scratch), sent, received)?);
            let own = &bytemuck::cast_slice::<u8, f32>(input.bytes())[here.clone()];
            let part_of = |peer: usize| if peer == rank { own } else { &scratch[slot(peer)..][..here.len()] };
            let parts: Vec<_> = (0..=others).map(part_of).collect();
            let done = sum.len().min(start);
            tree::sum(&parts, &mut sum[done..done + here.len()]);
        }
        Ok(sum)
    }
}

impl ProcessGroup for MpiGroup {
    fn rank(&self) -> usize {
        self.watch.rank
    }

    fn world_size(&self) -> usize {
        self.watch.world_size
    }

    /// Each rank sums its share, then the shares are exchanged.
    fn all_reduce(&mut self, buffer: Vec<f32>) -> Result<Vec<f32>, Error> {
        let (length, rank) = (buffer.len(), self.watch.rank);
        self.call(Operation::AllReduce, length, length)?;
        let each = length.div_ceil(self.watch.world_size);
        let share = |rank: usize| (rank * each).min(length)..((rank + 1) * each).min(length);
        let buffer = source(buffer);
        let sum = self.reduce(&buffer, share)?;
        let mut buffer = into_vec::<f32>(reclaim(buffer));
        buffer[share(rank)].copy_from_slice(&sum);
        let all = 0..4 * sum.len();
        self.exchange(&source(sum), Box::new(buffer), |_| all.clone(), |peer| bytes(share(peer)))
            .map(into_vec)
    }

    fn reduce_scatter(&mut self, input: Vec<f32>) -> Result<Vec<f32>, Error> {
        let part = input.len() / self.watch.world_size;
        self.call(Operation::ReduceScatter, input.len(), part)?;
        self.reduce(&source(input), |rank| rank * part..(rank + 1) * part)
    }

    fn all_gather(
        &mut self,
        partition: Box<dyn Buffer>,
        mut output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error> {
        let part = partition.bytes().len();
        self.call(Operation::AllGather, part, output.bytes().len())?;
        output.bytes_mut()[self.watch.rank * part..][..part].copy_from_slice(partition.bytes());
        self.exchange(&Arc::new(partition), output, |_| 0..part, |peer| peer * part..(peer + 1) * part)
    }

    fn all_to_all(
        &mut self,
        input: Box<dyn Buffer>,
        mut output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error> {
        let part = input.bytes().len() / self.watch.world_size;
        self.call(Operation::AllToAll, input.bytes().len(), output.bytes().len())?;
        let of = |rank: usize| rank * part..(rank + 1) * part;
        let own = of(self.watch.rank);
        output.bytes_mut()[own.clone()].copy_from_slice(&input.bytes()[own]);
        self.exchange(&Arc::new(input), output, of, of)
    }

    /// The root sends to every rank itself.
    fn broadcast(&mut self, root: usize, buffer: Box<dyn Buffer>) -> Result<Box<dyn Buffer>, Error> {
        let length = buffer.bytes().len();
        let call = Call { operation: Operation::Broadcast, input: length, output: length, root };
        self.begin(call, Place::default())?;
        if root != self.watch.rank {
            let mut transfer = Transfer::new(&self.process.library, Some(buffer));
            transfer.receive(0..length, self.members[root], self.tag + 1)?;
            return self.complete(transfer).map(|buffer| buffer.expect("there is one"));
        }
        let (buffer, mut transfer) = (Arc::new(buffer), Transfer::new(&self.process.library, None));
        for peer in self.peers() {
            transfer.send(&buffer, 0..length, self.members[peer], self.tag + 1)?;
        }
        self.complete(transfer)?;
        Ok(reclaim(buffer))
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.call(Operation::Barrier, 0, 0)
    }

    /// The first rank of each part gives it a tag that no other group has.
    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn ProcessGroup>, Error> {
        let tag = self.next_tag()?;
        let call = Call { operation: Operation::Split, input: 0, output: 0, root: 0 };
        let places = self.begin(call, Place { color, key, tag })?;
        let part =
            call::part(&places.iter().map(|place| (place.color, place.key)).collect::<Vec<_>>(), color);
        let rank = part.iter().position(|member| *member == self.watch.rank).expect("in its own part");
        let watch = self.watch.of_part(rank, part.len());
        let members = part.iter().map(|rank| self.members[*rank]).collect();
        Ok(Box::new(MpiGroup::open(self.process.clone(), watch, members, places[part[0]].tag)?))
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.watch.timeout = timeout;
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        let abort = self.abort.clone();
        Arc::new(move || abort.store(true, SeqCst))
    }
}

impl MpiGroup {
    /// A tag, and the one behind it, that this process alone gives: each process has its own range of them.
    fn next_tag(&self) -> Result<usize, Error> {
        let each = self.process.library.highest_tag / 2 / self.process.library.world_size;
        let given = self.process.tags_given.fetch_add(1, SeqCst);
        if given >= each {
            return Err(Error::Mpi(format!("a process can open {each} groups, this would be one more")));
        }
        Ok(2 * (self.process.library.rank * each + given))
    }
}
