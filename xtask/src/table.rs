//! The table of hearth beside its peers: read from the scripts' JSON, written as Markdown between two markers.

use anyhow::{Context, bail};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The line before the table.
const BEGIN: &str = "<!-- cargo xtask bench: begin -->";
/// The line after it.
const END: &str = "<!-- cargo xtask bench: end -->";

/// What scripts found.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Comparisons, in order.
    pub rows: Vec<Row>,
    /// Version of every peer that ran.
    pub peers: BTreeMap<String, String>,
    /// A sentence for each thing that was not measured.
    pub notes: Vec<String>,
}

impl Measured {
    /// Adds what another script found.
    pub fn append(&mut self, mut other: Measured) {
        self.rows.append(&mut other.rows);
        self.peers.append(&mut other.peers);
        self.notes.append(&mut other.notes);
    }
}

/// One comparison: medians and spreads of samples taken in turns.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    work: String,
    unit: String,
    peer_name: String,
    hearth: f64,
    peer: f64,
    /// hearth's figure over the peer's.
    ratio: f64,
    /// What the ratio must reach, or stay under; none on rows that are there for orientation.
    bar: Option<f64>,
    higher_is_better: bool,
    met: Option<bool>,
    /// Interquartile range over the median.
    hearth_spread: f64,
    peer_spread: f64,
    hearth_samples: Vec<f64>,
    peer_samples: Vec<f64>,
}

impl Row {
    fn line(&self) -> String {
        let sign = if self.higher_is_better { '≥' } else { '≤' };
        let bar = self.bar.map_or(String::new(), |bar| format!("{sign} {bar}"));
        let met = match self.met {
            None => "",
            Some(true) => "yes",
            Some(false) => "**no**",
        };
        // Perplexities lie within a thousandth of each other.
        let ratio =
            if self.unit.is_empty() { format!("{:.4}", self.ratio) } else { format!("{:.2}", self.ratio) };
        let hearth = figure(self.hearth, &self.unit, self.hearth_spread, self.hearth_samples.len());
        let peer = figure(self.peer, &self.unit, self.peer_spread, self.peer_samples.len());
        format!("| {} | {hearth} | {}: {peer} | {ratio} | {bar} | {met} |", self.work, self.peer_name)
    }
}

/// A median with its unit and, where there were several samples, its spread.
fn figure(median: f64, unit: &str, spread: f64, samples: usize) -> String {
    let digits = match median.abs() {
        m if m >= 100.0 && !unit.is_empty() => 0,
        m if m >= 10.0 && !unit.is_empty() => 1,
        _ => 3,
    };
    let spread = if samples > 1 { format!(" ({:.0} %)", spread * 100.0) } else { String::new() };
    let space = if unit.is_empty() { "" } else { " " };
    format!("{median:.digits$}{space}{unit}{spread}")
}

/// The sentence about conditions, the table, what is missing.
pub fn render(conditions: &str, found: &Measured) -> String {
    let versions: Vec<String> =
        found.peers.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let mut lines = vec![
        format!("{conditions} Peers: {}.", versions.join(", ")),
        String::new(),
        "| work | hearth | peer | ratio | bar | met |".to_owned(),
        "|---|---|---|---|---|---|".to_owned(),
    ];
    lines.extend(found.rows.iter().map(Row::line));
    if !found.notes.is_empty() {
        lines.extend([String::new(), "Not measured:".to_owned(), String::new()]);
        lines.extend(found.notes.iter().map(|note| format!("- {}", note.replace('\n', " "))));
    }
    lines.join("\n")
}

/// The page with `text` between its markers.
pub fn replace(page: &str, text: &str) -> anyhow::Result<String> {
    let (before, rest) =
        page.split_once(BEGIN).with_context(|| format!("the page lacks the line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("the page lacks the line {END}"))?;
    if after.contains(BEGIN) || after.contains(END) || before.contains(END) {
        bail!("the page has the lines {BEGIN} and {END} more than once or out of order");
    }
    Ok(format!("{before}{BEGIN}\n{text}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ratio: f64, bar: Option<f64>, met: Option<bool>) -> Row {
        Row {
            work: "decode".to_owned(),
            unit: "tok/s".to_owned(),
            peer_name: "llama.cpp".to_owned(),
            hearth: 120.0,
            peer: 100.0,
            ratio,
            bar,
            higher_is_better: true,
            met,
            hearth_spread: 0.05,
            peer_spread: 0.104,
            hearth_samples: vec![120.0; 5],
            peer_samples: vec![100.0; 5],
        }
    }

    #[test]
    fn a_row_gives_medians_spreads_ratio_bar_and_verdict() {
        let met = row(1.2, Some(1.15), Some(true)).line();
        assert_eq!(met, "| decode | 120 tok/s (5 %) | llama.cpp: 100 tok/s (10 %) | 1.20 | ≥ 1.15 | yes |");
        assert!(row(1.0, Some(1.15), Some(false)).line().ends_with("| 1.00 | ≥ 1.15 | **no** |"));
        assert!(row(1.0, None, None).line().ends_with("| 1.00 |  |  |"));
    }

    #[test]
    fn what_is_missing_is_said_under_the_table() {
        let notes = vec!["torch cannot be\ninstalled".to_owned()];
        let peers = BTreeMap::from([("torch".to_owned(), "2.15".to_owned())]);
        let text = render("Today.", &Measured { rows: vec![], peers, notes });
        assert!(text.starts_with("Today. Peers: torch 2.15.\n\n| work |"), "{text}");
        assert!(text.ends_with("Not measured:\n\n- torch cannot be installed"), "{text}");
    }

    #[test]
    fn a_page_without_one_pair_of_markers_is_refused() {
        let page = format!("a\n{BEGIN}\nold\n{END}\nz\n");
        assert_eq!(replace(&page, "new").unwrap(), format!("a\n{BEGIN}\nnew\n{END}\nz\n"));
        for bad in ["".to_owned(), BEGIN.to_owned(), format!("{END}{BEGIN}"), format!("{page}{page}")] {
            assert!(replace(&bad, "new").is_err(), "{bad}");
        }
    }
}
