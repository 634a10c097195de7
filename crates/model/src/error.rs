use hearth_weights::Error as WeightsError;

/// What can go wrong when a model is put together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No file in `arch/` serves this family.
    #[error("model type `{model_type}` is not supported (supported: {supported})")]
    UnknownArchitecture {
        /// What `config.json` says.
        model_type: String,
        /// Registered names.
        supported: String,
    },
    /// A weight is missing or has another shape than the configuration asks for.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A device name that cannot be opened here.
    #[error("device `{name}`: {why}")]
    Device {
        /// As the user wrote it.
        name: String,
        /// What to do.
        why: String,
    },
    /// Anything a weight source of another room reports (a budget, a group, a disk).
    #[error("{0}")]
    Source(String),
}
