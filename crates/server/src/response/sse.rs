//! Server-sent events: `data: <JSON>`, blank line, …, `data: [DONE]`.

use super::Shape;
use super::usage::Usage;
use crate::generation::{Update, Updates};
use crate::request::options::StreamOptions;
use crate::room::Reservation;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

/// Streams the updates of a request. When the client goes away, the stream and with it `updates` are dropped, which
/// cancels the sequences, and gives the answer's room back.
pub(crate) fn stream(
    updates: Updates,
    shape: impl Shape,
    usage: Usage,
    options: StreamOptions,
    keep_alive: Duration,
    room: Reservation,
) -> Response {
    let writer = Writer { shape, usage, options, ready: VecDeque::new(), ended: false };
    let from = (updates, writer, room);
    let events = futures_util::stream::unfold(from, |(mut updates, mut writer, room)| async move {
        let event = writer.next(&mut updates).await?;
        Some((Ok::<_, Infallible>(event), (updates, writer, room)))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(keep_alive)).into_response()
}

struct Writer<S> {
    shape: S,
    usage: Usage,
    options: StreamOptions,
    /// Events to be sent before the next update is looked at.
    ready: VecDeque<Event>,
    ended: bool,
}

impl<S: Shape> Writer<S> {
    async fn next(&mut self, updates: &mut Updates) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match updates.recv().await {
                Some((index, update)) => self.take(index, update),
                None => self.end(),
            }
        }
    }

    fn take(&mut self, index: usize, update: Update) {
        let chunk = match update {
            // Refused with streams.
            Update::Scored(_) => None,
            Update::Echo(echo) => Some(self.shape.echo_chunk(index, &echo)),
            Update::Piece(piece) => {
                self.usage.note(index, &piece);
                self.shape.piece_chunk(index, &piece)
            }
            // Clients raise on a key `error` wherever it comes; no `[DONE]` follows, for it was not done.
            Update::Failed(error) => {
                self.ended = true;
                Some(error.body())
            }
        };
        if let Some(mut chunk) = chunk {
            if self.options.continuous_usage && !self.ended {
                chunk["usage"] = self.usage.json();
            }
            self.send(&chunk);
        }
    }

    fn end(&mut self) {
        self.ended = true;
        if self.options.include_usage {
            self.send(&self.shape.usage_chunk(&self.usage));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }

    fn send(&mut self, chunk: &Value) {
        // JSON holds no raw line breaks, so this is one line.
        self.ready.push_back(Event::default().data(chunk.to_string()));
    }
}
