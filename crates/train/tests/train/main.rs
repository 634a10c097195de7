//! Behaviour of the trainer on tiny models.

mod arithmetic;
mod resume;
mod support;
