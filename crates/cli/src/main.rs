//! The `hearth` binary: parses the command line, calls the library, prints the result.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use hearth::commands::{
    bench, chat, ckpt, convert, doctor, eval, fetch_data, generate, gpu, inspect, logits, plan, quickstart,
    replay, serve, train, verify,
};
use hearth::exit::{self, Said, say};
use hearth::machine;
use hearth::ui::{Report, Ui};
use hearth_memory::heap::CountingAllocator;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::process::ExitCode;

/// What is really allocated can be held against what a plan says.
#[global_allocator]
static HEAP: CountingAllocator = CountingAllocator;

/// One binary for a language model's whole way: fine-tune, convert, serve.
#[derive(Parser)]
#[command(name = "hearth", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print exactly one JSON object on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Threads that compute [default: one per physical core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

#[derive(Subcommand)]
enum Command {
    /// Fetches a small model and dialogues, fine-tunes, converts, serves and asks three questions
    Quickstart(quickstart::QuickstartArgs),
    /// Trains as a recipe says
    Train(train::TrainArgs),
    /// Says what a recipe's run will hold in every tier, and how long its steps will take
    Plan(plan::PlanArgs),
    /// Compares a recipe's ranks, stages and tiers with one plain rank, bit for bit
    Verify(verify::VerifyArgs),
    /// Looks at data
    #[command(subcommand)]
    Data(DataCommand),
    /// Quantizes a model, merges an adapter, writes a bundle, safetensors or GGUF
    Convert(convert::ConvertArgs),
    /// Continues a prompt
    Generate(generate::GenerateArgs),
    /// Talks with a model
    Chat(chat::ChatArgs),
    /// Measures a model on a text
    Eval(eval::EvalArgs),
    /// Prints the logits after tokens
    Logits(logits::LogitsArgs),
    /// Answers over an OpenAI-compatible HTTP API
    Serve(serve::ServeArgs),
    /// Generates recorded requests again and compares their tokens
    Replay(replay::ReplayArgs),
    /// Measures speed against this machine's own peak
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Looks at, checks, exports and thins out checkpoints
    #[command(subcommand)]
    Ckpt(ckpt::CkptCommand),
    /// Checks and measures the kernels on an NVIDIA card
    #[command(subcommand)]
    Gpu(gpu::GpuCommand),
    /// Looks at this machine
    Doctor(doctor::DoctorArgs),
}

#[derive(Subcommand)]
enum DataCommand {
    /// Shows what the trainer will see, with the trained tokens marked
    Inspect(inspect::InspectArgs),
    /// Fetches a small real data set, to try a recipe with
    Fetch(fetch_data::FetchDataArgs),
}

fn main() -> ExitCode {
    panic::set_hook(Box::new(report_bug));
    let result = panic::catch_unwind(AssertUnwindSafe(|| match parse() {
        Ok(cli) => run(&cli).unwrap_or_else(|error| fail(&error)),
        Err(code) => code,
    }));
    // The hook has said what happened.
    result.unwrap_or(ExitCode::FAILURE)
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let ui = Ui::new(cli.json);
    if let Some(warning) = machine::compute_on(cli.threads.map(usize::from))? {
        ui.note(warning);
    }
    match &cli.command {
        Command::Quickstart(args) => show(&quickstart::run(args, &ui)?, &ui),
        Command::Train(args) => show(&train::run(args, &ui)?, &ui),
        Command::Plan(args) => match &args.serve {
            Some(model) => show(&plan::serving::run(model, args, &ui)?, &ui),
            None => show(&plan::run(args, &ui)?, &ui),
        },
        Command::Verify(args) => show(&verify::run(args, &ui)?, &ui),
        Command::Data(DataCommand::Inspect(args)) => show(&inspect::run(args, &ui)?, &ui),
        Command::Data(DataCommand::Fetch(args)) => show(&fetch_data::run(args, &ui)?, &ui),
        Command::Convert(args) => show(&convert::run(args, &ui)?, &ui),
        Command::Generate(args) => show(&generate::run(args, &ui)?, &ui),
        Command::Chat(args) => show(&chat::run(args, &ui)?, &ui),
        Command::Eval(args) => show(&eval::run(args, &ui)?, &ui),
        Command::Logits(args) => show(&logits::run(args, &ui)?, &ui),
        Command::Serve(args) => show(&serve::run(args, &ui)?, &ui),
        Command::Replay(args) => show(&replay::run(args, &ui)?, &ui),
        Command::Bench(command) => show(&bench::run(command, &ui)?, &ui),
        Command::Ckpt(command) => show(&ckpt::run(command, &ui)?, &ui),
        Command::Gpu(command) => show(&gpu::run(command, &ui)?, &ui),
        Command::Doctor(args) => show(&doctor::run(args, &ui)?, &ui),
    }
}

fn show(report: &impl Report, ui: &Ui) -> anyhow::Result<ExitCode> {
    ui.show(report)?;
    Ok(if report.ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn fail(error: &anyhow::Error) -> ExitCode {
    if exit::is_broken_pipe(error) {
        return ExitCode::SUCCESS; // nobody reads on, which is their right
    }
    if !error.is::<Said>() {
        say(&exit::sentence(error));
    }
    ExitCode::from(exit::code(error))
}

/// Help and version go to stdout; what is wrong with the command line becomes one sentence and exit code 2.
fn parse() -> Result<Cli, ExitCode> {
    Cli::try_parse().map_err(|error| {
        if !error.use_stderr() {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        say(&exit::usage_sentence(&error.to_string()));
        ExitCode::from(2)
    })
}

fn report_bug(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let words =
        payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    let words = words.unwrap_or("no reason given").split_whitespace().collect::<Vec<_>>().join(" ");
    let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
    say(&format!("this is a bug in hearth: {words}{place}"));
}
