//! TensorBoard event files, written by hand: TFRecord framing (length, masked crc32c, payload, masked crc32c) around
//! the protocol buffer `tensorflow.Event`.

use crate::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file in a run's directory.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a new file in `dir`. Events of earlier files from step `from_step` on are taken back: a resumed run
    /// repeats them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path, from_step: u64) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join(format!("events.out.tfevents.{}.{}.hearth", now() as u64, std::process::id()));
        let file = File::create(&path).map_err(Error::io(&path))?;
        let mut events = Self { path, file };
        events.record(&message(0, &[Field::Bytes(3, b"brain.Event:2")]))?;
        // SessionLog { status: START }
        let session = encode(&[Field::Int(1, 1)]);
        events.record(&message(from_step, &[Field::Bytes(7, &session)]))?;
        Ok(events)
    }

    /// Writes one event with a value per tag.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), Error> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let value = encode(&[Field::Bytes(1, tag.as_bytes()), Field::Float(2, *value as f32)]);
            summary.extend(encode(&[Field::Bytes(1, &value)]));
        }
        self.record(&message(step, &[Field::Bytes(5, &summary)]))
    }

    fn record(&mut self, payload: &[u8]) -> Result<(), Error> {
        let length = (payload.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(payload.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(payload);
        record.extend(masked_crc(payload).to_le_bytes());
        self.file.write_all(&record).map_err(Error::io(&self.path))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// TFRecord's checksum: rotated and offset, so that a checksum of data with checksums in it is still one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A field of a protocol buffer.
enum Field<'a> {
    Int(u64, u64),
    Double(u64, f64),
    Float(u64, f32),
    Bytes(u64, &'a [u8]),
}

/// `Event { wall_time, step, … }`.
fn message(step: u64, fields: &[Field<'_>]) -> Vec<u8> {
    let mut event = encode(&[Field::Double(1, now()), Field::Int(2, step)]);
    event.extend(encode(fields));
    event
}

fn encode(fields: &[Field<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in fields {
        match field {
            Field::Int(number, value) => {
                varint(&mut out, number << 3);
                varint(&mut out, *value);
            }
            Field::Double(number, value) => {
                varint(&mut out, number << 3 | 1);
                out.extend(value.to_le_bytes());
            }
            Field::Bytes(number, bytes) => {
                varint(&mut out, number << 3 | 2);
                varint(&mut out, bytes.len() as u64);
                out.extend(*bytes);
            }
            Field::Float(number, value) => {
                varint(&mut out, number << 3 | 5);
                out.extend(value.to_le_bytes());
            }
        }
    }
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splits a file into payloads, checking both checksums.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
            assert_eq!(masked_crc(&bytes[..8]).to_le_bytes(), bytes[8..12]);
            let payload = &bytes[12..12 + len];
            assert_eq!(masked_crc(payload).to_le_bytes(), bytes[12 + len..16 + len]);
            found.push(payload.to_vec());
            bytes = &bytes[16 + len..];
        }
        found
    }

    #[test]
    fn event_files_are_tfrecords_of_events() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut events = EventFile::create(dir.path(), 300).expect("creates");
        events.scalars(300, &[("train/loss", 1.5), ("train/lr", 0.25)]).expect("writes");
        let records = records(&fs::read(&events.path).expect("reads"));
        // 1: wall_time, 2: step, then the payload. 300 = 0xac 0x02 as a varint.
        assert_eq!(records[0][9..], *b"\x10\x00\x1a\x0dbrain.Event:2");
        assert_eq!(records[1][9..], *b"\x10\xac\x02\x3a\x02\x08\x01");
        let summary =
            b"\x0a\x11\x0a\x0atrain/loss\x15\x00\x00\xc0\x3f\x0a\x0f\x0a\x08train/lr\x15\x00\x00\x80\x3e";
        assert_eq!(records[2][9..12], *b"\x10\xac\x02");
        assert_eq!(records[2][12..14], [0x2a, summary.len() as u8]);
        assert_eq!(records[2][14..], *summary);
    }

    #[test]
    fn checksums_are_tensorflows() {
        // crc32c("123456789") = 0xe3069283 is the polynomial's published check value.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
