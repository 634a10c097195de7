//! `hearth replay`: recorded requests once more, and whether their tokens are the same.

use crate::commands::serve::recorder::Line;
use crate::exit::usage;
use crate::fingerprint::fingerprint;
use crate::running::{ModelArgs, Running, SpeculationArgs};
use crate::ui::{Report, Ui, table};
use anyhow::Context;
use hearth_engine::EngineConfig;
use hearth_server::Service;
use hearth_server::replay::{Replayed, replay};
use serde::Serialize;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Generates recorded requests again; they must give their tokens exactly, at any load.
#[derive(Clone, Debug, clap::Args)]
pub struct ReplayArgs {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// What `hearth serve --record` wrote
    #[arg(long, value_name = "FILE")]
    pub from: PathBuf,
    /// Only the answer or request with this id
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// Sequences in the batch at once
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub max_seqs: usize,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct ReplayReport {
    /// Sequences generated again.
    pub replayed: usize,
    /// Tokens compared.
    pub tokens: usize,
    /// Whether all were equal.
    pub equal: bool,
    /// Those that were not.
    pub differing: Vec<Difference>,
}

/// A sequence that came out differently.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// The answer's id.
    pub id: String,
    /// Its number in the request.
    pub sequence: usize,
    /// What is different.
    pub what: String,
}

/// Replays.
///
/// # Errors
/// A file that cannot be read, records of other weights, a model that cannot be loaded.
pub fn run(args: &ReplayArgs, ui: &Ui) -> anyhow::Result<ReplayReport> {
    if args.max_seqs == 0 {
        return Err(usage("--max-seqs is 0, it must be at least 1"));
    }
    let lines = read(&args.from, args.id.as_deref())?;
    let config = EngineConfig { max_seqs: args.max_seqs, ..EngineConfig::default() };
    let Running { model, engine, adapters } =
        Running::start_serving(&args.model, &SpeculationArgs::default(), config, ui)?;
    let weights = fingerprint(&model.files)?;
    if let Some(other) = lines.iter().find(|line| line.weights != weights) {
        return Err(usage(format!(
            "{} was recorded with other weights ({:.12}…, these are {weights:.12}…)",
            other.id, other.weights
        )));
    }
    let eos_tokens = model.eos_tokens();
    let service =
        Service { engine, tokenizer: model.tokenizer, template: model.template, eos_tokens, adapters };
    let differing = compare(&service, &lines, args.max_seqs)?;
    service.engine.shutdown();
    Ok(ReplayReport {
        replayed: lines.len(),
        tokens: lines.iter().map(|line| line.content.content.tokens.len()).sum(),
        equal: differing.is_empty(),
        differing,
    })
}

fn read(path: &Path, id: Option<&str>) -> anyhow::Result<Vec<Line>> {
    let file = File::open(path).map_err(|e| usage(format!("cannot read {}: {e}", path.display())))?;
    let mut lines = Vec::new();
    for (number, text) in BufReader::new(file).lines().enumerate() {
        let at = || format!("{} line {}", path.display(), number + 1);
        let text = text.with_context(at)?;
        if text.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&text).with_context(at)?;
        if id.is_none_or(|id| line.id == id || line.request_id == id) {
            lines.push(line);
        }
    }
    match (lines.is_empty(), id) {
        (true, Some(id)) => Err(usage(format!("{} has no record of {id}", path.display()))),
        (true, None) => Err(usage(format!("{} has no records", path.display()))),
        _ => Ok(lines),
    }
}

/// Several at a time, in whatever company they come.
fn compare(service: &Service, lines: &[Line], at_once: usize) -> anyhow::Result<Vec<Difference>> {
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Ok(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..at_once.min(lines.len()) {
            scope.spawn(|| {
                while let Some(line) = lines.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = one(service, line);
                    let mut found = found.lock().unwrap_or_else(|e| e.into_inner());
                    match (outcome, &mut *found) {
                        (Ok(difference), Ok(list)) => list.extend(difference),
                        (Err(error), _) => *found = Err(error),
                        (Ok(_), Err(_)) => {}
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(|e| e.into_inner())
}

fn one(service: &Service, line: &Line) -> anyhow::Result<Option<Difference>> {
    let content = &line.content.content;
    // A stop string, a cancellation or a failure ends a sequence from outside: then only its tokens are compared.
    let by_itself = line.end == "length" && content.tokens.len() == content.max_tokens;
    let replayed =
        replay(service, content, by_itself).with_context(|| format!("{} cannot be replayed", line.id))?;
    let token = |token: Option<u32>| token.map_or("the end".to_owned(), |id| format!("token {id}"));
    Ok(match replayed {
        Replayed::Equal => None,
        Replayed::Differs { at, recorded, now } => Some(Difference {
            id: line.id.clone(),
            sequence: line.sequence,
            what: format!("at {at}: {} was recorded, now it is {}", token(recorded), token(now)),
        }),
    })
}

impl Report for ReplayReport {
    fn text(&self) -> String {
        let mut rows = vec![
            ("replayed", format!("{} sequences, {} tokens", self.replayed, self.tokens)),
            ("equal", if self.equal { "all of them" } else { "no" }.to_owned()),
        ];
        rows.extend(
            self.differing
                .iter()
                .take(20)
                .map(|d| ("differs", format!("{}[{}] {}", d.id, d.sequence, d.what))),
        );
        table(rows)
    }

    fn ok(&self) -> bool {
        self.equal
    }
}
