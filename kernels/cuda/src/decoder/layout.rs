//! Which rows a step has, where they lie and how they are attended.

use super::{Capacity, Part, Shape, Wanted, blocks_of};
use crate::ops::paged::Stretch;

/// Most rows that meet the output matrix at once: rows × vocabulary is far more than the model's other values.
pub const HEAD_ROWS: usize = 64;

/// A row that something is wanted of.
#[derive(Clone, Copy, Debug)]
pub(super) struct WantedRow {
    pub part: usize,
    /// In its part.
    pub index: usize,
    /// In the step.
    pub row: u32,
}

/// Sequences with at least so many rows in a step read their keys together; the rows of others are a block of threads each,
/// which spreads long sequences over the card. The bits are the same.
pub const PROMPT_ROWS: usize = 16;

/// Which rows a step has, and where.
pub(super) struct Layout {
    pub rows: usize,
    /// Numbers of the parts in the order of their rows: those of few rows first.
    pub order: Vec<usize>,
    /// Rows at the front that are attended one by one.
    pub singles: usize,
    /// How the others are.
    pub stretches: Vec<Stretch>,
    /// In the order of rows.
    pub wanted: Vec<WantedRow>,
    /// Whether all of them want logits.
    logits_alone: bool,
}

impl Layout {
    pub fn of(parts: &[Part<'_>], shape: &Shape, capacity: &Capacity) -> Self {
        let is_prompt = |part: &Part<'_>| part.rows(shape) >= PROMPT_ROWS;
        let mut order: Vec<usize> = (0..parts.len()).collect();
        order.sort_by_key(|&number| is_prompt(&parts[number]));
        let logits_alone = parts.iter().all(|part| part.what == Wanted::Logits || part.wanted.is_empty());
        let singles = parts.iter().filter(|part| !is_prompt(part)).map(|part| part.rows(shape)).sum();
        let (mut rows, mut stretches, mut wanted) = (0, Vec::new(), Vec::new());
        for (place, &number) in order.iter().enumerate() {
            let part = &parts[number];
            let row = |index: usize| WantedRow { part: number, index, row: (rows + index) as u32 };
            wanted.extend(part.wanted.clone().map(row));
            if is_prompt(part) {
                stretches.extend(stretches_of(part, rows, place * blocks_of(capacity.context), shape));
            }
            rows += part.rows(shape);
        }
        Self { rows, order, singles, stretches, wanted, logits_alone }
    }

    /// Whether each part is one row whose logits are wanted, and the output matrix takes them all.
    pub fn is_plain(&self, parts: &[Part<'_>]) -> bool {
        self.head_is_sent() && self.wanted.len() == parts.len() && self.rows == parts.len()
    }

    /// Whether the step's own kernels end with the output matrix over every row.
    pub fn head_is_sent(&self) -> bool {
        self.logits_alone && self.wanted.len() == self.rows && self.rows <= HEAD_ROWS
    }
}

/// What blocks of threads take of a part whose rows begin at `row` and whose table lies at `table`.
fn stretches_of(
    part: &Part<'_>,
    row: usize,
    table: usize,
    shape: &Shape,
) -> impl Iterator<Item = Stretch> + use<> {
    let (attention, rows, position) = (shape.attention(0), part.rows(shape), part.position);
    let stretch = move |first: usize| Stretch {
        row: row as u32,
        rows: rows as u32,
        position: position as u32,
        table: table as u32,
        first: (first * attention.queries_at_once()) as u32,
    };
    (0..attention.stretches(rows)).map(stretch)
}
