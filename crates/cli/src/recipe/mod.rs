//! The recipe: one TOML file says everything about a run.
//!
//! # Layout
//! - [`tables`]: the keys, their defaults and meanings.
//! - [`choices`]: values that are one of a few names.
//! - `read`: files, `extends`, `--set` and relative paths.
//! - `optim`: which optimizer has which keys.
//! - `keys`: unknown keys and the nearest right ones.
//! - `check`: contradictions, and what this version cannot serve yet.
//!
//! # Paths
//! A relative `model.path` or `data.path` is looked for in the folder of the recipe file that says it, then in the
//! current directory; one from `--set` the other way round. `extends` is relative to its file, `checkpoint.dir` to
//! the current directory.

mod check;
pub mod choices;
mod keys;
mod optim;
mod read;
pub mod tables;

pub use tables::Recipe;

use std::path::Path;

/// What is wrong with a recipe, in one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {sentence}")]
pub struct RecipeError {
    /// The file or option, with the line where known.
    origin: String,
    /// What is wrong and what to do.
    sentence: String,
}

impl RecipeError {
    fn new(origin: &str, sentence: String) -> Self {
        Self { origin: origin.to_owned(), sentence }
    }
}

impl Recipe {
    /// Reads a recipe, what it extends, and overrides such as `train.steps=5`, and checks all of it.
    ///
    /// # Errors
    /// One sentence that names the file, the key, the value and what to change.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, RecipeError> {
        let origin = path.display().to_string();
        let recipe = read::typed(read::merged(path, overrides)?, &origin)?;
        recipe.checked(&origin)
    }

    /// Reads a recipe that is not in a file; it cannot extend another one.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn parse(text: &str, origin: &str) -> Result<Self, RecipeError> {
        let table = text.parse().map_err(|e: toml::de::Error| {
            RecipeError::new(origin, format!("not valid TOML: {}", e.message().replace('\n', " ")))
        })?;
        read::typed(table, origin)
    }

    /// The recipe itself, if its values go together, with the defaults of its optimizer written out.
    ///
    /// # Errors
    /// The first sentence about values that do not.
    pub fn checked(mut self, origin: &str) -> Result<Self, RecipeError> {
        check::check(&self).map_err(|sentence| RecipeError::new(origin, sentence))?;
        self.optim.fill();
        Ok(self)
    }

    /// All of it as TOML, defaults included.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is made of TOML types")
    }
}

#[cfg(test)]
mod tests;
