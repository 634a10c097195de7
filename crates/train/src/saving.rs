//! A trainer's side of its checkpoints: which bytes this rank writes, what it reads back, and that all ranks agree.

use crate::Error;
use crate::checkpoint::{
    self, ADAPTER_FILE, BackgroundSave, Checkpoint, Facts, MODEL_FILE, ModelIdentity, OPTIMIZER_FILE,
    Partial, Piece, StateDtype, StateFile, StateTensor,
};
use crate::layout::Layout;
use crate::lora::PEFT_PREFIX;
use crate::sizes::Sizes;
use crate::state::{StateReader, Which};
use crate::trainer::Trainer;
use hearth_collective::Ordered;
use hearth_memory::{Charge, Kind, Tier};
use sha2::{Digest, Sha256};
use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// Elements read from a checkpoint at a time.
pub(crate) const READ: usize = 1 << 20;

/// A checkpoint being written while training goes on.
pub(crate) struct Saving {
    /// Rank 0's.
    partial: Option<Partial>,
    facts: crate::Progress,
    background: BackgroundSave,
    _buffer: Charge,
}

/// Returns this rank's error, or another rank's, on every rank: none goes on alone.
pub(crate) fn agree<T>(comm: &Ordered, result: Result<T, Error>) -> Result<T, Error> {
    let said = result.as_ref().err().map_or(String::new(), ToString::to_string);
    let all = comm.all_gather_varied(said.into_bytes()).wait()?;
    let value = result?;
    match all.iter().position(|said| !said.is_empty()) {
        None => Ok(value),
        Some(rank) => {
            Err(Error::OtherRank { rank, sentence: String::from_utf8_lossy(&all[rank]).into_owned() })
        }
    }
}

/// Where the flat vectors of a run lie in its state files.
pub(crate) struct StateMap {
    pub(crate) files: Vec<StateFile>,
    /// First byte of each unit in the first file, and for each state in the second.
    units: Vec<UnitMap>,
}

struct UnitMap {
    master: u64,
    states: Vec<u64>,
}

impl StateMap {
    pub(crate) fn new(sizes: &Sizes<'_>) -> Self {
        let (layout, config) = (sizes.layout, sizes.config);
        let adapter = config.adapter.is_some();
        let name = |param: &str| if adapter { format!("{PEFT_PREFIX}{param}") } else { param.into() };
        let masters = layout.params().iter().map(|param| StateTensor {
            name: name(&param.name),
            shape: param.shape.clone(),
            dtype: StateDtype::F32,
        });
        let file = if adapter { ADAPTER_FILE } else { MODEL_FILE };
        let weights = StateFile { name: file.into(), tensors: masters.collect() };
        let dtype = config.state_dtype.saved();
        let mut units: Vec<UnitMap> = Vec::new();
        for unit in layout.units() {
            units.push(UnitMap { master: 4 * unit.start as u64, states: Vec::new() });
        }
        let (mut tensors, mut at) = (Vec::new(), 0);
        for state in config.optim.states() {
            for (unit, map) in layout.units().iter().zip(&mut units) {
                map.states.push(at);
                for param in &layout.params()[unit.params.clone()] {
                    let whole = !config.optim.elementwise();
                    let shape =
                        if whole { vec![config.optim.state_len(&param.shape)] } else { param.shape.clone() };
                    let tensor = StateTensor { name: format!("{state}.{}", param.name), shape, dtype };
                    at += tensor.bytes();
                    tensors.push(tensor);
                }
            }
        }
        Self { files: vec![weights, StateFile { name: OPTIMIZER_FILE.into(), tensors }], units }
    }

    /// Every run of numbers in the files: which, of which unit, from which byte of which file.
    fn runs(&self) -> impl Iterator<Item = (Which, usize, usize, u64)> + '_ {
        self.units.iter().enumerate().flat_map(|(unit, map)| {
            let states = map.states.iter().enumerate();
            [(Which::Master, unit, 0, map.master)]
                .into_iter()
                .chain(states.map(move |(i, at)| (Which::State(i), unit, 1, *at)))
        })
    }
}

/// A piece, and what it holds.
struct Owned {
    piece: Piece,
    which: Which,
    unit: usize,
    start: usize,
}

impl Trainer {
    pub(crate) fn sizes(&self) -> Sizes<'_> {
        Sizes { layout: self.store.layout(), config: &self.config }
    }

    /// Elements of a unit that this rank reads and writes in checkpoints: everybody's part once.
    fn written(&self, which: Which, unit: usize) -> Range<usize> {
        if which != Which::Master && !self.config.optim.elementwise() {
            let len = self.sizes().state_len(unit, &(0..0));
            return if self.comm.rank() == 0 { 0..len } else { 0..0 };
        }
        self.store.layout().partition(unit)
    }

    fn owned_pieces(&self, map: &StateMap, reader: &StateReader) -> Vec<Owned> {
        let own = |(which, unit, file, at): (Which, usize, usize, u64)| {
            let (range, width) = (self.written(which, unit), reader.width(which) as u64);
            let piece =
                Piece { file, offset: at + width * range.start as u64, bytes: width * range.len() as u64 };
            (piece.bytes > 0).then_some(Owned { piece, which, unit, start: range.start })
        };
        map.runs().filter_map(own).collect()
    }

    fn reader(&self) -> Result<StateReader, Error> {
        self.settle()?;
        let units = 0..self.store.layout().units().len();
        let starts = units.map(|unit| self.sizes().copy_start(unit)).collect();
        Ok(self.state.reader(self.store.copies(), starts))
    }

    /// Begins to save the present state as `step-N`, beside what comes next; false when the run keeps no checkpoints.
    pub(crate) fn begin_save(&mut self) -> Result<bool, Error> {
        self.finish_save()?;
        let Some(checkpoint) = self.config.checkpoint.clone() else { return Ok(false) };
        let (dir, step) = (checkpoint.dir, self.progress.step);
        let map = StateMap::new(&self.sizes());
        let begun = match self.comm.rank() {
            0 => checkpoint::begin(&*self.files, &dir, step, &map.files, &self.companions, false).map(Some),
            _ => Ok(None),
        };
        let partial = agree(&self.comm, begun)?;
        let _buffer = self.ledger.charge(Tier::Host, Kind::Staging, checkpoint::saver::CHUNK_BYTES)?;
        let reader = self.reader()?;
        let owned = self.owned_pieces(&map, &reader);
        let pieces: Vec<Piece> = owned.iter().map(|owned| owned.piece).collect();
        let read = move |piece: &Piece, offset: u64, buffer: &mut [u8]| {
            let owned = owned.iter().find(|owned| owned.piece == *piece).expect("a piece of this rank");
            let start = owned.start + (offset / reader.width(owned.which) as u64) as usize;
            reader.read(owned.which, owned.unit, start, buffer).map_err(io::Error::other)
        };
        let path = checkpoint::partial_path(&dir, step);
        let spawned = BackgroundSave::spawn(self.files.clone(), path.clone(), map.files, pieces, read);
        let spawned = spawned.map_err(|source| Error::NotSaved { path, source });
        match agree(&self.comm, spawned) {
            Ok(background) => {
                self.saving = Some(Saving { partial, facts: self.progress, background, _buffer });
                Ok(true)
            }
            Err(error) => {
                partial.into_iter().for_each(|partial| checkpoint::abandon(&*self.files, partial));
                Err(error)
            }
        }
    }

    /// Completes the save under way, if there is one, and removes checkpoints beyond those to keep.
    pub(crate) fn finish_save(&mut self) -> Result<Option<PathBuf>, Error> {
        let Some(Saving { partial, facts, background, _buffer }) = self.saving.take() else {
            return Ok(None);
        };
        let outcome = checkpoint::encode_outcome(&background.join());
        let outcomes = self.comm.all_gather_varied(outcome).wait()?;
        let finished = match partial {
            Some(partial) => self.complete(partial, facts, &outcomes),
            None => Ok(()),
        };
        agree(&self.comm, finished)?;
        let dir = self.config.checkpoint.as_ref().map(|c| checkpoint::step_path(&c.dir, facts.step));
        self.just_saved = dir.clone();
        Ok(dir)
    }

    fn complete(
        &mut self,
        partial: Partial,
        progress: crate::Progress,
        outcomes: &[Vec<u8>],
    ) -> Result<(), Error> {
        if let Some(dir) = &self.run_dir {
            dir.sync_metrics()?;
        }
        let written: io::Result<Vec<_>> =
            outcomes.iter().map(|outcome| checkpoint::decode_outcome(outcome)).collect();
        let written = match written {
            Ok(written) => written,
            Err(source) => {
                let path = partial.path().to_owned();
                checkpoint::abandon(&*self.files, partial);
                return Err(Error::NotSaved { path, source });
            }
        };
        let facts = Facts {
            progress,
            config: &self.config,
            model: self.identity(),
            world: self.comm.world_size(),
            stage: self.config.zero,
        };
        checkpoint::finish(&*self.files, partial, facts, written)?;
        let checkpoint = self.config.checkpoint.as_ref().expect("a run that saves");
        checkpoint::prune(&*self.files, &checkpoint.dir, checkpoint.keep)
    }

    /// Saves the present state as `step-N` and waits for it; `None` when the run keeps no checkpoints.
    ///
    /// # Errors
    /// [`Error::NotSaved`]; earlier checkpoints are untouched.
    pub fn save(&mut self) -> Result<Option<PathBuf>, Error> {
        self.begin_save()?;
        self.finish_save()
    }

    /// Takes over a checkpoint's state, whatever layout wrote it.
    pub(crate) fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), Error> {
        check_identity(checkpoint, &self.identity())?;
        let map = StateMap::new(&self.sizes());
        let mut readers =
            map.files.iter().map(|file| checkpoint.reader(file)).collect::<Result<Vec<_>, _>>()?;
        for (which, unit, file, at) in map.runs() {
            let layout = self.store.layout();
            let len = match which {
                Which::State(_) => self.sizes().state_len(unit, &(0..layout.units()[unit].len)),
                Which::Master => layout.units()[unit].len,
            };
            let width = if file == 0 { 4 } else { self.config.state_dtype.saved().bytes() };
            let first = at / width;
            let bytes = 4 * (layout.padded_len(unit) + READ) as u64;
            let _reading = self.ledger.charge(Tier::Host, Kind::Staging, bytes)?;
            let mut whole = vec![0.0; if which == Which::Master { layout.padded_len(unit) } else { 0 }];
            for start in (0..len).step_by(READ) {
                let end = (start + READ).min(len);
                let mut values = vec![0.0; end - start];
                readers[file].read_f32(first + start as u64, &mut values)?;
                self.state.set(which, unit, start, &values)?;
                if which == Which::Master {
                    whole[start..end].copy_from_slice(&values);
                }
            }
            if which == Which::Master {
                let copy = self.sizes().copy_range(unit);
                self.store.copies_mut().fill(unit, &whole[copy])?;
            }
        }
        self.progress = checkpoint.manifest.progress;
        self.loader.seek(self.progress.cursor)?;
        Ok(())
    }

    /// sha256 of every master and optimizer state, by name (`weight.<param>`, `m.<param>` …). The same on every rank.
    ///
    /// # Errors
    /// A disk that fails, a rank that is lost.
    pub fn fingerprint(&self) -> Result<Vec<(String, String)>, Error> {
        let mut found = Vec::new();
        self.each_tensor(&mut |name, bytes| {
            found.push((name, crate::config::hex(&Sha256::digest(bytes))));
        })?;
        // Replicas are compared with each other: what differs on any rank differs for all.
        let digest = Sha256::digest(format!("{found:?}")).to_vec();
        let all = self.comm.all_gather_varied(digest).wait()?;
        for (rank, other) in all.iter().enumerate().filter(|(_, other)| **other != all[0]) {
            found.push((format!("the state of rank {rank}"), crate::config::hex(other)));
        }
        Ok(found)
    }

    /// Hands out every master and optimizer state as bytes, one after another. The same on every rank.
    ///
    /// # Errors
    /// A disk that fails, a rank that is lost.
    pub fn each_tensor(&self, each: &mut dyn FnMut(String, &[u8])) -> Result<(), Error> {
        let (map, reader) = (StateMap::new(&self.sizes()), self.reader()?);
        for (which, unit, _, _) in map.runs() {
            let bytes = self.whole(&reader, which, unit)?;
            self.split(which, unit, &bytes, reader.width(which), each);
        }
        Ok(())
    }

    /// A unit's numbers from all ranks.
    fn whole(&self, reader: &StateReader, which: Which, unit: usize) -> Result<Vec<u8>, Error> {
        if self.config.zero == 0 && self.config.optim.elementwise() {
            // Every rank has all of it: its own, as it is.
            let mut bytes = vec![0; reader.width(which) * self.store.layout().units()[unit].len];
            reader.read(which, unit, 0, &mut bytes)?;
            return Ok(bytes);
        }
        let range = self.written(which, unit);
        let mut own = vec![0; reader.width(which) * range.len()];
        reader.read(which, unit, range.start, &mut own)?;
        Ok(self.comm.all_gather_varied(own).wait()?.concat())
    }

    fn split(
        &self,
        which: Which,
        unit: usize,
        bytes: &[u8],
        width: usize,
        each: &mut dyn FnMut(String, &[u8]),
    ) {
        let layout: &Layout = self.store.layout();
        let mut at = 0;
        for param in &layout.params()[layout.units()[unit].params.clone()] {
            let (prefix, len) = match which {
                Which::Master => ("weight", param.range.len()),
                Which::State(i) => (self.config.optim.states()[i], self.config.optim.state_len(&param.shape)),
            };
            each(format!("{prefix}.{}", param.name), &bytes[width * at..width * (at + len)]);
            at += len;
        }
    }
}

/// Refuses a checkpoint of another model than `ours`.
pub(crate) fn check_identity(checkpoint: &Checkpoint, ours: &ModelIdentity) -> Result<(), Error> {
    let theirs = &checkpoint.manifest.model;
    if theirs == ours {
        return Ok(());
    }
    let why = match () {
        () if theirs.model_type != ours.model_type => {
            format!("it is of model type {}, this is {}", theirs.model_type, ours.model_type)
        }
        () if theirs.parameters_sha256 != ours.parameters_sha256 => {
            "its trained parameters have other names or shapes (another model, or other adapter settings)"
                .into()
        }
        () => "its adapter was trained on other base weights".into(),
    };
    Err(Error::Foreign { path: checkpoint.path.clone(), why })
}

/// Where the checkpoint to resume from is, found and verified by rank 0 alone.
pub(crate) fn agreed_path(comm: &Ordered, found: Result<Option<PathBuf>, Error>) -> Result<PathBuf, Error> {
    let path = agree(comm, found)?;
    let text = path.map_or(Vec::new(), |path| path.as_os_str().as_encoded_bytes().to_vec());
    let all = comm.all_gather_varied(text).wait()?;
    Ok(PathBuf::from(String::from_utf8_lossy(&all[0]).into_owned()))
}
