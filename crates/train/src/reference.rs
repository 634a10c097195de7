//! What the model said of the data before anything was trained: the reference of an objective that compares, when every
//! weight is trained and the first weights are soon gone.
//!
//! Computed once, from the weights the run starts from, by all ranks together, and kept in the run's directory. A resumed
//! run reads the file or, if it is missing or of another model, data or precision, computes it again from the model that
//! the recipe names: never from a checkpoint.
//!
//! # On disk
//! `DIR/reference.safetensors`: one f64 per sequence, the training data's in the order of their places, then the
//! validation data's. Its metadata names what it was computed from, and the hash of the numbers.

use crate::config::hex;
use crate::micro_batch::MicroBatch;
use crate::trainer::Trainer;
use crate::{Error, Files};
use hearth_data::Sequence;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Name of the file in the run's directory.
pub const REFERENCE_FILE: &str = "reference.safetensors";
const TENSOR: &str = "log_likelihood";

/// A sequence by what it is, not by where it stands: training and validation data count their places apart.
type Fingerprint = [u8; 16];

/// The log-likelihoods of the sequences that were known before the first step.
#[derive(Default)]
pub(crate) struct References(HashMap<Fingerprint, f64>);

impl References {
    fn new(prints: Vec<Fingerprint>, values: Vec<f64>) -> Self {
        Self(prints.into_iter().zip(values).collect())
    }

    /// Those of a micro-batch; nothing if one of them is not known.
    pub(crate) fn of(&self, sequences: &[Sequence]) -> Arc<[f64]> {
        if self.0.is_empty() {
            return [].into();
        }
        let known: Option<Arc<[f64]>> =
            sequences.iter().map(|s| self.0.get(&fingerprint(s)).copied()).collect();
        known.unwrap_or_else(|| [].into())
    }
}

impl Trainer {
    /// Reads or computes the references of the training data and of `validation`. The weights are still the first ones;
    /// `weights` is their hash (rank 0's is asked).
    pub(crate) fn references(&self, weights: Sha256, validation: &[Sequence]) -> Result<References, Error> {
        let unit = self.config.micro_batch * self.config.objective.objective().sequences_per_unit();
        let chunks = || self.loader.sequences().chunks(unit).chain(validation.chunks(unit));
        let prints: Vec<Fingerprint> = chunks().flatten().map(fingerprint).collect();
        let origin = self.origin(weights, &prints);
        let dir = self.config.checkpoint.as_ref().map(|c| c.dir.clone()).filter(|_| self.comm.rank() == 0);
        let found = dir.as_deref().and_then(|dir| read(&dir.join(REFERENCE_FILE), &origin, prints.len()));
        // One rank's file serves them all.
        let found = self.gathered(found.unwrap_or_default())?.into_iter().next().unwrap_or_default();
        if found.len() == prints.len() {
            return Ok(References::new(prints, found));
        }
        let batches: Vec<MicroBatch> = chunks().map(MicroBatch::new).collect();
        let values = self.compute_references(&batches)?;
        let written = dir.map_or(Ok(()), |dir| write(&*self.files, &dir, &origin, &values));
        crate::saving::agree(&self.comm, written)?;
        Ok(References::new(prints, values))
    }

    /// The ranks take turns; a rank without a turn of its own goes along, for weights may have to be gathered.
    fn compute_references(&self, batches: &[MicroBatch]) -> Result<Vec<f64>, Error> {
        crate::batches::check_ids(self.vocab(), batches)?;
        let mut values = Vec::new();
        for round in batches.chunks(self.comm.world_size()) {
            let batch = &round[self.comm.rank().min(round.len() - 1)];
            let all = self.gathered(self.block_loop(None).log_likelihoods(batch)?)?;
            all.into_iter().take(round.len()).for_each(|of_rank| values.extend(of_rank));
        }
        Ok(values)
    }

    /// Every rank's numbers.
    fn gathered(&self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>, Error> {
        let all = self.comm.all_gather_varied(bytemuck::cast_slice(&numbers).to_vec()).wait()?;
        Ok(all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect())
    }

    /// Names everything that the references depend on.
    fn origin(&self, weights: Sha256, prints: &[Fingerprint]) -> String {
        let mut hash = Sha256::new();
        hash.update(format!(
            "{:?} {} {}",
            self.arch.config(),
            self.config.compute.name(),
            self.config.micro_batch
        ));
        hash.update(weights.finalize());
        prints.iter().for_each(|print| hash.update(print));
        hex(&hash.finalize())
    }
}

fn fingerprint(sequence: &Sequence) -> Fingerprint {
    let mut hash = Sha256::new();
    hash.update((sequence.ids.len() as u64).to_le_bytes());
    sequence.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    sequence.labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
    sequence.documents.iter().for_each(|len| hash.update((*len as u64).to_le_bytes()));
    hash.finalize()[..16].try_into().expect("16 of 32 bytes")
}

/// The numbers of a file that was computed from `origin`; `None` for any other or damaged one, which is computed again.
fn read(path: &Path, origin: &str, len: usize) -> Option<Vec<f64>> {
    let bytes = std::fs::read(path).ok()?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).ok()?;
    let metadata = metadata.metadata().as_ref()?;
    let file = SafeTensors::deserialize(&bytes).ok()?;
    let tensor = file.tensor(TENSOR).ok().filter(|t| t.dtype() == Dtype::F64 && t.shape() == [len])?;
    let sound =
        metadata.get("origin")? == origin && *metadata.get("sha256")? == hex(&Sha256::digest(tensor.data()));
    sound.then(|| bytemuck::pod_collect_to_vec(tensor.data()))
}

/// Writes the file: complete, or not under its name.
fn write(files: &dyn Files, dir: &Path, origin: &str, values: &[f64]) -> Result<(), Error> {
    let data: &[u8] = bytemuck::cast_slice(values);
    let view = TensorView::new(Dtype::F64, vec![values.len()], data).expect("eight bytes each");
    let about = [("origin", origin.to_owned()), ("sha256", hex(&Sha256::digest(data)))];
    let metadata = about.map(|(key, value)| (key.to_owned(), value)).into();
    let bytes =
        safetensors::serialize([(TENSOR, view)], Some(metadata)).expect("a tensor with a name serialises");
    let (path, partial) = (dir.join(REFERENCE_FILE), dir.join(format!(".{REFERENCE_FILE}.partial")));
    let save = || {
        files.create_dir(dir)?;
        files.create(&partial)?.write_all(&bytes)?;
        files.sync(&partial)?;
        files.rename(&partial, &path)?;
        files.sync(dir)
    };
    save().map_err(Error::io(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_origin_or_with_another_bit_is_not_taken() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, values) = (dir.path().join(REFERENCE_FILE), [-1.5, -2.25, 0.1 + 0.2]);
        write(&crate::Disk, dir.path(), "a", &values).expect("writes");
        assert_eq!(read(&path, "a", 3).expect("found"), values);
        assert_eq!((read(&path, "b", 3), read(&path, "a", 2)), (None, None));
        let mut bytes = std::fs::read(&path).expect("reads");
        *bytes.last_mut().expect("not empty") ^= 1;
        std::fs::write(&path, &bytes).expect("writes");
        assert_eq!(read(&path, "a", 3), None);
        std::fs::write(&path, &bytes[..20]).expect("writes");
        assert_eq!(read(&path, "a", 3), None);
        let names: Vec<_> =
            std::fs::read_dir(dir.path()).expect("lists").map(|e| e.expect("is there").file_name()).collect();
        assert_eq!(names, [REFERENCE_FILE]);
    }
}
