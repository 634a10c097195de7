//! Who writes which bytes of a checkpoint, and that together they write all of them.

use super::StateFile;
use super::manifest::{FileEntry, PieceEntry};
use crate::config::hex;
use std::io;

/// Bytes of a file's data that one rank writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// Place of the file in the list of state files.
    pub file: usize,
    /// Where it begins in the file's data.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// A piece that is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenPiece {
    /// Which bytes.
    pub piece: Piece,
    /// Their hash.
    pub sha256: [u8; 32],
}

/// Bytes of one encoded [`WrittenPiece`].
const ENCODED: usize = 3 * 8 + 32;

/// What a rank's writing came to, as bytes to send to rank 0.
pub fn encode_outcome(outcome: &io::Result<Vec<WrittenPiece>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    match outcome {
        Err(error) => {
            bytes.push(1);
            bytes.extend_from_slice(error.to_string().as_bytes());
        }
        Ok(written) => {
            bytes.push(0);
            for WrittenPiece { piece, sha256 } in written {
                for number in [piece.file as u64, piece.offset, piece.bytes] {
                    bytes.extend_from_slice(&number.to_le_bytes());
                }
                bytes.extend_from_slice(sha256);
            }
        }
    }
    bytes
}

/// What [`encode_outcome`] encoded.
///
/// # Errors
/// The rank's own error, or [`io::ErrorKind::InvalidData`] for bytes that are none of ours.
pub fn decode_outcome(bytes: &[u8]) -> io::Result<Vec<WrittenPiece>> {
    let number = |at: &[u8]| u64::from_le_bytes(at.try_into().expect("eight bytes"));
    let one = |entry: &[u8]| WrittenPiece {
        piece: Piece {
            file: number(&entry[..8]) as usize,
            offset: number(&entry[8..16]),
            bytes: number(&entry[16..24]),
        },
        sha256: entry[24..].try_into().expect("32 bytes"),
    };
    match bytes.split_first() {
        Some((0, entries)) if entries.len() % ENCODED == 0 => Ok(entries.chunks(ENCODED).map(one).collect()),
        Some((1, sentence)) => Err(io::Error::other(String::from_utf8_lossy(sentence).into_owned())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a rank's list of written pieces is cut short")),
    }
}

/// The manifest's entry of a file whose header hashes to `header` and whose data these pieces are.
///
/// # Errors
/// The first bytes that nobody or more than one rank wrote, in a sentence.
pub(super) fn entry(
    file: &StateFile,
    header: PieceEntry,
    written: impl IntoIterator<Item = WrittenPiece>,
) -> Result<FileEntry, String> {
    let start = header.bytes;
    let mut pieces = vec![header];
    for WrittenPiece { piece, sha256 } in written {
        let offset = piece
            .offset
            .checked_add(start)
            .ok_or_else(|| format!("{}: a piece begins at byte {} of its data", file.name, piece.offset))?;
        pieces.push(PieceEntry { offset, bytes: piece.bytes, sha256: hex(&sha256) });
    }
    pieces.sort_by_key(|piece| piece.offset);
    let entry = FileEntry { name: file.name.clone(), bytes: start + file.data_bytes(), pieces };
    check_tiling(&entry)?;
    Ok(entry)
}

/// Checks that a file's pieces, in order, cover every byte of it once.
pub(super) fn check_tiling(file: &FileEntry) -> Result<(), String> {
    let mut end = 0;
    for piece in &file.pieces {
        if piece.offset > end {
            return Err(format!("{}: no piece covers bytes {end}..{}", file.name, piece.offset));
        }
        if piece.offset < end {
            return Err(format!("{}: two pieces cover bytes {}..{end}", file.name, piece.offset));
        }
        end = end.checked_add(piece.bytes).filter(|end| *end <= file.bytes).ok_or_else(|| {
            let (at, bytes) = (piece.offset, piece.bytes);
            format!("{}: a piece of {bytes} bytes at {at} goes beyond its end at {}", file.name, file.bytes)
        })?;
    }
    if end < file.bytes {
        return Err(format!("{}: no piece covers bytes {end}..{}", file.name, file.bytes));
    }
    Ok(())
}
