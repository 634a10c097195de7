//! Cross-entropy over a chunk of logits.

use super::{Float, Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};

/// `nll[row] = −log softmax(logits)[target]`, 0 for a negative target, and `slopes = softmax − onehot`, or zeros.
/// `logits`, `slopes`: `[rows, vocab]`; `targets`, `nll`: `[rows]`. Every target is below `vocab`.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn cross_entropy<T: Float>(
    stream: &Stream,
    logits: View<'_, f32>,
    targets: View<'_, i32>,
    nll: ViewMut<'_, f64>,
    slopes: Option<ViewMut<'_, T>>,
) -> Result<(), Error> {
    let op = Op("cross_entropy");
    let rows = targets.len();
    if rows == 0 {
        return Ok(());
    }
    let vocab = op.rows("logits", logits.len(), rows)?;
    op.takes("logits", &logits, rows * vocab)?;
    op.gives("nll", &nll, rows)?;
    if let Some(slopes) = &slopes {
        op.gives("slopes", slopes, rows * vocab)?;
    }
    let slopes = slopes.map(|slopes| slopes.view());
    let name = format!("cross_entropy_{}", T::NAME);
    let arguments = arguments![logits, targets, op.int("vocab", vocab)?, nll, slopes];
    stream.launch("cross_entropy.cu", &name, op.line(rows, 256)?, arguments)
}
