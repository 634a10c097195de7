//! `hearth bench io|comm|adam`: what the disk, the ranks' exchange and the optimizer do in bytes per second.
//!
//! These are the figures a plan is made of, measured by the code that training runs.

use super::median;
use crate::exit::usage;
use crate::machine;
use crate::ranks::Start;
use crate::recipe::choices::Dtype;
use crate::ui::{Report, Ui, bytes, table};
use hearth_collective::{DEFAULT_TIMEOUT, Operation, Ordered, Rate, measure};
use hearth_memory::{Size, probe};
use hearth_train::optim::{StateDtype, adam_bandwidth};
use serde::Serialize;
use std::path::PathBuf;

/// Times the exchange is measured.
const RUNS: usize = 3;

/// The disk under a folder, past the page cache.
#[derive(Clone, Debug, clap::Args)]
pub struct IoBench {
    /// Folder on the disk [default: the current one]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Bytes of the temporary file: larger than the disk's own cache
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub bytes: Size,
}

/// Exchange between ranks: threads, or the processes of a launcher.
#[derive(Clone, Debug, clap::Args)]
pub struct CommBench {
    /// Ranks [default: the launcher's, 2 without one]
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Bytes of each rank's buffer
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    pub bytes: Size,
}

/// The update of AdamW in memory.
#[derive(Clone, Debug, clap::Args)]
pub struct AdamBench {
    /// Parameters
    #[arg(long, value_name = "N", default_value_t = 1 << 24)]
    pub elements: usize,
    /// Type of the moments: f32 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub state_dtype: String,
    /// Type of the copy that the model is computed with: f32 (none) or bf16
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    pub compute: String,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct RateReport {
    /// `io`, `comm` or `adam`.
    pub name: &'static str,
    /// 10⁹ bytes per second: the median of the samples. Of `io` reading and writing at once, of `comm` all_reduce.
    pub gb_s: f64,
    /// Share of `peak_gb_s`.
    pub of_peak: f64,
    /// What bounds it, measured in the same run: for `io` reading or writing alone, the faster of them; for `comm` a
    /// copy in memory; for `adam` a stream that reads and writes the same bytes.
    pub peak_gb_s: f64,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// 10⁹ bytes per second of each run.
    pub samples: Vec<f64>,
    /// What else was measured.
    #[serde(flatten)]
    pub more: More,
}

/// What only one of the benchmarks has.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum More {
    /// Of `io`.
    Io {
        /// Reading alone.
        read_gb_s: f64,
        /// Writing alone, over bytes that were written before.
        write_gb_s: f64,
        /// Whether the page cache was passed.
        direct: bool,
        /// How the disk was reached.
        backend: &'static str,
    },
    /// Of `comm`.
    Comm {
        /// Ranks.
        ranks: usize,
        /// Each operation's median.
        operations: Vec<OperationRate>,
    },
    /// Of `adam`.
    Adam {
        /// Bytes read and written per parameter.
        bytes_per_parameter: usize,
    },
}

/// The speed of one operation between ranks.
#[derive(Clone, Debug, Serialize)]
pub struct OperationRate {
    /// Its name.
    pub operation: String,
    /// Length of the longer of its input and its result on each rank.
    pub bytes: usize,
    /// Seconds it took.
    pub seconds: f64,
    /// `bytes` over `seconds`, in 10⁹.
    pub gb_s: f64,
}

/// Measures the disk.
///
/// # Errors
/// When the folder cannot be written or the disk is full.
pub fn io(args: &IoBench, ui: &Ui) -> anyhow::Result<RateReport> {
    let dir = args.dir.clone().unwrap_or_else(|| PathBuf::from("."));
    if !dir.is_dir() {
        return Err(usage(format!("--dir {}: there is no such folder", dir.display())));
    }
    ui.note(format!("measuring the disk under {} with {} …", dir.display(), bytes(args.bytes.bytes())));
    let speed = probe::disk(&dir, args.bytes.bytes())?;
    let [.., mixed] = speed.figures;
    let more = More::Io {
        read_gb_s: speed.read_gb_s,
        write_gb_s: speed.write_gb_s,
        direct: speed.direct,
        backend: speed.backend,
    };
    Ok(report("io", mixed.samples, speed.read_gb_s.max(speed.write_gb_s), more))
}

/// Measures the exchange between ranks; only rank 0 has a report.
///
/// # Errors
/// Another number of ranks than the launcher started, ranks that are lost.
pub fn comm(args: &CommBench, ui: &Ui) -> anyhow::Result<Option<RateReport>> {
    let mut start = Start::join(ui)?;
    let wanted = args.ranks.or(if start.launched().is_none() { Some(2) } else { None });
    let alone = wanted.or(start.launched()).is_some_and(|ranks| ranks < 2);
    start.agree(check(alone, args.bytes))?;
    let ranks = start.world_size(wanted)?;
    let memory = start.speaks().then(probe::memory);
    ui.note(format!("measuring the exchange between {ranks} ranks …"));
    let length = args.bytes.bytes() as usize;
    let world = start.open(ranks, DEFAULT_TIMEOUT)?;
    let measured = world.run(|| {
        move |group: Ordered| {
            (0..RUNS).map(|_| Ok(measure(&group, length)?)).collect::<anyhow::Result<Vec<Vec<Rate>>>>()
        }
    })?;
    let (Some(runs), Some(memory)) = (measured, memory) else { return Ok(None) };
    let all_reduce =
        |run: &Vec<Rate>| run.iter().find(|r| r.operation == Operation::AllReduce).map(|r| r.gb_s);
    let samples = runs.iter().filter_map(all_reduce).collect();
    let operations = (0..runs[0].len()).map(|i| operation(&runs, i)).collect();
    Ok(Some(report("comm", samples, memory.copy_gb_s, More::Comm { ranks, operations })))
}

fn check(alone: bool, bytes: Size) -> anyhow::Result<()> {
    if alone {
        return Err(usage("one rank has nobody to exchange with; give --ranks 2 or more"));
    }
    if bytes.bytes() < 1 << 10 {
        return Err(usage(format!("--bytes is {bytes}, it must be at least 1KiB")));
    }
    Ok(())
}

/// The median of all runs of operation number `i`.
fn operation(runs: &[Vec<Rate>], i: usize) -> OperationRate {
    let Rate { operation, bytes, .. } = runs[0][i];
    let seconds = median(&runs.iter().map(|run| run[i].seconds).collect::<Vec<_>>());
    OperationRate { operation: operation.to_string(), bytes, seconds, gb_s: bytes as f64 / seconds / 1e9 }
}

/// Measures AdamW.
///
/// # Errors
/// A type that has no version of it.
pub fn adam(args: &AdamBench, ui: &Ui) -> anyhow::Result<RateReport> {
    super::at_least_one("--elements", args.elements)?;
    let bf16 = |flag: &str, text: &str| match text {
        "f32" => Ok(false),
        "bf16" => Ok(true),
        _ => Err(usage(format!("{flag} is {text:?}; it must be {} or {}", Dtype::F32, Dtype::Bf16))),
    };
    let state = if bf16("--state-dtype", &args.state_dtype)? { StateDtype::Bf16 } else { StateDtype::F32 };
    let copy = bf16("--compute", &args.compute)?;
    ui.note(format!("measuring AdamW over {} parameters …", args.elements));
    let speed = adam_bandwidth(args.elements, state, copy);
    let moved = (speed.bytes_per_parameter * args.elements) as f64;
    let samples = speed.samples.iter().map(|seconds| moved / seconds / 1e9).collect();
    let more = More::Adam { bytes_per_parameter: speed.bytes_per_parameter };
    Ok(report("adam", samples, speed.stream_gb_s, more))
}

fn report(name: &'static str, samples: Vec<f64>, peak_gb_s: f64, more: More) -> RateReport {
    let gb_s = median(&samples);
    RateReport {
        name,
        gb_s,
        of_peak: gb_s / peak_gb_s,
        peak_gb_s,
        peak_rss_bytes: machine::peak_rss_bytes(),
        samples,
        more,
    }
}

impl Report for RateReport {
    fn text(&self) -> String {
        let gb_s = |x: f64| format!("{x:.2} GB/s");
        let bound = match self.more {
            More::Io { .. } => "the faster of reading and writing alone",
            More::Comm { .. } => "a copy in memory",
            More::Adam { .. } => "a stream of the same bytes",
        };
        let mut rows = vec![
            ("speed".to_owned(), gb_s(self.gb_s)),
            (
                "share of peak".into(),
                format!("{:.0} % of {} ({bound})", self.of_peak * 100.0, gb_s(self.peak_gb_s)),
            ),
        ];
        match &self.more {
            More::Io { read_gb_s, write_gb_s, direct, backend } => rows.extend([
                ("reading".into(), gb_s(*read_gb_s)),
                ("writing".into(), gb_s(*write_gb_s)),
                (
                    "page cache".into(),
                    if *direct { "passed" } else { "in between: no direct I/O here" }.into(),
                ),
                ("through".into(), (*backend).to_owned()),
            ]),
            More::Comm { operations, .. } => rows.extend(operations.iter().map(|o| {
                let text =
                    format!("{} in {:.1} ms, {}", bytes(o.bytes as u64), o.seconds * 1e3, gb_s(o.gb_s));
                (o.operation.clone(), text)
            })),
            More::Adam { bytes_per_parameter } => {
                rows.push(("per parameter".into(), format!("{bytes_per_parameter} bytes")));
            }
        }
        let samples = self.samples.iter().map(|s| format!("{s:.2}")).collect::<Vec<_>>().join("  ");
        rows.extend([("peak memory".into(), bytes(self.peak_rss_bytes)), ("samples".into(), samples)]);
        format!("{}\n{}", self.name, table(rows))
    }
}
