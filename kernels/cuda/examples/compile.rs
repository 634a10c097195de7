//! Compiles every kernel for every architecture with the NVRTC at hand, prints what each takes, and fails if one spills
//! registers or keeps an array in memory: `cargo run --release -p hearth-cuda --example compile [sm_90a …]`.

use anyhow::bail;
use hearth_cuda::ARCHITECTURES;
use hearth_cuda::cache::Cache;
use hearth_cuda::nvrtc::{Error, Nvrtc};
use hearth_cuda::sources::{SOURCES, Source};
use hearth_cuda::usage::{Usage, usages};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut archs: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if archs.is_empty() {
        archs = ARCHITECTURES.to_vec();
    }
    let (nvrtc, start) = (Nvrtc::open()?, Instant::now());
    let (major, minor) = nvrtc.version()?;
    let jobs = SOURCES.iter().flat_map(|source| archs.iter().map(move |arch| (source, *arch)));
    let table = compile(&nvrtc, jobs.collect())?;
    println!("NVRTC {major}.{minor}; registers per thread (static shared memory in bytes)");
    println!("{:<40} {}", "kernel", archs.iter().map(|a| format!("{a:>14}")).collect::<String>());
    for (name, uses) in &table {
        let cell = |arch: &&str| {
            uses.get(*arch).map_or(String::new(), |u| format!("{} ({})", u.registers, u.shared_bytes))
        };
        println!("{name:<40} {}", archs.iter().map(|a| format!("{:>14}", cell(a))).collect::<String>());
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} kernels for {} architectures in {seconds:.1} s", table.len(), archs.len());
    let all = table.iter().flat_map(|(name, uses)| uses.iter().map(move |(arch, u)| (name, arch, u)));
    let wrong: Vec<String> = all
        .filter(|(_, _, u)| u.spill_bytes > 0 || u.stack_bytes > 0)
        .map(|(name, arch, u)| {
            format!("{name} for {arch}: {} bytes spilled, {} in memory", u.spill_bytes, u.stack_bytes)
        })
        .collect();
    if wrong.is_empty() {
        Ok(())
    } else {
        bail!("registers spilled or arrays kept in memory:\n{}", wrong.join("\n"))
    }
}

/// What each kernel takes on each architecture.
type Table = BTreeMap<String, BTreeMap<String, Usage>>;

/// Compiles on every core, each file for each architecture.
fn compile(nvrtc: &Nvrtc, jobs: Vec<(&'static Source, &str)>) -> Result<Table, Error> {
    let (left, table) = (Mutex::new(jobs), Mutex::new(Table::new()));
    let cache = Cache::of_user();
    let work = || -> Result<(), Error> {
        loop {
            let Some((source, arch)) = left.lock().expect("no panic").pop() else { return Ok(()) };
            let compiled = match &cache {
                Some(cache) => cache.compile(nvrtc, source, arch)?,
                None => nvrtc.compile(source, arch)?,
            };
            for kernel in usages(&compiled.log) {
                let mut table = table.lock().expect("no panic");
                table.entry(kernel.name.clone()).or_default().insert(arch.to_owned(), kernel);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| w.join().expect("no panic"))
    })?;
    Ok(table.into_inner().expect("no panic"))
}
