//! Does a recorded sequence again and compares.

use crate::constrain::Grammars;
use crate::record::Content;
use crate::state::Service;
use hearth_engine::api::{Event, SubmitError};

/// What a replay came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replayed {
    /// The same tokens.
    Equal,
    /// Other tokens from this one on, counted from the first generated.
    Differs {
        /// Its number.
        at: usize,
        /// The token recorded, if there was one.
        recorded: Option<u32>,
        /// The token now, if there was one.
        now: Option<u32>,
    },
}

/// Why a replay was not possible.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReplayError {
    /// The engine does not take the request.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// The output format cannot be compiled.
    #[error("{0}")]
    Format(String),
    /// The adapter that was laid over the model is not among those given.
    #[error(
        "it was recorded with an adapter that is not given here (digest {0:.12}…); add --adapter NAME=DIR"
    )]
    Adapter(String),
    /// The engine could not go on.
    #[error("the engine could not go on: {0}")]
    Failed(String),
}

/// Generates as many tokens as were recorded and compares them. Where the record ended by itself, this must too.
///
/// # Errors
/// [`ReplayError`]: the request cannot be made of this model.
pub fn replay(service: &Service, content: &Content, ended: bool) -> Result<Replayed, ReplayError> {
    let mut request = content.request();
    if let Some(format) = &content.format {
        let grammar = Grammars::new(service).and_then(|grammars| grammars.compile(format, "format"));
        request.sampling.grammar = Some(grammar.map_err(|e| ReplayError::Format(e.to_string()))?);
    }
    if let Some(digest) = &content.adapter {
        let found = service.adapters.iter().find(|(_, adapter)| adapter.digest() == digest);
        let (_, adapter) = found.ok_or_else(|| ReplayError::Adapter(digest.clone()))?;
        request.adapter = Some(adapter.clone());
    }
    let mut generation = service.engine.submit(request)?;
    let mut recorded = content.tokens.iter().copied();
    for at in 0.. {
        let was = recorded.next();
        if was.is_none() && !ended {
            break;
        }
        let now = loop {
            match generation.next_blocking() {
                Some(Event::Token { id, .. }) => break Some(id),
                Some(Event::Finished { .. }) => break None,
                Some(Event::Failed(why)) => return Err(ReplayError::Failed(why)),
                Some(_) => {}
                None => return Err(ReplayError::Failed("it ended without a result".into())),
            }
        };
        match (was, now) {
            (None, None) => break,
            (was, now) if was == now => {}
            (recorded, now) => return Ok(Replayed::Differs { at, recorded, now }),
        }
    }
    Ok(Replayed::Equal)
}
