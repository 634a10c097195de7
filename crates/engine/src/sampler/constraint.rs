//! What the output must conform to. The engine knows no grammar: it asks before and tells after every token.

use std::fmt;
use std::sync::Arc;

/// One sequence's way through a grammar. It may depend on the tokens taken and on nothing else, so that constrained
/// output too does not depend on who shares the batch. Errors are sentences; they end the sequence.
pub trait Constraint: Send {
    /// Sets the logits of tokens that must not come next to −∞. `logits`: `[vocab]`.
    ///
    /// # Errors
    /// When the grammar cannot go on.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes the token that was chosen. `true` when the output is complete and nothing may follow.
    ///
    /// # Errors
    /// When the grammar cannot go on.
    fn advance(&mut self, token: u32) -> Result<bool, String>;
}

/// Begins sequences.
pub trait ConstraintSource: Send + Sync {
    /// A constraint at the beginning of the output.
    ///
    /// # Errors
    /// A sentence that says why there is none.
    fn begin(&self) -> Result<Box<dyn Constraint>, String>;
}

/// A grammar for any number of sequences.
#[derive(Clone)]
pub struct Grammar(Arc<dyn ConstraintSource>);

impl Grammar {
    /// Wraps a source.
    pub fn new(source: impl ConstraintSource + 'static) -> Self {
        Self(Arc::new(source))
    }

    pub(crate) fn begin(&self) -> Result<Box<dyn Constraint>, String> {
        self.0.begin()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

/// The very same grammar.
impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
