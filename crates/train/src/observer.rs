//! Who watches a run.

use crate::metrics::StepReport;
use std::path::Path;

/// Is told what happens. Every method does nothing by default.
pub trait Observer {
    /// A step is done.
    fn step(&mut self, _report: &StepReport) {}
    /// A checkpoint is on disk.
    fn saved(&mut self, _path: &Path) {}
    /// Something the user should know that stops nothing.
    fn notice(&mut self, _sentence: &str) {}
}

/// Watches nothing.
impl Observer for () {}
