//! Whole models on a card.

mod decode;
mod fixtures;
mod serving;
