/// Why a card does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The card, its driver or its budget.
    #[error(transparent)]
    Card(#[from] hearth_cuda::runtime::Error),
    /// The model's files.
    #[error(transparent)]
    Weights(#[from] hearth_weights::Error),
    /// The model's architecture.
    #[error(transparent)]
    Model(#[from] hearth_model::Error),
    /// Block formats multiply rounded activations alone.
    #[error("a card multiplies quantized weights by 8-bit activations alone; leave --activations f32 out")]
    Activations,
    /// A token outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token {
        /// Its id.
        token: u32,
        /// How many there are.
        vocab: usize,
    },
    /// An architecture whose blocks the card's kernels do not compute.
    #[error("model type `{model_type}` is not decoded on a card (decoded there: {known})")]
    Architecture {
        /// Of the files.
        model_type: String,
        /// What may be decoded.
        known: String,
    },
    /// Something that a run asks for and a card's trainer does not do.
    #[error("{sentence}")]
    Refused {
        /// Key, value and what to use instead.
        sentence: String,
    },
    /// A parameter that the model on the card has not.
    #[error("the model on the card has no {name}")]
    Parameter {
        /// Its name.
        name: String,
    },
    /// Something a model has that decoding on a card does not know.
    #[error("{name}: the card multiplies no {format}; convert it to {known}")]
    Format {
        /// Tensor.
        name: String,
        /// What it is stored as.
        format: &'static str,
        /// What it may be stored as.
        known: String,
    },
}

impl Error {
    /// Whether the card is gone for this process.
    pub fn is_lost(&self) -> bool {
        matches!(self, Error::Card(error) if error.is_lost())
    }
}

impl From<hearth_memory::Error> for Error {
    fn from(error: hearth_memory::Error) -> Self {
        Error::Card(error.into())
    }
}
