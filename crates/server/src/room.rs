//! Room for what clients send and are sent: bodies until they are read, answers until they are taken. Reserved before it is
//! needed, for the most that it can become, so that no request and no number of them exhausts the machine's memory.

use crate::error::ApiError;
use crate::request::embeddings::Encoding;
use axum::body::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that a body may become while it is parsed: a digit and a comma become a JSON value.
const PARSED: u64 = 16;
/// A body that does not say how long it is has room for so many bytes more than came of it.
const STEP: u64 = 16 << 10;
/// A sequence's task, its decoder, its place in an answer.
const SEQUENCE: u64 = 4 << 10;
/// A token as text, in a queue and in an answer.
const TOKEN: u64 = 32;
/// A token, or an alternative to it, with its log-probability: as a value, as text, and as JSON (measured: 350).
const SCORED: u64 = 400;
/// A component of a vector, as the engine gives it.
const COMPONENT: u64 = 4;
/// The same as a value, and as JSON that grows.
const WRITTEN: u64 = 108;
/// The same as base64.
const ENCODED: u64 = 28;

/// So many bytes, handed out in reservations.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    limit: u64,
    used: Arc<AtomicU64>,
}

/// A part of the room, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    bytes: u64,
    room: Room,
}

impl Room {
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, used: Arc::default() }
    }

    /// Room for a body of so many bytes, or for the first of one that does not say how long it is.
    ///
    /// # Errors
    /// 413 when it is more than there is at all, 429 when it is more than is free.
    pub(crate) fn for_body(&self, bytes: Option<u64>, retry_after_s: u32) -> Result<Reservation, ApiError> {
        let mut body = Reservation { bytes: 0, room: self.clone() };
        match bytes {
            Some(bytes) => body.grow_to(self.parsed(bytes)?, retry_after_s)?,
            None => body.cover(1, retry_after_s)?,
        }
        Ok(body)
    }

    /// What a body of so many bytes takes.
    fn parsed(&self, bytes: u64) -> Result<u64, ApiError> {
        let needed = bytes.checked_mul(PARSED).filter(|needed| *needed <= self.limit);
        needed.ok_or_else(|| ApiError::body_too_large((self.limit / PARSED) as usize))
    }

    /// Room for an answer to all of these.
    ///
    /// # Errors
    /// 400 when it is more than there is at all, 429 when it is more than is free.
    pub(crate) fn for_answer(
        &self,
        sequences: impl Iterator<Item = Extent>,
        retry_after_s: u32,
    ) -> Result<Reservation, ApiError> {
        let needed = sequences.fold(0u64, |sum, extent| sum.saturating_add(extent.most_bytes()));
        self.for_bytes(needed, ("max_tokens", "tokens, sequences or log-probabilities"), retry_after_s)
    }

    /// Room for vectors of so many components, of which so many are shown, one for each prompt of so many tokens.
    ///
    /// # Errors
    /// As [`Room::for_answer`].
    pub(crate) fn for_vectors(
        &self,
        prompts: impl Iterator<Item = usize>,
        (components, shown, encoding): (usize, usize, Encoding),
        retry_after_s: u32,
    ) -> Result<Reservation, ApiError> {
        let written = match encoding {
            Encoding::Float => WRITTEN,
            Encoding::Base64 => ENCODED,
        };
        let vector = SEQUENCE + components as u64 * COMPONENT + shown as u64 * written;
        let needed = prompts.map(|tokens| vector + tokens as u64 * TOKEN).fold(0, u64::saturating_add);
        self.for_bytes(needed, ("input", "inputs or dimensions"), retry_after_s)
    }

    fn for_bytes(
        &self,
        needed: u64,
        (param, fewer): (&str, &str),
        retry_after_s: u32,
    ) -> Result<Reservation, ApiError> {
        if needed > self.limit {
            return Err(ApiError::answer_too_large(param, fewer, needed, self.limit));
        }
        let mut answer = Reservation { bytes: 0, room: self.clone() };
        answer.grow_to(needed, retry_after_s)?;
        Ok(answer)
    }
}

impl Reservation {
    /// Room for a body of which so many bytes came, and for a step more. Nobody waits for room: of two that both need
    /// what the other has, one is refused, and the other goes on.
    ///
    /// # Errors
    /// 413 when it is more than there is at all, 429 when it is more than is free.
    pub(crate) fn cover(&mut self, bytes: u64, retry_after_s: u32) -> Result<(), ApiError> {
        let least = self.room.parsed(bytes)?;
        if least <= self.bytes {
            return Ok(());
        }
        self.grow_to((least + STEP * PARSED).min(self.room.limit), retry_after_s)
    }

    /// Gives back what a body that came to an end did not need.
    pub(crate) fn settle(&mut self, bytes: u64) {
        let left = self.bytes.saturating_sub(bytes.saturating_mul(PARSED));
        self.bytes -= left;
        self.room.used.fetch_sub(left, Ordering::Relaxed);
    }

    fn grow_to(&mut self, bytes: u64, retry_after_s: u32) -> Result<(), ApiError> {
        let Room { limit, used } = &self.room;
        let more = bytes.saturating_sub(self.bytes);
        let grown = |used: u64| used.checked_add(more).filter(|used| used <= limit);
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown)
            .map_err(|_| ApiError::no_room(bytes, *limit, retry_after_s))?;
        self.bytes += more;
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.room.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What decides how large a sequence's part of an answer can become.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) prompt_tokens: usize,
    pub(crate) max_tokens: usize,
    /// Alternatives to each generated token, where log-probabilities are shown.
    pub(crate) logprobs: Option<usize>,
    /// The same for the prompt's tokens.
    pub(crate) prompt_logprobs: Option<usize>,
    /// Bytes of what every sequence has a copy of.
    pub(crate) copied: usize,
}

impl Extent {
    fn most_bytes(&self) -> u64 {
        let token = |alternatives: Option<usize>| TOKEN + alternatives.map_or(0, |n| SCORED * (n as u64 + 1));
        let prompt = (self.prompt_tokens as u64).saturating_mul(token(self.prompt_logprobs));
        let generated = (self.max_tokens as u64).saturating_mul(token(self.logprobs));
        (SEQUENCE + self.copied as u64).saturating_add(prompt).saturating_add(generated)
    }
}

/// Bytes with the room they take.
struct Held {
    bytes: Bytes,
    _room: Reservation,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Reservation {
    /// These bytes, whose last owner gives the room back.
    pub(crate) fn hold(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Held { bytes, _room: self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_room_taken_until_its_last_owner_is_gone() {
        let room = Room::new(1600);
        let body = room.for_body(Some(60), 7).expect("960 of 1600").hold(Bytes::from_static(b"{}"));
        let refused = room.for_body(Some(50), 7).expect_err("640 are free");
        assert_eq!((refused.status.as_u16(), refused.retry_after), (429, Some(7)));
        let part = body.slice(1..);
        drop(body);
        assert!(room.for_body(Some(50), 7).is_err());
        drop(part);
        assert!(room.for_body(Some(100), 7).is_ok());
        assert_eq!(room.for_body(Some(101), 7).expect_err("never fits").status.as_u16(), 413);
    }

    #[test]
    fn a_body_of_unknown_length_has_room_for_what_came_and_a_step() {
        let limit = 6 * STEP * PARSED;
        let room = Room::new(limit);
        let used = || room.used.load(Ordering::Relaxed) / PARSED;
        let mut one = room.for_body(None, 7).expect("nothing is taken");
        let mut other = room.for_body(None, 7).expect("a step is taken");
        assert_eq!(used(), 2 * (STEP + 1));
        one.cover(STEP + 1, 7).expect("it has that already");
        assert_eq!(used(), 2 * (STEP + 1));
        one.cover(3 * STEP, 7).expect("four of six");
        let refused = other.cover(2 * STEP, 7).expect_err("one is left");
        assert_eq!((refused.status.as_u16(), refused.retry_after), (429, Some(7)));
        assert_eq!(other.cover(6 * STEP + 1, 7).expect_err("never fits").status.as_u16(), 413);
        assert_eq!(used(), 5 * STEP + 1, "who is refused keeps what he had");
        drop(other);
        one.cover(6 * STEP, 7).expect("all there is");
        assert_eq!(used() * PARSED, limit);
        one.settle(100);
        assert_eq!(used(), 100);
        drop(one);
        assert_eq!(used(), 0);
    }

    #[test]
    fn an_answer_takes_what_its_longest_form_takes() {
        let extent = Extent {
            prompt_tokens: 10,
            max_tokens: 500,
            logprobs: Some(20),
            prompt_logprobs: None,
            copied: 0,
        };
        let one = extent.most_bytes();
        assert!(one > 500 * 21 * SCORED);
        let room = Room::new(2 * one);
        let both = room.for_answer([extent; 2].into_iter(), 1).expect("fits exactly");
        assert_eq!(
            room.for_answer([extent].into_iter(), 1).expect_err("nothing is free").status.as_u16(),
            429
        );
        drop(both);
        let three = room.for_answer([extent; 3].into_iter(), 1).expect_err("never fits");
        assert_eq!(three.status.as_u16(), 400);
        let endless = Extent { max_tokens: usize::MAX, ..extent };
        assert_eq!(room.for_answer([endless].into_iter(), 1).expect_err("never fits").status.as_u16(), 400);
    }
}
