//! What ranks say to each other beside the data: one message of eight words from every rank to every other at the start
//! of each operation, and one when a rank ends the group.

use std::sync::Arc;

use super::ffi::{Library, Transfer};
use crate::buffer::into_vec;
use crate::call::Call;
use crate::{Buffer, Error, Operation};

/// Words of a message.
const WORDS: usize = 8;

/// Every operation; its place is its number on the wire.
const OPERATIONS: [Operation; 7] = [
    Operation::AllReduce,
    Operation::ReduceScatter,
    Operation::AllGather,
    Operation::AllToAll,
    Operation::Broadcast,
    Operation::Barrier,
    Operation::Split,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The sender calls an operation.
    Call {
        call: Call,
        /// Of a split: color, key and the tag that the sender would give a part.
        place: Place,
    },
    /// The sender will call nothing any more.
    End(Notice),
}

/// Where a rank goes in a split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub color: usize,
    pub key: usize,
    pub tag: usize,
}

/// How a rank ended the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    Left,
    Aborted,
    TimedOut,
}

const NOTICES: [Notice; 3] = [Notice::Left, Notice::Aborted, Notice::TimedOut];

impl Message {
    pub fn encode(self) -> Vec<u64> {
        let words = match self {
            Self::Call { call, place } => {
                let operation = OPERATIONS.iter().position(|known| *known == call.operation);
                let operation = operation.expect("the list is complete");
                [0, operation, call.input, call.output, call.root, place.color, place.key, place.tag]
            }
            Self::End(notice) => {
                let notice = NOTICES.iter().position(|known| *known == notice).expect("the list is complete");
                [1, notice, 0, 0, 0, 0, 0, 0]
            }
        };
        words.map(|word| word as u64).to_vec()
    }

    fn decode(words: &[u64]) -> Result<Self, Error> {
        let unknown = || Error::Mpi(format!("unknown message {words:?}: do the ranks run the same version?"));
        let words: [u64; WORDS] = words.try_into().map_err(|_| unknown())?;
        let [kind, what, input, output, root, color, key, tag] = words.map(|word| word as usize);
        match kind {
            0 => {
                let operation = *OPERATIONS.get(what).ok_or_else(unknown)?;
                let (call, place) = (Call { operation, input, output, root }, Place { color, key, tag });
                Ok(Self::Call { call, place })
            }
            1 => NOTICES.get(what).copied().map(Self::End).ok_or_else(unknown),
            _ => Err(unknown()),
        }
    }
}

/// Where the next message of one peer arrives. It is always open, so that a peer that ends the group is heard at any
/// time.
pub struct Inbox {
    transfer: Option<Transfer>,
    /// The message that has come and that nobody has taken.
    pub message: Option<Message>,
    peer: usize,
    tag: usize,
}

impl Inbox {
    pub fn open(library: &Arc<Library>, peer: usize, tag: usize) -> Result<Self, Error> {
        let mut inbox = Self { transfer: None, message: None, peer, tag };
        inbox.post(library)?;
        Ok(inbox)
    }

    fn post(&mut self, library: &Arc<Library>) -> Result<(), Error> {
        let words: Box<dyn Buffer> = Box::new(vec![0u64; WORDS]);
        let mut transfer = Transfer::new(library, Some(words));
        transfer.receive(0..8 * WORDS, self.peer, self.tag)?;
        self.transfer = Some(transfer);
        Ok(())
    }

    /// Looks for a message.
    pub fn poll(&mut self) -> Result<(), Error> {
        let Some(transfer) = &mut self.transfer else { return Ok(()) };
        if transfer.is_complete()? {
            let words = self.transfer.take().and_then(Transfer::finish).expect("it has a target");
            self.message = Some(Message::decode(&into_vec::<u64>(words))?);
        }
        Ok(())
    }

    /// Takes the call that has come and opens for the next message.
    pub fn take_call(&mut self, library: &Arc<Library>) -> Result<(Call, Place), Error> {
        let Some(Message::Call { call, place }) = self.message.take() else {
            unreachable!("taken once every peer has called")
        };
        self.post(library)?;
        Ok((call, place))
    }

    /// Whether the peer has ended the group; calls that come before are not answered any more.
    pub fn hear_end(&mut self, library: &Arc<Library>) -> Result<bool, Error> {
        self.poll()?;
        if let Some(Message::Call { .. }) = self.message {
            self.take_call(library)?;
        }
        Ok(self.message.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_from_their_words() {
        let place = Place { color: 4, key: 5, tag: 6 };
        let calls = OPERATIONS.map(|operation| {
            let call = Call { operation, input: 1, output: 2, root: 3 };
            Message::Call { call, place }
        });
        for message in calls.into_iter().chain(NOTICES.map(Message::End)) {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn words_of_another_version_are_refused() {
        for words in [vec![0, 7, 0, 0, 0, 0, 0, 0], vec![1, 3, 0, 0, 0, 0, 0, 0], vec![2; 8], vec![0; 7]] {
            assert!(Message::decode(&words).is_err(), "{words:?}");
        }
    }
}
