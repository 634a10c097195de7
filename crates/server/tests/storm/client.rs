//! How clients ask, and what may come back.

use crate::requests::{Dice, KNOWN, hostile, impossible, known, last, nonsense};
use crate::wire::{self, Answer};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Connections that a client leaves unread at most.
const MOST_OPEN: usize = 16;

/// Bytes of an answer that may have waited in the sockets' buffers until the server lost patience.
const LONG: usize = 128 << 10;

/// What became of the requests.
#[derive(Debug, Default)]
pub struct Tally {
    /// Answered in full.
    answered: AtomicU64,
    /// The client's fault.
    refused: AtomicU64,
    /// The queue was full, or there was no room for the body or the answer.
    busy: AtomicU64,
    /// Waited too long in it.
    overdue: AtomicU64,
    /// The client went away.
    cancelled: AtomicU64,
    /// Never sent in full, or its answer left unread for too long, and cut off.
    cut: AtomicU64,
}

impl Tally {
    fn all(&self) -> [&AtomicU64; 6] {
        [&self.answered, &self.refused, &self.busy, &self.overdue, &self.cancelled, &self.cut]
    }

    pub fn total(&self) -> u64 {
        self.all().iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }

    /// Every way to end was taken; only how many waited too long is a matter of the machine's speed.
    pub fn was_a_storm(&self, requests: u64) {
        for n in [&self.answered, &self.refused, &self.busy, &self.cancelled, &self.cut] {
            assert!(n.load(Ordering::Relaxed) > requests / 100, "{self:?}");
        }
    }
}

/// What may come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// The answer of a known request, unless there was no room.
    Known(u64),
    /// An answer or a refusal.
    Anything,
    /// A refusal.
    Refusal,
    /// A refusal, or an end of the connection.
    Cut,
}

/// A connection with requests on it whose answers were not read yet.
struct Open {
    stream: TcpStream,
    expected: Vec<Expected>,
}

/// One thread's worth of clients.
pub struct Client<'a> {
    address: SocketAddr,
    answers: &'a [Vec<Value>],
    tally: &'a Tally,
    dice: Dice,
}

impl<'a> Client<'a> {
    pub fn new(address: SocketAddr, answers: &'a [Vec<Value>], tally: &'a Tally, seed: u64) -> Self {
        Self { address, answers, tally, dice: Dice(seed * 0x9e37_79b9 + 1) }
    }

    /// Makes this many requests and sees each to its end.
    pub fn run(mut self, mut requests: u64) {
        let mut open: Vec<Open> = Vec::new();
        while requests > 0 {
            let asked = self.ask(requests);
            requests -= asked.expected.len() as u64;
            open.push(asked);
            // Bursts: mostly asks on without reading.
            while open.len() > MOST_OPEN || (!open.is_empty() && self.dice.one_in(3)) {
                let one = open.swap_remove(self.dice.roll(open.len() as u64) as usize);
                self.follow(one);
            }
        }
        open.into_iter().for_each(|one| self.follow(one));
    }

    /// Opens a connection with one request on it, or a few but at most `most`.
    fn ask(&mut self, most: u64) -> Open {
        let mut stream = wire::connect(self.address);
        if self.dice.one_in(24) {
            return self.ask_by_halves(stream);
        }
        let count = if self.dice.one_in(8) { most.min(1 + self.dice.roll(4)) } else { 1 };
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        for left in (0..count).rev() {
            let (request, outcome) = self.request();
            // What comes after bytes that are no request is not heard.
            let is_last = left == 0 || outcome == Expected::Cut;
            bytes.extend(if is_last { last(request) } else { request });
            expected.push(outcome);
            if is_last {
                break;
            }
        }
        // The server may hang up before it has read everything.
        let _ = stream.write_all(&bytes);
        Open { stream, expected }
    }

    fn request(&mut self) -> (Vec<u8>, Expected) {
        match self.dice.roll(16) {
            0..8 => {
                let kind = self.dice.roll(KNOWN);
                (known(kind), Expected::Known(kind))
            }
            8..13 => (hostile(&mut self.dice), Expected::Anything),
            13..15 => (impossible(&mut self.dice), Expected::Refusal),
            _ => (nonsense(&mut self.dice), Expected::Cut),
        }
    }

    /// Sends a part of a request, and says that this was all, or says nothing more.
    fn ask_by_halves(&mut self, mut stream: TcpStream) -> Open {
        let request = known(self.dice.roll(KNOWN));
        let part = 1 + self.dice.roll(request.len() as u64 - 1) as usize;
        stream.write_all(&request[..part]).expect("the server waits for the rest");
        if self.dice.one_in(2) {
            stream.shutdown(Shutdown::Write).expect("the server waits for the rest");
        }
        Open { stream, expected: vec![Expected::Cut] }
    }

    fn follow(&mut self, Open { mut stream, expected }: Open) {
        let mut bytes = Vec::new();
        if self.dice.one_in(6) {
            // Goes away after so many bytes, with the rest on its way.
            let most = self.dice.roll(2) * self.dice.roll(4000);
            wire::rest(&mut (&mut stream).take(most), &mut bytes);
            drop(stream);
            return self.count(&self.tally.cancelled, expected.len());
        }
        if self.dice.one_in(20) {
            self.sip(&mut stream, &mut bytes);
        }
        let orderly = wire::rest(&mut stream, &mut bytes);
        let (answers, whole) = wire::answers(&bytes);
        let came = answers.len();
        let may_be_cut = expected.contains(&Expected::Cut) || bytes.len() > LONG;
        let text = || String::from_utf8_lossy(&bytes).into_owned();
        assert!((orderly && whole) || may_be_cut, "{expected:?}: an answer is not whole: {}", text());
        assert!(came == expected.len() || may_be_cut, "{expected:?}: {came} answers: {}", text());
        for (answer, expected) in answers.iter().zip(&expected) {
            self.judge(answer, *expected);
        }
        self.count(&self.tally.cut, expected.len() - came.min(expected.len()));
    }

    /// Reads drop by drop for a while.
    fn sip(&mut self, stream: &mut TcpStream, into: &mut Vec<u8>) {
        for _ in 0..self.dice.roll(100) {
            std::thread::sleep(Duration::from_micros(200));
            wire::rest(&mut stream.take(1 + self.dice.roll(16)), into);
        }
    }

    fn judge(&self, answer: &Answer, expected: Expected) {
        let error = answer.error();
        let what = || format!("{expected:?}: {answer:?}");
        let counted = match (answer.status, error.as_deref()) {
            (429, Some("queue_full" | "no_room")) => &self.tally.busy,
            (200 | 503, Some("queue_timeout")) => &self.tally.overdue,
            (200, None) => {
                assert!(matches!(expected, Expected::Known(_) | Expected::Anything), "{}", what());
                if let Expected::Known(kind) = expected {
                    assert_eq!(answer.said(), self.answers[kind as usize], "known request {kind}");
                }
                &self.tally.answered
            }
            (408, Some(_)) if expected == Expected::Cut => &self.tally.cut,
            (400..500, error) => {
                assert!(!matches!(expected, Expected::Known(_)), "{}", what());
                // What is no HTTP is refused without a word.
                assert!(error.is_some() || expected == Expected::Cut, "{}", what());
                &self.tally.refused
            }
            _ => panic!("{}", what()),
        };
        self.count(counted, 1);
    }

    fn count(&self, which: &AtomicU64, n: usize) {
        which.fetch_add(n as u64, Ordering::Relaxed);
    }
}
