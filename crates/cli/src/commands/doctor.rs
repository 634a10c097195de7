//! `hearth doctor`: what this machine has and what it can do.

use crate::ui::{Report, Ui, bytes, table};
use crate::{machine, probe};
use serde::Serialize;
use std::path::PathBuf;

/// Looks at the machine: processor, memory, disk, GPUs, MPI, NCCL and measured peaks.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DoctorArgs {
    /// Folder whose disk is measured [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub disk: Option<PathBuf>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorReport {
    /// Processor.
    pub cpu: Cpu,
    /// Memory in bytes.
    pub memory: Memory,
    /// Disk speed.
    pub disk: Disk,
    /// NVIDIA cards.
    pub gpus: Gpus,
    /// MPI library, if one was found.
    pub mpi: Option<PathBuf>,
    /// NCCL library, if one was found.
    pub nccl: Option<PathBuf>,
    /// Measured peaks.
    pub peaks: Peaks,
}

/// The processor.
#[derive(Clone, Debug, Serialize)]
pub struct Cpu {
    /// Its name.
    pub name: String,
    /// Threads that compute.
    pub threads: usize,
    /// Instruction sets that matter here.
    pub features: Vec<&'static str>,
    /// The one our kernels use.
    pub kernels: &'static str,
}

/// Memory of the machine.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// In all.
    pub total_bytes: u64,
    /// Free or easily freed.
    pub available_bytes: u64,
}

/// The disk.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// Where it was measured.
    pub path: PathBuf,
    /// Durable writes, GB/s; nothing if the folder cannot be written.
    pub write_gb_s: Option<f64>,
    /// Reads, GB/s, usually from the page cache.
    pub read_gb_s: Option<f64>,
}

/// NVIDIA cards and what it takes to use them.
#[derive(Clone, Debug, Serialize)]
pub struct Gpus {
    /// Names of the cards.
    pub cards: Vec<String>,
    /// The driver's library, if it was found.
    pub driver: Option<PathBuf>,
    /// Whether this build can use them.
    pub built_with_cuda: bool,
}

/// Measured peaks.
#[derive(Clone, Debug, Serialize)]
pub struct Peaks {
    /// f32 operations per second.
    pub flops: f64,
    /// Memory reads, GB/s.
    pub read_gb_s: f64,
    /// Durable disk writes, GB/s.
    pub disk_gb_s: Option<f64>,
}

/// Looks and measures; takes about a second.
///
/// # Errors
/// None today; the signature is that of every command.
pub fn run(args: &DoctorArgs, ui: &Ui) -> anyhow::Result<DoctorReport> {
    ui.note("measuring this machine …");
    let folder = args.disk.clone().unwrap_or_else(std::env::temp_dir);
    let speed =
        probe::disk_gb_s(&folder).map_err(|e| ui.note(format!("disk {}: {e}", folder.display()))).ok();
    let peaks = probe::peaks();
    let (total_bytes, available_bytes) = machine::memory_bytes();
    Ok(DoctorReport {
        cpu: Cpu {
            name: machine::cpu_name(),
            threads: machine::threads(),
            features: machine::cpu_features(),
            kernels: hearth_kernels::cpu::simd::instruction_set(),
        },
        memory: Memory { total_bytes, available_bytes },
        disk: Disk { path: folder, write_gb_s: speed.map(|s| s.0), read_gb_s: speed.map(|s| s.1) },
        gpus: Gpus {
            cards: machine::nvidia_cards(),
            driver: machine::find_library(&["libcuda.so"]),
            built_with_cuda: cfg!(feature = "cuda"),
        },
        mpi: machine::find_library(&["libmpi.so", "libmpich.so"]),
        nccl: machine::find_library(&["libnccl.so"]),
        peaks: Peaks { flops: peaks.flops, read_gb_s: peaks.read_gb_s, disk_gb_s: speed.map(|s| s.0) },
    })
}

impl Report for DoctorReport {
    fn text(&self) -> String {
        let path = |p: &Option<PathBuf>| p.as_ref().map_or("not found".into(), |p| p.display().to_string());
        let speed = |s: Option<f64>| s.map_or("not measured".into(), |s| format!("{s:.2} GB/s"));
        let gpus = match (&self.gpus.cards[..], &self.gpus.driver) {
            ([], None) => "none (no NVIDIA driver found)".into(),
            ([], Some(driver)) => format!("none listed (driver {})", driver.display()),
            (cards, _) => cards.join(", "),
        };
        let cuda = if self.gpus.built_with_cuda { "yes" } else { "no (build with --features cuda)" };
        table([
            ("cpu", format!("{}, {} threads", self.cpu.name, self.cpu.threads)),
            ("instruction sets", self.cpu.features.join(" ")),
            ("kernels", self.cpu.kernels.to_owned()),
            (
                "memory",
                format!(
                    "{}, {} available",
                    bytes(self.memory.total_bytes),
                    bytes(self.memory.available_bytes)
                ),
            ),
            ("disk", self.disk.path.display().to_string()),
            ("  durable writes", speed(self.disk.write_gb_s)),
            ("  reads", speed(self.disk.read_gb_s)),
            ("gpus", gpus),
            ("built with CUDA", cuda.to_owned()),
            ("mpi", path(&self.mpi)),
            ("nccl", path(&self.nccl)),
            ("peak arithmetic", format!("{:.1} GFLOP/s (f32)", self.peaks.flops / 1e9)),
            ("peak memory reads", format!("{:.1} GB/s", self.peaks.read_gb_s)),
        ])
    }
}
