//! Sequences → the micro-batches of a step or of an evaluation, checked before anything is computed.

use crate::Error;
use crate::config::TrainConfig;
use crate::micro_batch::MicroBatch;
use hearth_data::Sequence;
use hearth_data::loader::micro_batches;

/// A step's micro-batches, each made by `make`.
///
/// # Errors
/// [`Error::Config`] for another number of sequences than a step has, ids outside the vocabulary, and a step of which no
/// token is trained.
pub(crate) fn of_step(
    config: &TrainConfig,
    vocab: usize,
    step: u64,
    sequences: Vec<Sequence>,
    make: impl Fn(&[Sequence]) -> MicroBatch,
) -> Result<Vec<MicroBatch>, Error> {
    let objective = config.objective.objective();
    objective.check(&sequences)?;
    let (unit, want) = (objective.sequences_per_unit(), config.global_batch);
    if sequences.len() != want * unit {
        let got = sequences.len();
        return Err(Error::Config(format!(
            "a step was given {got} sequences, train.global_batch = {want} is {}",
            want * unit
        )));
    }
    let batches = micro_batches(sequences, config.micro_batch);
    let batches: Vec<MicroBatch> = batches.iter().map(|batch| make(&batch.sequences)).collect();
    check_ids(vocab, &batches)?;
    if batches.iter().all(|b| b.trained() == 0) {
        return Err(Error::Config(format!(
            "step {step}: none of its tokens is trained; look at `hearth data inspect`, and at data_opts.train_on"
        )));
    }
    Ok(batches)
}

/// An evaluation's micro-batches, each made by `make`, and what their mean loss is a mean over.
///
/// # Errors
/// [`Error::Config`] for sequences that the objective does not take, ids outside the vocabulary, and nothing that is trained.
pub(crate) fn of_validation(
    config: &TrainConfig,
    vocab: usize,
    sequences: &[Sequence],
    make: impl Fn(&[Sequence]) -> MicroBatch,
) -> Result<(Vec<MicroBatch>, u64), Error> {
    let objective = config.objective.objective();
    objective.check(sequences)?;
    let unit = config.micro_batch * objective.sequences_per_unit();
    let batches: Vec<MicroBatch> = sequences.chunks(unit).map(make).collect();
    check_ids(vocab, &batches)?;
    let count = batches.iter().map(|batch| objective.count(batch)).sum();
    if count == 0 {
        return Err(Error::Config("the validation data has no trained token; give it more examples".into()));
    }
    Ok((batches, count))
}

/// Refuses ids the model has no embedding for.
pub(crate) fn check_ids(vocab: usize, batches: &[MicroBatch]) -> Result<(), Error> {
    let ids = batches.iter().flat_map(|b| b.ids.iter().copied());
    let labels = batches.iter().flat_map(|b| b.targets.iter().filter(|t| **t >= 0).map(|t| *t as u32));
    match ids.chain(labels).find(|id| *id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(Error::Config(format!(
            "the data has token id {id}, the model's vocabulary ends at {}; use the model's own tokenizer",
            vocab - 1
        ))),
    }
}
