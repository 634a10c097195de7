//! Stopping, saving, crashing and going on.

use crate::support::{config, lora, masters, model, sequences, setup, state, trainer};
use hearth_train::checkpoint::{Checkpoint, WriteAt, prune, search};
use hearth_train::{
    CheckpointConfig, Disk, Error, Files, LogConfig, Observer, StepReport, TrainConfig, Trainer,
};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static GO: AtomicBool = AtomicBool::new(false);

fn saving(steps: usize, dir: &Path, every: usize, keep: usize) -> TrainConfig {
    let checkpoint = CheckpointConfig { dir: dir.into(), every, keep };
    let log = LogConfig { jsonl: true, tensorboard: true };
    TrainConfig { checkpoint: Some(checkpoint), log, ..config(steps) }
}

/// The lines of `metrics.jsonl` without what depends on the clock and the machine.
fn metrics(dir: &Path) -> Vec<StepReport> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
    let line = |line: &str| StepReport {
        tok_s: 0.0,
        step_s: 0.0,
        peak_rss_bytes: 0,
        ..serde_json::from_str(line).expect("a report")
    };
    text.lines().map(line).collect()
}

/// Sets the stop flag after some step; remembers notices.
struct StopAfter<'a>(u64, &'a AtomicBool, Vec<String>);

impl Observer for StopAfter<'_> {
    fn step(&mut self, report: &StepReport) {
        self.1.store(report.step + 1 >= self.0, Ordering::Relaxed);
    }
    fn notice(&mut self, sentence: &str) {
        self.2.push(sentence.into());
    }
}

#[test]
fn a_stopped_and_resumed_run_equals_an_uninterrupted_one() {
    let files = model("llama-gqa-tied");
    let validation = sequences(3, files.config.vocab_size);
    for adapter in [None, Some(lora())] {
        let (straight, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let full =
            TrainConfig { adapter: adapter.clone(), eval_every: 2, ..saving(6, straight.path(), 0, 0) };
        let mut one = trainer(&files, &full);
        let summary = one.run(&validation, &mut (), &GO).expect("runs");
        assert_eq!((summary.steps, summary.stopped), (6, false));

        let config = TrainConfig { adapter, eval_every: 2, ..saving(6, parts.path(), 0, 0) };
        let stop = AtomicBool::new(false);
        let mut first = trainer(&files, &config);
        let stopped = first.run(&validation, &mut StopAfter(3, &stop, vec![]), &stop).expect("stops well");
        assert_eq!((stopped.steps, stopped.stopped), (3, true));
        // Two more steps that no checkpoint remembers: the resumed run repeats and rewrites them.
        first.step().expect("a step");
        drop(first);
        let mut second = Trainer::resume(setup(&files, &config), config, &mut ()).expect("resumes");
        let resumed = second.run(&validation, &mut (), &GO).expect("runs");
        assert_eq!(state(&second), state(&one));
        assert_eq!(second.progress(), one.progress());
        assert_eq!(metrics(parts.path()), metrics(straight.path()));
        assert_eq!(resumed.eval_loss, summary.eval_loss);
        assert_eq!(resumed.loss.to_bits(), summary.loss.to_bits());
        let [a, b] =
            [&summary, &resumed].map(|s| Checkpoint::open(s.checkpoint.as_ref().unwrap()).unwrap().manifest);
        assert_eq!(a.files, b.files, "the same files by sha256");
    }
}

#[test]
fn a_checkpoint_of_a_full_fine_tune_is_a_hugging_face_model() {
    let (files, dir) = (model("qwen2-tied-bin"), tempfile::tempdir().unwrap());
    let mut trainer = trainer(&files, &saving(2, dir.path(), 0, 0));
    let summary = trainer.run(&[], &mut (), &GO).expect("runs");
    let saved = hearth_weights::open(&summary.checkpoint.unwrap()).expect("opens as a model");
    assert_eq!(saved.config, files.config);
    for (name, values) in masters(&trainer) {
        assert_eq!(saved.tensors.read_f32(&name).expect("is there"), values);
    }
}

#[test]
fn a_checkpoint_of_an_adapter_is_a_peft_adapter_and_the_base_is_untouched() {
    let (files, dir) = (model("llama-gqa-tied"), tempfile::tempdir().unwrap());
    let before: Vec<_> =
        files.tensors.tensors().iter().map(|t| files.tensors.bytes(&t.name).unwrap().to_vec()).collect();
    let mut trainer = trainer(&files, &TrainConfig { adapter: Some(lora()), ..saving(2, dir.path(), 0, 0) });
    let summary = trainer.run(&[], &mut (), &GO).expect("runs");
    let adapter = hearth_weights::open_adapter(&summary.checkpoint.unwrap()).expect("opens as an adapter");
    assert_eq!((adapter.rank, adapter.alpha), (4, 8.0));
    for (name, values) in masters(&trainer) {
        assert!(name.contains(".lora_"), "{name} is trained");
        assert_eq!(adapter.tensors.read_f32(&name).expect("is there"), values);
    }
    let after: Vec<_> =
        files.tensors.tensors().iter().map(|t| files.tensors.bytes(&t.name).unwrap().to_vec()).collect();
    assert_eq!(before, after);
}

#[test]
fn old_checkpoints_are_pruned_and_damaged_ones_skipped_by_name() {
    let (files, dir) = (model("llama-mha"), tempfile::tempdir().unwrap());
    let config = saving(5, dir.path(), 1, 2);
    trainer(&files, &config).run(&[], &mut (), &GO).expect("runs");
    let names = |dir: &Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(dir.path()), ["metrics.jsonl", "step-4", "step-5", "tensorboard"]);

    let damaged = dir.path().join("step-5/optimizer.safetensors");
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    let found = search(dir.path()).expect("reads");
    assert_eq!(found.newest.expect("one is left").manifest.progress.step, 4);
    assert!(
        found.skipped[0].why.contains("optimizer.safetensors does not match its sha256"),
        "{:?}",
        found.skipped
    );

    prune(&Disk, dir.path(), 1).expect("prunes");
    assert_eq!(
        names(dir.path()),
        ["metrics.jsonl", "step-4", "step-5", "tensorboard"],
        "the newest verified stays"
    );

    let stop = AtomicBool::new(false);
    let mut observer = StopAfter(9, &stop, vec![]);
    let mut resumed =
        Trainer::resume(setup(&files, &config), config.clone(), &mut observer).expect("resumes");
    assert!(observer.2[0].contains("step-5"), "{:?}", observer.2);
    resumed.run(&[], &mut (), &GO).expect("replaces the damaged one");
    assert_eq!(search(dir.path()).unwrap().newest.unwrap().manifest.progress.step, 5);
    assert_eq!(names(dir.path()), ["metrics.jsonl", "step-4", "step-5", "tensorboard"]);
}

#[test]
fn another_run_or_another_model_is_refused_with_a_sentence() {
    let (files, dir) = (model("llama-mha"), tempfile::tempdir().unwrap());
    let config = saving(1, dir.path(), 0, 0);
    let message = |result: Result<Trainer, Error>| result.err().expect("is refused").to_string();
    let nothing = message(Trainer::resume(setup(&files, &config), config.clone(), &mut ()));
    assert!(nothing.contains("no complete checkpoint"), "{nothing}");
    trainer(&files, &config).run(&[], &mut (), &GO).expect("runs");
    let occupied = message(Trainer::new(setup(&files, &config), config.clone()));
    assert!(occupied.contains("step-1") && occupied.contains("--resume"), "{occupied}");
    let other = model("qwen3");
    let foreign = message(Trainer::resume(setup(&other, &config), config.clone(), &mut ()));
    assert!(foreign.contains("model type llama, this is qwen3"), "{foreign}");
    let adapted = TrainConfig { adapter: Some(lora()), ..config.clone() };
    let foreign = message(Trainer::resume(setup(&files, &adapted), adapted, &mut ()));
    assert!(foreign.contains("other names or shapes"), "{foreign}");

    let longer = TrainConfig { steps: 2, ..config };
    let stop = AtomicBool::new(false);
    let mut observer = StopAfter(9, &stop, vec![]);
    Trainer::resume(setup(&files, &longer), longer, &mut observer).expect("may go on for longer");
    assert!(observer.2[0].contains("steps = 2 (was 1)"), "{:?}", observer.2);
}

/// A disk that dies at the `dies_at`-th operation, each write counting as one: that operation does half its work
/// and fails, every later one fails.
struct Dying {
    operations: Arc<AtomicUsize>,
    dies_at: usize,
}

impl Dying {
    fn operation<T>(&self, work: impl FnOnce(bool) -> io::Result<T>) -> io::Result<T> {
        let dead = || io::Error::new(io::ErrorKind::StorageFull, "no space left on device");
        match self.operations.fetch_add(1, Ordering::Relaxed) {
            n if n < self.dies_at => work(true),
            n if n == self.dies_at => work(false).and_then(|_| Err(dead())),
            _ => Err(dead()),
        }
    }
}

struct DyingFile(Box<dyn Write>, Dying);

impl Write for DyingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Self(file, disk) = self;
        disk.operation(|whole| file.write(if whole { bytes } else { &bytes[..bytes.len() / 2] }))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

struct DyingFileAt(Box<dyn WriteAt>, Dying);

impl WriteAt for DyingFileAt {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let Self(file, disk) = self;
        disk.operation(|whole| file.write_at(offset, if whole { bytes } else { &bytes[..bytes.len() / 2] }))
    }
    fn sync(&mut self) -> io::Result<()> {
        let Self(file, disk) = self;
        disk.operation(|_| file.sync())
    }
}

impl Files for Dying {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.operation(|whole| if whole { Disk.create_dir(path) } else { Ok(()) })
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn Write>> {
        let disk = Dying { operations: self.operations.clone(), dies_at: self.dies_at };
        self.operation(|_| Ok(Box::new(DyingFile(Disk.create(path)?, disk)) as Box<dyn Write>))
    }
    fn allocate(&self, path: &Path, bytes: u64) -> io::Result<()> {
        self.operation(|whole| Disk.allocate(path, if whole { bytes } else { bytes / 2 }))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn WriteAt>> {
        let disk = Dying { operations: self.operations.clone(), dies_at: self.dies_at };
        self.operation(|_| Ok(Box::new(DyingFileAt(Disk.open(path)?, disk)) as Box<dyn WriteAt>))
    }
    fn sync(&self, path: &Path) -> io::Result<()> {
        self.operation(|_| Disk.sync(path))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operation(|whole| if whole { Disk.rename(from, to) } else { Ok(()) })
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.operation(|whole| if whole { Disk.remove_dir(path) } else { Ok(()) })
    }
}

#[test]
fn a_disk_that_fills_or_dies_at_any_operation_of_a_save_costs_no_earlier_checkpoint() {
    let (files, reference) = (model("llama-mha"), tempfile::tempdir().unwrap());
    let mut whole = trainer(&files, &saving(3, reference.path(), 1, 2));
    whole.run(&[], &mut (), &GO).expect("runs");
    let mut deaths = 0;
    for dies_at in (0..).step_by(7) {
        let dir = tempfile::tempdir().unwrap();
        let config = saving(3, dir.path(), 1, 2);
        let mut first = trainer(&files, &config);
        first.step().expect("a step");
        first.save().expect("saves");
        let operations = Arc::new(AtomicUsize::new(0));
        first.set_files(Arc::new(Dying { operations: operations.clone(), dies_at }));
        match first.run(&[], &mut (), &GO) {
            Ok(_) => break,
            Err(error) => {
                deaths += 1;
                assert!(error.to_string().contains("no space left on device"), "{error}");
            }
        }
        let mut second =
            Trainer::resume(setup(&files, &config), config, &mut ()).expect("an earlier one is there");
        second.run(&[], &mut (), &GO).expect("the disk is well again");
        assert_eq!(state(&second), state(&whole), "died at operation {dies_at}");
    }
    assert!(deaths > 5, "{deaths} deaths");
}
