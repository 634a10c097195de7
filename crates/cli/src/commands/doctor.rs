//! `hearth doctor`: what this machine has and what it can do.

use crate::gpus::{self, Gpus};
use crate::ui::{Report, Ui, bytes, table};
use crate::{machine, probe};
use hearth_collective::mpi;
use hearth_memory::probe::{disk, memory};
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
    /// What it takes to run as ranks of a launcher.
    pub mpi: Mpi,
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
    /// Reading, all threads.
    pub read_gb_s: f64,
    /// Copying; bytes read and written both count.
    pub copy_gb_s: f64,
    /// Reading four streams and writing three, as AdamW does.
    pub adam_gb_s: f64,
}

/// The disk.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// Where it was measured.
    pub path: PathBuf,
    /// Long reads past the page cache, GB/s; nothing if the folder cannot be written.
    pub read_gb_s: Option<f64>,
    /// Long writes, GB/s.
    pub write_gb_s: Option<f64>,
    /// Reading and writing at once, counted together, GB/s: what an optimizer on this disk is bound by.
    pub mixed_gb_s: Option<f64>,
    /// Whether the page cache could be passed.
    pub direct: Option<bool>,
    /// How the disk was reached.
    pub backend: Option<&'static str>,
}

/// MPI.
#[derive(Clone, Debug, Serialize)]
pub struct Mpi {
    /// The library, if one was found.
    pub library: Option<PathBuf>,
    /// The launchers on the search path.
    pub launchers: Vec<PathBuf>,
    /// The launcher that started this process.
    pub launched_by: Option<&'static str>,
}

/// Measured peaks.
#[derive(Clone, Debug, Serialize)]
pub struct Peaks {
    /// f32 operations per second.
    pub flops: f64,
    /// Memory reads, GB/s.
    pub read_gb_s: f64,
    /// Disk reads and writes at once, GB/s.
    pub disk_gb_s: Option<f64>,
}

/// Bytes of the file the disk is measured with.
const DISK_BYTES: u64 = 256 << 20;

/// Looks and measures; takes a few seconds.
///
/// # Errors
/// None today; the signature is that of every command.
pub fn run(args: &DoctorArgs, ui: &Ui) -> anyhow::Result<DoctorReport> {
    ui.note("measuring this machine …");
    let folder = args.disk.clone().unwrap_or_else(std::env::temp_dir);
    let speed =
        disk(&folder, DISK_BYTES).map_err(|e| ui.note(format!("disk {}: {e}", folder.display()))).ok();
    let streams = memory();
    let (total_bytes, available_bytes) = machine::memory_bytes();
    Ok(DoctorReport {
        cpu: Cpu {
            name: machine::cpu_name(),
            threads: machine::threads(),
            features: machine::cpu_features(),
            kernels: hearth_kernels::cpu::simd::instruction_set(),
        },
        memory: Memory {
            total_bytes,
            available_bytes,
            read_gb_s: streams.read_gb_s,
            copy_gb_s: streams.copy_gb_s,
            adam_gb_s: streams.adam_gb_s,
        },
        disk: Disk {
            path: folder,
            read_gb_s: speed.as_ref().map(|s| s.read_gb_s),
            write_gb_s: speed.as_ref().map(|s| s.write_gb_s),
            mixed_gb_s: speed.as_ref().map(|s| s.mixed_gb_s),
            direct: speed.as_ref().map(|s| s.direct),
            backend: speed.as_ref().map(|s| s.backend),
        },
        gpus: gpus::look(),
        mpi: Mpi {
            library: machine::find_library(&["libmpi.so", "libmpich.so"]),
            launchers: machine::find_programs(&["mpirun", "mpiexec", "srun"]),
            launched_by: mpi::launched().map(|launch| launch.launcher),
        },
        nccl: machine::find_library(&["libnccl.so"]),
        peaks: Peaks {
            flops: probe::flops(),
            read_gb_s: streams.read_gb_s,
            disk_gb_s: speed.map(|s| s.mixed_gb_s),
        },
    })
}

impl Report for DoctorReport {
    fn text(&self) -> String {
        let path = |p: &Option<PathBuf>| p.as_ref().map_or("not found".into(), |p| p.display().to_string());
        let speed = |s: Option<f64>| s.map_or("not measured".into(), |s| format!("{s:.2} GB/s"));
        let cuda = if self.gpus.built_with_cuda { "yes" } else { "no (build with --features cuda)" };
        let reached = self.disk.backend.map(|backend| format!(" ({backend})")).unwrap_or_default();
        let launchers: Vec<String> = self.mpi.launchers.iter().map(|p| p.display().to_string()).collect();
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
            ("  reads", speed(Some(self.memory.read_gb_s))),
            ("  copies", speed(Some(self.memory.copy_gb_s))),
            ("  optimizer updates", speed(Some(self.memory.adam_gb_s))),
            ("disk", format!("{}{reached}", self.disk.path.display())),
            ("  reads", speed(self.disk.read_gb_s)),
            ("  writes", speed(self.disk.write_gb_s)),
            ("  both at once", speed(self.disk.mixed_gb_s)),
            ("gpus", self.gpus.line()),
            ("  driver", self.gpus.driver.clone().unwrap_or("not found".into())),
            ("  nvrtc", self.gpus.nvrtc.clone().unwrap_or("not found".into())),
            ("built with CUDA", cuda.to_owned()),
            ("mpi", path(&self.mpi.library)),
            ("  launchers", if launchers.is_empty() { "not found".into() } else { launchers.join(" ") }),
            ("nccl", path(&self.nccl)),
            ("peak arithmetic", format!("{:.1} GFLOP/s (f32)", self.peaks.flops / 1e9)),
        ])
    }
}
