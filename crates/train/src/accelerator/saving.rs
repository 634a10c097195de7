//! Checkpoints of what an accelerator holds: numbers brought to the host a chunk at a time.

use super::{AcceleratedTrainer, Failure};
use crate::Error;
use crate::checkpoint::{self, Checkpoint, Facts, Piece};
use crate::saving::{READ, StateMap, check_identity};
use crate::sizes::Sizes;
use crate::state::Which;
use hearth_memory::{Kind, Tier};
use std::io;
use std::path::PathBuf;

/// Host memory that a save takes.
pub const BUFFER_BYTES: u64 = 2 * checkpoint::saver::CHUNK_BYTES;

/// A tensor of a state file: whose numbers it holds.
struct Tensor {
    piece: Piece,
    which: Which,
    param: usize,
}

impl AcceleratedTrainer {
    /// Saves the present state as `step-N`; `None` when the run keeps no checkpoints.
    ///
    /// # Errors
    /// [`Error::NotSaved`] and [`Error::Lost`]; earlier checkpoints are untouched.
    pub fn save(&mut self) -> Result<Option<PathBuf>, Error> {
        let Some(checkpoint) = self.config.checkpoint.clone() else { return Ok(None) };
        let map = StateMap::new(&Sizes { layout: &self.layout, config: &self.config });
        let (files, step) = (self.files.clone(), self.progress.step);
        let partial = checkpoint::begin(&*files, &checkpoint.dir, step, &map.files, &self.companions, false)?;
        // The saver's, and what its numbers are read into.
        let _buffer = self.ledger.charge(Tier::Host, Kind::Staging, BUFFER_BYTES)?;
        let written = match self.write_state(&map, partial.path()) {
            Ok(written) => written,
            Err(error) => {
                checkpoint::abandon(&*files, partial);
                return Err(error);
            }
        };
        if let Some(dir) = &self.run_dir {
            dir.sync_metrics()?;
        }
        let (config, stage) = (&self.config, self.config.zero);
        let facts = Facts { progress: self.progress, config, model: self.identity(), world: 1, stage };
        let path = checkpoint::finish(&*files, partial, facts, vec![written])?;
        checkpoint::prune(&*files, &checkpoint.dir, checkpoint.keep)?;
        self.saved = Some(path.clone());
        self.just_saved = self.saved.clone();
        Ok(Some(path))
    }

    /// Writes every number, in pieces of a tensor each.
    fn write_state(
        &mut self,
        map: &StateMap,
        partial: &std::path::Path,
    ) -> Result<Vec<checkpoint::WrittenPiece>, Error> {
        let tensors = self.tensors(map);
        let pieces: Vec<Piece> = tensors.iter().map(|tensor| tensor.piece).collect();
        let (accelerator, params) = (&mut self.accelerator, self.layout.params());
        let (mut failure, mut numbers) = (None, Vec::new());
        let mut read = |piece: &Piece, offset: u64, buffer: &mut [u8]| {
            let at = tensors.partition_point(|tensor| tensor.piece < *piece);
            let Tensor { which, param, .. } = tensors[at];
            let (first, len) = (offset as usize / size_of::<f32>(), buffer.len() / size_of::<f32>());
            numbers.resize(len, 0.0);
            if let Err(why) = accelerator.read(&params[param].name, which, first, &mut numbers) {
                failure = Some(why);
                return Err(io::Error::other("the accelerator failed"));
            }
            buffer.copy_from_slice(bytemuck::cast_slice(&numbers));
            Ok(())
        };
        let written = checkpoint::write_pieces(&*self.files, partial, &map.files, &pieces, &mut read);
        match (written, failure) {
            (Ok(written), _) => Ok(written),
            (Err(_), Some(failure)) => Err(self.explain(failure)),
            (Err(source), None) => Err(Error::NotSaved { path: partial.to_owned(), source }),
        }
    }

    /// Takes over a checkpoint's state.
    pub(super) fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), Error> {
        check_identity(checkpoint, &self.identity())?;
        let map = StateMap::new(&Sizes { layout: &self.layout, config: &self.config });
        let mut readers =
            map.files.iter().map(|file| checkpoint.reader(file)).collect::<Result<Vec<_>, _>>()?;
        let bytes = (READ * size_of::<f32>()) as u64;
        let _reading = self.ledger.charge(Tier::Host, Kind::Staging, bytes)?;
        for Tensor { piece, which, param } in self.tensors(&map) {
            let (first, len) = (piece.offset / 4, (piece.bytes / 4) as usize);
            for start in (0..len).step_by(READ) {
                let mut values = vec![0.0; READ.min(len - start)];
                readers[piece.file].read_f32(first + start as u64, &mut values)?;
                let name = &self.layout.params()[param].name;
                let written = self.accelerator.write(name, which, start, &values);
                written.map_err(|failure: Failure| self.explain(failure))?;
            }
        }
        self.progress = checkpoint.manifest.progress;
        self.loader.seek(self.progress.cursor)?;
        Ok(())
    }

    /// Every tensor of the state files, in their order. All are f32: an accelerator has no other.
    fn tensors(&self, map: &StateMap) -> Vec<Tensor> {
        let params = self.layout.params().len();
        let of_file = |(file, state): (usize, &checkpoint::StateFile)| {
            let tensor = |(i, range): (usize, std::ops::Range<u64>)| Tensor {
                piece: Piece { file, offset: range.start, bytes: range.end - range.start },
                which: if file == 0 { Which::Master } else { Which::State(i / params) },
                param: i % params,
            };
            state.ranges().into_iter().enumerate().map(tensor).collect::<Vec<_>>()
        };
        map.files.iter().enumerate().flat_map(of_file).collect()
    }
}
