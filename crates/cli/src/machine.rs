//! What the operating system says about this machine and this process.

use hearth_kernels::cpu::simd;
use std::fs;
use std::path::{Path, PathBuf};

/// Largest resident memory of this process so far, in bytes; 0 where the system does not say.
pub fn peak_rss_bytes() -> u64 {
    kib_line("/proc/self/status", "VmHWM:").unwrap_or(0)
}

/// Resident memory of this process now, in bytes; 0 where the system does not say.
pub fn rss_bytes() -> u64 {
    kib_line("/proc/self/status", "VmRSS:").unwrap_or(0)
}

/// Memory of the machine in bytes, total and available.
pub fn memory_bytes() -> (u64, u64) {
    let line = |name| kib_line("/proc/meminfo", name).unwrap_or(0);
    (line("MemTotal:"), line("MemAvailable:"))
}

/// A line such as `VmHWM:  123 kB`, in bytes.
fn kib_line(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let kib = text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?;
    kib.parse::<u64>().ok()?.checked_mul(1024)
}

/// The processor's name.
pub fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Those of the instruction sets we care about that the processor has.
pub fn cpu_features() -> Vec<&'static str> {
    const WANTED: [&str; 11] = [
        "sse4_2",
        "avx",
        "f16c",
        "fma",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "amx_tile",
    ];
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("flags") || l.starts_with("Features")).unwrap_or_default();
    let flags: Vec<&str> = line.split_whitespace().collect();
    WANTED.into_iter().filter(|f| flags.contains(f)).collect()
}

/// Threads that compute.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Cores this process may use: physical ones, for two threads of a core share its arithmetic.
fn cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    num_cpus::get_physical().clamp(1, allowed)
}

/// Computes on `threads` threads, or on one per physical core (`RAYON_NUM_THREADS` says otherwise). Must come before
/// anything is computed. Returns what the user should know.
///
/// # Errors
/// When something was computed already.
pub fn compute_on(threads: Option<usize>) -> anyhow::Result<Option<String>> {
    let given = threads.or_else(|| std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok().filter(|n| *n > 0));
    let (threads, cores) = (given.unwrap_or_else(cores), cores());
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    if threads > cores {
        return Ok(Some(format!(
            "{threads} threads share {cores} cores: expect it to be slower, not faster"
        )));
    }
    let portable = simd::level() == simd::Level::Portable;
    Ok(portable.then(|| format!("kernels: {}", simd::instruction_set())))
}

/// Those of the programs that a shell would find, in the order of their names here.
pub fn find_programs(names: &[&str]) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let find = |name: &&str| folders.iter().map(|folder| folder.join(name)).find(|file| file.is_file());
    names.iter().filter_map(find).collect()
}

/// The first shared library whose file name starts with one of `prefixes`, where the loader would look.
pub fn find_library(prefixes: &[&str]) -> Option<PathBuf> {
    library_folders().into_iter().find_map(|folder| first_match(&folder, prefixes))
}

fn first_match(folder: &Path, prefixes: &[&str]) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            prefixes.iter().any(|p| name.starts_with(p))
        })
        .collect();
    found.sort();
    found.into_iter().next()
}

fn library_folders() -> Vec<PathBuf> {
    let path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).filter(|p| p.is_absolute()).collect();
    let arch = std::env::consts::ARCH;
    folders.extend([
        format!("/usr/lib/{arch}-linux-gnu").into(),
        format!("/lib/{arch}-linux-gnu").into(),
        "/usr/lib64".into(),
        "/lib64".into(),
        "/usr/lib".into(),
        "/usr/local/lib".into(),
        "/usr/local/cuda/lib64".into(),
        format!("/usr/lib/{arch}-linux-gnu/openmpi/lib").into(),
        "/usr/lib64/openmpi/lib".into(),
        "/usr/lib64/mpich/lib".into(),
        "/usr/lib/wsl/lib".into(),
    ]);
    folders
}

/// Folder for things that can be fetched again: `$XDG_CACHE_HOME/hearth` or `~/.cache/hearth`.
pub fn cache_dir() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let root = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(root.join("hearth"))
}
