//! Compiles every kernel for every architecture with the NVRTC at hand, prints what each takes, and fails if one spills
//! registers or keeps an array in memory: `cargo run --release -p hearth-cuda --example compile [sm_90a …]`.

use anyhow::bail;
use hearth_cuda::ARCHITECTURES;
use hearth_cuda::nvrtc::Nvrtc;
use hearth_cuda::sources::SOURCES;
use hearth_cuda::usage::{Usage, usages};
use std::collections::BTreeMap;
use std::time::Instant;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut archs: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if archs.is_empty() {
        archs = ARCHITECTURES.to_vec();
    }
    let (nvrtc, start) = (Nvrtc::open()?, Instant::now());
    let (major, minor) = nvrtc.version()?;
    println!("NVRTC {major}.{minor}; registers per kernel (static shared memory in bytes)");
    println!("{:<40} {}", "kernel", archs.iter().map(|a| format!("{a:>14}")).collect::<String>());
    let mut wrong = Vec::new();
    for source in SOURCES {
        let mut table: BTreeMap<String, Vec<Usage>> = BTreeMap::new();
        for arch in &archs {
            let compiled = nvrtc.compile(source, arch)?;
            for kernel in usages(&compiled.log) {
                if kernel.spill_bytes > 0 || kernel.stack_bytes > 0 {
                    wrong.push(format!("{arch} {kernel:?}"));
                }
                table.entry(kernel.name.clone()).or_default().push(kernel);
            }
        }
        for (name, uses) in &table {
            let cells: String = uses
                .iter()
                .map(|u| format!("{:>14}", format!("{} ({})", u.registers, u.shared_bytes)))
                .collect();
            println!("{name:<40} {cells}");
        }
        if table.is_empty() {
            bail!("{} holds no kernel", source.name);
        }
    }
    println!(
        "{} files for {} architectures in {:.1} s",
        SOURCES.len(),
        archs.len(),
        start.elapsed().as_secs_f64()
    );
    if wrong.is_empty() {
        Ok(())
    } else {
        bail!("registers spilled or arrays kept in memory:\n{}", wrong.join("\n"))
    }
}
