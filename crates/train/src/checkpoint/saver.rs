//! Writing a checkpoint by many ranks while training goes on.
//!
//! Three phases, so that communication stays with the caller's own thread and the disk with another:
//! 1. Rank 0 [`begin`]s: the directory, every file at its full length, headers and companions.
//! 2. Every rank writes its own bytes of the state files ([`write_pieces`], on a thread of its own
//!    [`BackgroundSave`]). State does not change between two updates, so that nothing is copied: the caller joins
//!    before its next update.
//! 3. Rank 0 [`finish`]es with the hashes of all ranks: manifest, rename; or [`abandon`]s.
//!
//! The bytes depend on the state alone: not on how many ranks wrote them, nor who owned what.

use super::files::write_all_at;
use super::manifest::{Facts, FileEntry, Manifest, PieceEntry};
use super::pieces::{self, Piece, WrittenPiece};
use super::reveal::{reveal, sweep};
use super::{Files, MANIFEST_FILE, StateFile, WriteAt, partial_path, step_path};
use crate::Error;
use crate::config::hex;
use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Bytes that [`write_pieces`] holds at a time; a reader is asked for no more at once, and a longer request never
/// crosses a multiple of it in the file's data.
pub const CHUNK_BYTES: u64 = 4 << 20;

/// Bytes hashed as one piece at most, so that verifying keeps every core busy.
const HASHED_BYTES: u64 = 64 << 20;

/// A small file copied into every checkpoint: `config.json`, `tokenizer.json`, a chat template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Companion {
    /// Plain file name.
    pub name: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// Fills a buffer of at most [`CHUNK_BYTES`] with a piece's bytes from an offset within the piece on: little-endian
/// numbers of the tensors' dtype.
pub type ReadPiece<'a> = dyn FnMut(&Piece, u64, &mut [u8]) -> io::Result<()> + 'a;

/// A checkpoint that rank 0 has begun.
#[derive(Clone, Debug)]
pub struct Partial {
    dir: PathBuf,
    path: PathBuf,
    step: u64,
    state_files: Vec<StateFile>,
    headers: Vec<PieceEntry>,
    companions: Vec<FileEntry>,
}

impl Partial {
    /// Where the ranks write: [`partial_path`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The error of a save that came to nothing.
    fn not_saved(&self, source: io::Error) -> Error {
        Error::NotSaved { path: step_path(&self.dir, self.step), source }
    }
}

/// Rank 0: makes the directory in which the checkpoint of `step` is written and every file in it at its full length,
/// so that a disk too small is known before anybody writes. With `clean`, what earlier saves that were killed left in
/// `dir` is removed first.
///
/// # Errors
/// [`Error::NotSaved`]; nothing is left behind that anybody reads.
pub fn begin(
    files: &dyn Files,
    dir: &Path,
    step: u64,
    state_files: &[StateFile],
    companions: &[Companion],
    clean: bool,
) -> Result<Partial, Error> {
    if clean && dir.exists() {
        sweep(files, dir)?;
    }
    let mut partial = Partial {
        dir: dir.to_owned(),
        path: partial_path(dir, step),
        step,
        state_files: state_files.to_vec(),
        headers: Vec::new(),
        companions: Vec::new(),
    };
    match prepare(files, &mut partial, companions) {
        Ok(()) => Ok(partial),
        Err(source) => {
            let error = partial.not_saved(source);
            abandon(files, partial);
            Err(error)
        }
    }
}

fn prepare(files: &dyn Files, partial: &mut Partial, companions: &[Companion]) -> io::Result<()> {
    files.create_dir(&partial.dir)?;
    if partial.path.exists() {
        files.remove_dir(&partial.path)?;
    }
    files.create_dir(&partial.path)?;
    // All room first: it is what can be lacking.
    for file in &partial.state_files {
        files.allocate(&partial.path.join(&file.name), file.file_bytes())?;
    }
    for file in &partial.state_files {
        let header = file.header();
        let mut out = files.open(&partial.path.join(&file.name))?;
        write_all_at(&mut *out, 0, &header)?;
        out.sync()?;
        let sha256 = hex(&Sha256::digest(&header));
        partial.headers.push(PieceEntry { offset: 0, bytes: header.len() as u64, sha256 });
    }
    for companion in companions {
        write_small(files, &partial.path.join(&companion.name), &companion.bytes)?;
        let sha256 = hex(&Sha256::digest(&companion.bytes));
        partial.companions.push(FileEntry::whole(&companion.name, companion.bytes.len() as u64, sha256));
    }
    Ok(())
}

fn write_small(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut out = files.create(path)?;
    out.write_all(bytes)?;
    out.flush()?;
    drop(out);
    files.sync(path)
}

/// Every rank: writes `pieces` of the state files, which `read` hands out, into the directory rank 0 has begun, and
/// makes them durable.
///
/// # Errors
/// Those of `read` and of the disk. What is written then is of no use.
pub fn write_pieces(
    files: &dyn Files,
    partial: &Path,
    state_files: &[StateFile],
    pieces: &[Piece],
    read: &mut ReadPiece<'_>,
) -> io::Result<Vec<WrittenPiece>> {
    let mut order = pieces.to_vec();
    order.sort();
    let mut buffer = Vec::new();
    let mut written = Vec::new();
    for of_file in order.chunk_by(|a, b| a.file == b.file) {
        let file = &state_files[of_file[0].file];
        let mut out = Output { file: files.open(&partial.join(&file.name))?, start: file.data_start() };
        for piece in of_file {
            out.piece(piece, &mut buffer, read, &mut written)?;
        }
        out.file.sync()?;
    }
    Ok(written)
}

/// A state file being written.
struct Output {
    file: Box<dyn WriteAt>,
    /// Where its data begins.
    start: u64,
}

impl Output {
    /// Writes a piece, hashed in parts.
    fn piece(
        &mut self,
        piece: &Piece,
        buffer: &mut Vec<u8>,
        read: &mut ReadPiece<'_>,
        written: &mut Vec<WrittenPiece>,
    ) -> io::Result<()> {
        let end = piece.offset + piece.bytes;
        let (mut at, mut hash, mut part) = (piece.offset, Sha256::new(), piece.offset);
        while at < end {
            let len = (next_multiple(at, CHUNK_BYTES).min(end) - at) as usize;
            buffer.resize(buffer.len().max(len), 0);
            let chunk = &mut buffer[..len];
            read(piece, at - piece.offset, chunk)?;
            hash.update(&*chunk);
            write_all_at(&mut *self.file, self.start + at, chunk)?;
            at += len as u64;
            if at == end || at.is_multiple_of(HASHED_BYTES) {
                let piece = Piece { file: piece.file, offset: part, bytes: at - part };
                written.push(WrittenPiece { piece, sha256: hash.finalize_reset().into() });
                part = at;
            }
        }
        Ok(())
    }
}

/// The first multiple of `of` after `at`.
fn next_multiple(at: u64, of: u64) -> u64 {
    (at / of + 1) * of
}

/// [`write_pieces`] on a thread of its own. Dropped without being joined, it stops and waits for the thread.
pub struct BackgroundSave {
    thread: Option<JoinHandle<io::Result<Vec<WrittenPiece>>>>,
    cancelled: Arc<AtomicBool>,
}

impl BackgroundSave {
    /// Starts writing. `read` must give the same bytes whenever it is called until [`BackgroundSave::join`] returns.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn spawn(
        files: Arc<dyn Files>,
        partial: PathBuf,
        state_files: Vec<StateFile>,
        pieces: Vec<Piece>,
        mut read: impl FnMut(&Piece, u64, &mut [u8]) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = cancelled.clone();
        let work = move || {
            let mut read = |piece: &Piece, offset, buffer: &mut [u8]| match flag.load(Ordering::Relaxed) {
                true => Err(io::Error::other("the save was given up")),
                false => read(piece, offset, buffer),
            };
            write_pieces(&*files, &partial, &state_files, &pieces, &mut read)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work)?;
        Ok(Self { thread: Some(thread), cancelled })
    }

    /// Whether [`BackgroundSave::join`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the last byte to be durable.
    ///
    /// # Errors
    /// Those of [`write_pieces`].
    pub fn join(mut self) -> io::Result<Vec<WrittenPiece>> {
        self.wait()
    }

    fn wait(&mut self) -> io::Result<Vec<WrittenPiece>> {
        let Some(thread) = self.thread.take() else { return Ok(Vec::new()) };
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that wrote it panicked")))
    }
}

impl Drop for BackgroundSave {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        // Nobody wants the outcome; the thread must not outlive what it reads.
        let _ = self.wait();
    }
}

/// Rank 0: completes the checkpoint with what all ranks have written. When it returns an error, earlier checkpoints
/// are untouched.
///
/// # Errors
/// [`Error::NotSaved`], also when the ranks' pieces leave a byte out or cover one twice.
pub fn finish(
    files: &dyn Files,
    partial: Partial,
    facts: Facts<'_>,
    written: Vec<Vec<WrittenPiece>>,
) -> Result<PathBuf, Error> {
    assert_eq!(facts.progress.step, partial.step, "a checkpoint is of the step it was begun at");
    match complete(files, &partial, facts, written) {
        Ok(()) => Ok(step_path(&partial.dir, partial.step)),
        Err(source) => {
            let error = partial.not_saved(source);
            abandon(files, partial);
            Err(error)
        }
    }
}

fn complete(
    files: &dyn Files,
    partial: &Partial,
    facts: Facts<'_>,
    written: Vec<Vec<WrittenPiece>>,
) -> io::Result<()> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut of_file = vec![Vec::new(); partial.state_files.len()];
    for written in written.into_iter().flatten() {
        let list = of_file.get_mut(written.piece.file);
        list.ok_or_else(|| invalid(format!("a rank wrote file {}", written.piece.file)))?.push(written);
    }
    let mut entries = Vec::new();
    for ((file, header), written) in partial.state_files.iter().zip(&partial.headers).zip(of_file) {
        entries.push(pieces::entry(file, header.clone(), written).map_err(invalid)?);
    }
    entries.extend(partial.companions.iter().cloned());
    let manifest = Manifest::new(facts, entries);
    write_small(files, &partial.path.join(MANIFEST_FILE), &manifest.encode())?;
    files.sync(&partial.path)?;
    reveal(files, &partial.dir, &partial.path, &manifest)
}

/// Rank 0: gives up a checkpoint that was begun, because a rank could not write its part.
pub fn abandon(files: &dyn Files, partial: Partial) {
    // Best effort: the partial directory is never read, and the next save of this step replaces it.
    let _ = files.remove_dir(&partial.path);
}
