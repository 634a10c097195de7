//! What people see while a command runs, and how its result is shown.
//!
//! Results go to stdout: a table for people, or with `--json` exactly one JSON object. Everything else goes to
//! stderr.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A command's result: JSON for programs, text for people.
pub trait Report: Serialize {
    /// The lines for people.
    fn text(&self) -> String;

    /// A line for people on stderr, when the result itself is meant for a pipe.
    fn aside(&self) -> Option<String> {
        None
    }

    /// Whether what was looked at is as it should be; if not, the exit code is 1.
    fn ok(&self) -> bool {
        true
    }
}

/// What a process has to show that may have nothing to show: another rank does.
impl<R: Report> Report for Option<R> {
    fn text(&self) -> String {
        self.as_ref().map(Report::text).unwrap_or_default()
    }

    fn aside(&self) -> Option<String> {
        self.as_ref().and_then(Report::aside)
    }

    fn ok(&self) -> bool {
        self.as_ref().is_none_or(Report::ok)
    }
}

/// Where a command's words go. Clones fall silent together.
#[derive(Clone, Debug)]
pub struct Ui {
    json: bool,
    silent: Arc<AtomicBool>,
    terminal: bool,
}

impl Ui {
    /// For a terminal or a pipe; `json` makes [`Ui::show`] print JSON.
    pub fn new(json: bool) -> Self {
        Self { json, silent: Arc::default(), terminal: io::stderr().is_terminal() }
    }

    /// For library use: says nothing.
    pub fn silent() -> Self {
        Self { json: false, silent: Arc::new(AtomicBool::new(true)), terminal: false }
    }

    /// From now on says nothing: another rank speaks.
    pub fn hush(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// Whether the result will be JSON, so that nothing else may go to stdout.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Whether a person is watching.
    pub fn on_terminal(&self) -> bool {
        self.terminal && !self.is_silent()
    }

    /// One line on stderr. A closed stderr is nobody's loss.
    pub fn note(&self, line: impl AsRef<str>) {
        if !self.is_silent() {
            let _ = writeln!(io::stderr(), "{}", line.as_ref());
        }
    }

    /// A piece of the result itself as it comes into being, on stdout at once; nothing when JSON is wanted.
    ///
    /// # Errors
    /// When stdout cannot be written, for instance because the reader of a pipe has left.
    pub fn stream(&self, text: &str) -> io::Result<()> {
        if self.json || self.is_silent() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Prints the result.
    ///
    /// # Errors
    /// As [`Ui::stream`].
    pub fn show(&self, report: &impl Report) -> io::Result<()> {
        if self.is_silent() {
            return Ok(());
        }
        let text = if self.json { serde_json::to_string(report)? } else { report.text() };
        if !text.is_empty() {
            let mut out = io::stdout().lock();
            out.write_all(text.trim_end_matches('\n').as_bytes())?;
            out.write_all(b"\n")?;
            out.flush()?;
        }
        if let (false, Some(line)) = (self.json, report.aside()) {
            self.note(line);
        }
        Ok(())
    }

    /// A bar with the time left on a terminal, twenty lines in all otherwise.
    pub fn progress(&self, total: u64) -> Progress {
        Progress { every: (total / 20).max(1), ..self.bar(total) }
    }

    /// A bar on a terminal, nothing otherwise: for what does not take long.
    pub fn bar(&self, total: u64) -> Progress {
        let target =
            if self.on_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {elapsed} < {eta}");
        bar.set_style(style.expect("a fixed template"));
        Progress { bar, ui: self.clone(), every: 0 }
    }
}

/// How far a command is.
pub struct Progress {
    bar: ProgressBar,
    ui: Ui,
    /// Steps between lines where there is no bar; 0 = no lines.
    every: u64,
}

impl Progress {
    /// `done` of the total is done; `message` says more.
    pub fn at(&self, done: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_owned());
        let total = self.bar.length().unwrap_or(0);
        if self.every > 0
            && self.bar.is_hidden()
            && (done.is_multiple_of(self.every) || done == total || done == 1)
        {
            self.ui.note(format!("{done}/{total}  {message}"));
        }
    }

    /// A line that stays, above the bar.
    pub fn note(&self, line: &str) {
        if self.bar.is_hidden() { self.ui.note(line) } else { self.bar.suspend(|| self.ui.note(line)) }
    }

    /// Nothing more will come.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Lines of `name  value`, the values below each other.
pub fn table<N: AsRef<str>, V: AsRef<str>>(rows: impl IntoIterator<Item = (N, V)>) -> String {
    let rows: Vec<(N, V)> = rows.into_iter().collect();
    let width = rows.iter().map(|(name, _)| name.as_ref().chars().count()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{:width$}  {}\n", name.as_ref(), value.as_ref())).collect()
}

/// Bytes for people: three digits and a unit.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_readable() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 20, "1.0 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn table_values_stand_below_each_other() {
        assert_eq!(table([("a", "1"), ("long", "2")]), "a     1\nlong  2\n");
    }
}
