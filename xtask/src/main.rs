//! Chores of the project: `cargo xtask ci` runs every check and test, `cargo xtask matrix` the long proofs,
//! `cargo xtask bench` measures hearth beside its peers, `cargo xtask gpu` makes what does so on a GPU machine.
#![forbid(unsafe_code)]

mod bench;
mod ci;
mod clients;
mod gpu;
mod nvrtc;
mod table;
mod tools;

use std::io::Write;
use std::process::ExitCode;

const USAGE: &str =
    "usage: cargo xtask ci [--real] | clients | kernels | gpu [--plain] | matrix | bench [--quick]

  ci          format, lints, tests, documentation, examples, real clients, CUDA kernels and check
  ci --real   the same, and the tests on real weights (downloads SmolLM2, 93 MB)
  clients     real clients (openai-python, LangChain, lm-eval) against the server (downloads 200 MB)
  kernels     compiles the CUDA kernels for every architecture (downloads NVRTC, 90 MB); no GPU needed
  gpu         builds a folder that checks and measures a GPU machine without Rust: run.sh in it
              --plain leaves Burn's CUDA backend out, which run.sh does not need
  matrix      every layout for 50 steps, on threads and Open MPI, and 200 kills
  bench       hearth and its peers in turns (installs torch, llama.cpp, …); rewrites docs/performance.md
              --quick, --rounds N, --threads N, --cache DIR and --model FILE go to benches/peers";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["ci"] => ci::run(false),
        ["ci", "--real"] => ci::run(true),
        ["clients"] => ci::clients(),
        ["kernels"] => ci::kernels(),
        ["gpu"] => gpu::run(false),
        ["gpu", "--plain"] => gpu::run(true),
        ["matrix"] => ci::matrix(),
        ["bench", ref options @ ..] => bench::run(options),
        ["help" | "--help" | "-h"] => {
            let _ = writeln!(std::io::stdout(), "{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
