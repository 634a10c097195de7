//! Room for what clients send and are sent: bodies until they are read, answers until they are taken. Reserved before it is
//! needed, for the most that it can become, so that no request and no number of them exhausts the machine's memory.

use crate::error::ApiError;
use axum::body::Bytes;
use hearth_engine::api::Request;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that a body may become while it is parsed: a digit and a comma become a JSON value.
const PARSED: u64 = 16;
/// A sequence's task, its decoder, its place in an answer.
const SEQUENCE: u64 = 4 << 10;
/// A token as text, in a queue and in an answer.
const TOKEN: u64 = 32;
/// A token, or an alternative to it, with its log-probability: as a value, as text, and as JSON (measured: 350).
const SCORED: u64 = 400;

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
    used: Arc<AtomicU64>,
}

impl Room {
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, used: Arc::default() }
    }

    /// Room for a body of so many bytes.
    ///
    /// # Errors
    /// 413 when it is more than there is at all, 429 when it is more than is free.
    pub(crate) fn for_body(&self, bytes: u64, retry_after_s: u32) -> Result<Reservation, ApiError> {
        let needed = bytes.saturating_mul(PARSED);
        if needed > self.limit {
            return Err(ApiError::body_too_large((self.limit / PARSED) as usize));
        }
        self.take(needed).ok_or_else(|| ApiError::no_room(needed, self.limit, retry_after_s))
    }

    /// Room for an answer to all of these, of which `scored` show log-probabilities.
    ///
    /// # Errors
    /// 400 when it is more than there is at all, 429 when it is more than is free.
    pub(crate) fn for_answer<'a>(
        &self,
        requests: impl Iterator<Item = &'a Request>,
        retry_after_s: u32,
    ) -> Result<Reservation, ApiError> {
        let needed = requests.fold(0u64, |sum, request| sum.saturating_add(most_bytes(request)));
        if needed > self.limit {
            return Err(ApiError::answer_too_large(needed, self.limit));
        }
        self.take(needed).ok_or_else(|| ApiError::no_room(needed, self.limit, retry_after_s))
    }

    fn take(&self, bytes: u64) -> Option<Reservation> {
        let more = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.ok().map(|_| Reservation { bytes, used: self.used.clone() })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What one sequence's part of an answer can take.
fn most_bytes(request: &Request) -> u64 {
    let scored = |alternatives: Option<usize>| alternatives.map_or(0, |n| SCORED * (n as u64 + 1));
    let (prompt, generated) = (request.prompt.len() as u64, request.max_tokens as u64);
    SEQUENCE
        + prompt * (TOKEN + scored(request.prompt_logprobs))
        + generated.saturating_mul(TOKEN + scored(request.logprobs))
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
        let body = room.for_body(60, 7).expect("960 of 1600").hold(Bytes::from_static(b"{}"));
        let refused = room.for_body(50, 7).expect_err("640 are free");
        assert_eq!((refused.status.as_u16(), refused.retry_after), (429, Some(7)));
        let part = body.slice(1..);
        drop(body);
        assert!(room.for_body(50, 7).is_err());
        drop(part);
        assert!(room.for_body(100, 7).is_ok());
        assert_eq!(room.for_body(101, 7).expect_err("never fits").status.as_u16(), 413);
    }

    #[test]
    fn an_answer_takes_what_its_longest_form_takes() {
        let request = Request {
            prompt: vec![1; 10],
            max_tokens: 500,
            stop_tokens: Vec::new(),
            sampling: hearth_engine::api::Sampling::default(),
            logprobs: Some(20),
            prompt_logprobs: None,
            adapter: None,
        };
        let one = most_bytes(&request);
        assert!(one > 500 * 21 * SCORED);
        let room = Room::new(2 * one);
        let both = room.for_answer([&request, &request].into_iter(), 1).expect("fits exactly");
        assert_eq!(
            room.for_answer([&request].into_iter(), 1).expect_err("nothing is free").status.as_u16(),
            429
        );
        drop(both);
        let three = room.for_answer([&request; 3].into_iter(), 1).expect_err("never fits");
        assert_eq!(three.status.as_u16(), 400);
    }
}
