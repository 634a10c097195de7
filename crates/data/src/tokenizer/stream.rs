//! Decoding one id at a time.

use super::Tokenizer;
use crate::error::Error;

/// Turns ids into text as they come, never splitting a character. The pieces put together are exactly
/// [`Tokenizer::decode`] of all ids.
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes of a character that is not complete yet.
    pending: Vec<u8>,
    at_start: bool,
    window: Window,
}

/// For tokenizers whose text is not the sum of its tokens': what was shown is the decoding of `ids[..shown]`.
#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    start: usize,
    shown: usize,
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, pending: Vec::new(), at_start: true, window: Window::default() }
    }

    /// Takes the next id and returns the text it completes, which may be empty.
    ///
    /// # Errors
    /// When the tokenizer's own decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        if !self.tokenizer.is_concatenative() {
            return self.push_windowed(id);
        }
        let special = self.tokenizer.is_special(id);
        if special && self.skip_special {
            return Ok(String::new());
        }
        let mut bytes = self.tokenizer.token_bytes(id);
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            if !special && self.tokenizer.strips_leading_space() {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        self.pending.extend_from_slice(bytes);
        Ok(take_complete(&mut self.pending))
    }

    /// Returns what is left when no more ids will come; an unfinished character becomes U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer's own decoder fails.
    pub fn flush(&mut self) -> Result<String, Error> {
        if !self.tokenizer.is_concatenative() {
            let text = self.window.difference(&self.tokenizer, self.skip_special)?;
            self.window = Window::default();
            return Ok(text);
        }
        self.at_start = true;
        let rest = std::mem::take(&mut self.pending);
        Ok(String::from_utf8_lossy(&rest).into_owned())
    }

    fn push_windowed(&mut self, id: u32) -> Result<String, Error> {
        self.window.ids.push(id);
        let text = self.window.difference(&self.tokenizer, self.skip_special)?;
        if text.is_empty() || text.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        self.window.advance();
        Ok(text)
    }
}

impl Window {
    /// Text that the ids after `shown` add to those before.
    fn difference(&self, tokenizer: &Tokenizer, skip_special: bool) -> Result<String, Error> {
        let before = tokenizer.decode_by_backend(&self.ids[self.start..self.shown], skip_special)?;
        let now = tokenizer.decode_by_backend(&self.ids[self.start..], skip_special)?;
        Ok(now.get(before.len()..).unwrap_or_default().to_owned())
    }

    fn advance(&mut self) {
        self.start = self.shown;
        self.shown = self.ids.len();
    }
}

/// Takes all complete characters off the front; bytes that can never become UTF-8 turn into U+FFFD, one for each
/// maximal ill-formed part, as `String::from_utf8_lossy` does.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut out = String::new();
    loop {
        let (valid, bad) = match std::str::from_utf8(pending) {
            Ok(text) => {
                out.push_str(text);
                pending.clear();
                return out;
            }
            Err(error) => (error.valid_up_to(), error.error_len()),
        };
        out.push_str(&String::from_utf8_lossy(&pending[..valid]));
        pending.drain(..valid);
        let Some(bad) = bad else { return out };
        out.push('\u{FFFD}');
        pending.drain(..bad);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_fed_singly_give_the_lossy_text_of_the_whole() {
        for whole in [
            "grüß 🙂 ok".as_bytes(),
            b"\xe2\x96x\xff\xf0\x9f\x99\x82",
            b"\xf0\x9f\xf0\x9f\x99\x82",
            b"tail \xf0\x9f",
        ] {
            let (mut pending, mut text) = (Vec::new(), String::new());
            for &byte in whole {
                pending.push(byte);
                text.push_str(&take_complete(&mut pending));
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            assert_eq!(text, String::from_utf8_lossy(whole));
        }
    }
}
