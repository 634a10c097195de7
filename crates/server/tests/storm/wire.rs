//! HTTP as it lies on the wire: answers taken apart, and whether they are whole.

use crate::requests::last;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longer than any request may take: who waits longer is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// One answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    pub kind: Kind,
}

/// What an answer's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Json,
    Events,
    /// Pages, metrics, nothing.
    Other,
}

impl Answer {
    /// The JSON values in it: the body, or the data of each event but the last, `[DONE]`.
    pub fn values(&self) -> Vec<Value> {
        let parse = |text: &str| serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        let text = std::str::from_utf8(&self.body).expect("answers are UTF-8");
        match self.kind {
            Kind::Json => return vec![parse(text)],
            Kind::Other => return Vec::new(),
            Kind::Events => {}
        }
        let events = text.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        let data = events.map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")));
        let values: Vec<&str> = data.collect();
        match values.split_last() {
            Some((&"[DONE]", chunks)) => chunks.iter().map(|text| parse(text)).collect(),
            // An error ends a stream without it.
            _ => values.into_iter().map(parse).collect(),
        }
    }

    /// What does not depend on when it was asked: every choice's pieces in order, choice by choice.
    pub fn said(&self) -> Vec<Value> {
        let mut choices: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
        for value in self.values() {
            for choice in value["choices"].as_array().into_iter().flatten() {
                choices
                    .entry(choice["index"].as_u64().expect("choices are numbered"))
                    .or_default()
                    .push(choice.clone());
            }
        }
        choices.into_values().flatten().collect()
    }

    /// `code` or `message` of the error in it.
    pub fn error(&self) -> Option<String> {
        let last = self.values().pop()?;
        let error = last.get("error")?;
        Some(error["code"].as_str().or(error["message"].as_str()).expect("errors say something").to_owned())
    }
}

/// Connects, with a limit to how long anything may take. The system may run short of ports for a moment.
pub fn connect(address: SocketAddr) -> TcpStream {
    for _ in 0..1000 {
        if let Ok(stream) = TcpStream::connect(address) {
            stream.set_read_timeout(Some(STUCK)).unwrap();
            stream.set_write_timeout(Some(STUCK)).unwrap();
            return stream;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("nobody listens any more");
}

/// Everything until the server closes; `false` = it closed by a reset, so something may be missing.
///
/// # Panics
/// When nothing comes for too long.
pub fn rest(stream: &mut impl Read, into: &mut Vec<u8>) -> bool {
    match stream.read_to_end(into) {
        Ok(_) => true,
        Err(error) => {
            let stuck = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            assert!(!stuck, "no end of {:?}", String::from_utf8_lossy(into));
            false
        }
    }
}

/// The whole answers at the beginning of what came, and whether nothing but them came.
pub fn answers(mut bytes: &[u8]) -> (Vec<Answer>, bool) {
    let mut answers = Vec::new();
    while let Some((answer, after)) = answer(bytes) {
        answers.push(answer);
        bytes = after;
    }
    (answers, bytes.is_empty())
}

fn answer(bytes: &[u8]) -> Option<(Answer, &[u8])> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).expect("heads are text").to_ascii_lowercase();
    let after = &bytes[end + 4..];
    let status = head.strip_prefix("http/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let status = status.unwrap_or_else(|| panic!("{head:?}"));
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let kind = match field("content-type") {
        Some("application/json") => Kind::Json,
        Some("text/event-stream") => Kind::Events,
        _ => Kind::Other,
    };
    let (body, after) = match field("content-length") {
        Some(length) => {
            let (body, after) = after.split_at_checked(length.parse().expect("a length"))?;
            (body.to_vec(), after)
        }
        None if field("transfer-encoding") == Some("chunked") => chunks(after)?,
        None => (Vec::new(), after),
    };
    Some((Answer { status, body, kind }, after))
}

fn chunks(mut bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|w| w == b"\r\n")?;
        let length =
            std::str::from_utf8(&bytes[..line]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        let (chunk, after) = bytes[line + 2..].split_at_checked(length.expect("a chunk's length"))?;
        bytes = after.strip_prefix(b"\r\n")?;
        if chunk.is_empty() {
            return Some((body, bytes));
        }
        body.extend_from_slice(chunk);
    }
}

/// What one request is answered, `said`.
pub fn ask_alone(address: SocketAddr, request: &[u8]) -> Vec<Value> {
    let mut stream = connect(address);
    stream.write_all(&last(request.to_vec())).unwrap();
    let mut bytes = Vec::new();
    rest(&mut stream, &mut bytes);
    let (answers, whole) = answers(&bytes);
    assert!(whole && answers.len() == 1 && answers[0].status == 200, "{}", String::from_utf8_lossy(&bytes));
    answers[0].said()
}
