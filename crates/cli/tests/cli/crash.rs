//! A run that is killed again and again, in the middle of whatever it does, ends in the bits of one that never was.
//!
//! Each life is a real process that saves every step and dies of SIGKILL at a random moment; the next goes on with other
//! ranks, another stage, other tiers. Now and then a bit of the newest checkpoint flips in between.

use crate::support::{folder_hashes, hearth, run, stderr, tiny_recipe};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Steps of one run; every one is saved.
const STEPS: usize = 12;

const RECIPE: &str = "keep = 3\n[train]\nsteps = 12\nglobal_batch = 4\n[optim]\nlr = 1e-2\n";

/// What the lives of a run take turns in.
const LAYOUTS: [&[&str]; 4] = [
    &[
        "parallel.data=2",
        "parallel.zero=3",
        "offload.params=nvme",
        "offload.grads=nvme",
        "offload.optim=nvme",
    ],
    &[],
    &["parallel.data=2", "parallel.zero=2", "offload.optim=cpu", "offload.grads=cpu"],
    &["parallel.data=4", "parallel.zero=1", "offload.optim=cpu", "offload.ratio=0.5"],
];

/// By when a process must have done what it is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Kills: a few, or as many as the project promises.
fn kills() -> usize {
    if std::env::var("HEARTH_LONG_MATRIX").is_ok_and(|value| value == "1") {
        return 200;
    }
    eprintln!("SKIPPED: 192 of 200 kills; HEARTH_LONG_MATRIX=1 runs them all");
    8
}

/// xorshift64*: the moments are the same on every run, as far as the machine's own time allows.
struct Random(u64);

impl Random {
    /// One of `0..end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

/// What came of the kills.
#[derive(Debug, Default)]
struct Figures {
    kills: usize,
    /// Kills that left a checkpoint half written.
    mid_save: usize,
    /// Kills before the first checkpoint of a run was complete.
    before_the_first: usize,
    /// Bits that were flipped, each named when it was skipped.
    flipped: usize,
    runs: usize,
}

/// One run, from its first life to its last.
struct Run {
    folder: tempfile::TempDir,
    recipe: String,
    lives: usize,
}

impl Run {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let recipe = tiny_recipe(folder.path(), RECIPE);
        Self { folder, recipe, lives: 0 }
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The complete checkpoints' steps, oldest first.
    fn saved(&self) -> Vec<usize> {
        let entries = fs::read_dir(self.dir()).into_iter().flatten().flatten();
        let step = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
        let mut steps: Vec<usize> = entries.filter_map(step).collect();
        steps.sort_unstable();
        steps
    }

    fn half_written(&self) -> bool {
        let mut entries = fs::read_dir(self.dir()).into_iter().flatten().flatten();
        entries.any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
    }

    fn metrics(&self) -> String {
        fs::read_to_string(self.dir().join("metrics.jsonl")).unwrap_or_default()
    }

    fn said_path(&self) -> PathBuf {
        self.folder.path().join("stderr")
    }

    fn said(&self) -> String {
        fs::read_to_string(self.said_path()).unwrap_or_default()
    }

    /// The arguments of the next life.
    fn arguments(&self) -> Vec<String> {
        let nvme = format!("offload.nvme_path={}", self.folder.path().join("nvme").display());
        let mut arguments = vec!["train".to_owned(), self.recipe.clone()];
        let every = "checkpoint.every=1".to_owned();
        let keys = LAYOUTS[self.lives % LAYOUTS.len()].iter().map(|key| key.to_string());
        arguments.extend(keys.chain([nvme, every]).flat_map(|key| ["--set".to_owned(), key]));
        arguments.extend((!self.saved().is_empty()).then(|| "--resume".to_owned()));
        arguments
    }

    fn start(&mut self) -> Child {
        let arguments = self.arguments();
        self.lives += 1;
        let said = File::create(self.said_path()).expect("a file");
        let mut command = hearth(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        command.stdout(Stdio::null()).stderr(said).spawn().expect("the binary starts")
    }

    /// Lives on to the end.
    fn finish(&mut self) {
        let status = self.start().wait().expect("ends");
        assert!(status.success(), "{}", self.said());
    }

    /// Flips a bit of the newest checkpoint, if another one is there, and says which checkpoint.
    fn flip_a_bit(&self, random: &mut Random) -> Option<PathBuf> {
        let [.., _, newest] = self.saved()[..] else { return None };
        let newest = self.dir().join(format!("step-{newest}"));
        let names = ["model.safetensors", "optimizer.safetensors", "config.json", "checkpoint.json"];
        let path = newest.join(names[random.below(4) as usize]);
        let mut bytes = fs::read(&path).expect("part of a checkpoint");
        let bit = random.below(8 * bytes.len() as u64) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, bytes).expect("written");
        Some(newest)
    }
}

/// Waits until `is_so`, or until the process has ended; whether it is alive.
fn alive_until(child: &mut Child, is_so: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while !is_so() {
        if child.try_wait().expect("a child").is_some() {
            return false;
        }
        assert!(begun.elapsed() < PATIENCE, "the process gets there");
        thread::yield_now();
    }
    true
}

/// Lets a life reach a random moment and kills it there; false when it ended before that.
fn live_and_die(run: &mut Run, damaged: Option<&Path>, random: &mut Random, step: Duration) -> bool {
    let lines = run.metrics().lines().count();
    let mut child = run.start();
    if let Some(damaged) = damaged {
        let notice = format!("skipped checkpoint {}", damaged.display());
        let alive = alive_until(&mut child, || run.said().contains(&notice));
        assert!(alive || run.said().contains(&notice), "{notice}: {}", run.said());
    }
    // Some die while they start; the others in their first steps, which begin when the metrics change.
    let moment = match random.below(5) {
        0 => random.below(4 * step.as_micros() as u64),
        _ => {
            let more = random.below(3) as usize;
            // A resume cuts the lines of the steps that it repeats.
            let last = run.saved().last().copied().unwrap_or(0).min(lines);
            alive_until(&mut child, || run.metrics().lines().count() > last + more);
            random.below(2 * step.as_micros() as u64)
        }
    };
    thread::sleep(Duration::from_micros(moment));
    child.kill().expect("kill works");
    !child.wait().expect("ends").success()
}

/// What must be the same at the end: the last checkpoint's files, and every step's loss and norm.
fn ending(run: &Run) -> (Vec<(String, Vec<u8>)>, Vec<Value>) {
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("one object a line");
        ["step", "loss", "grad_norm"].map(|key| line[key].clone()).to_vec().into()
    };
    let metrics = run.metrics().lines().map(line).collect();
    (folder_hashes(&run.dir().join(format!("step-{STEPS}"))), metrics)
}

#[test]
fn a_run_killed_at_random_moments_ends_in_the_bits_of_an_uninterrupted_one() {
    let mut whole = Run::new();
    let begun = Instant::now();
    whole.finish();
    let step = begun.elapsed() / STEPS as u32;
    let expected = ending(&whole);
    let (wanted, mut figures, mut random) = (kills(), Figures::default(), Random(0x9e37_79b9_7f4a_7c15));
    while figures.kills < wanted {
        let mut current = Run::new();
        // Runs begin in different layouts.
        current.lives = figures.runs;
        figures.runs += 1;
        let mut damaged = None;
        while figures.kills < wanted && current.saved().last() != Some(&STEPS) {
            let died = live_and_die(&mut current, damaged.take().as_deref(), &mut random, step);
            if !died {
                break;
            }
            figures.kills += 1;
            figures.mid_save += usize::from(current.half_written());
            figures.before_the_first += usize::from(current.saved().is_empty());
            damaged = if figures.kills % 4 == 0 { current.flip_a_bit(&mut random) } else { None };
            figures.flipped += usize::from(damaged.is_some());
        }
        current.finish();
        if let Some(damaged) = &damaged {
            let notice = format!("skipped checkpoint {}", damaged.display());
            assert!(current.said().contains(&notice), "{notice}: {}", current.said());
        }
        assert_eq!(ending(&current), expected, "{figures:?}");
    }
    println!("{figures:?}");
    assert!(figures.mid_save > 0 && figures.flipped > 0, "{figures:?}");
    let dir = whole.dir().display().to_string();
    assert!(run(&["ckpt", "verify", &dir]).status.success(), "{}", stderr(&run(&["ckpt", "verify", &dir])));
}
