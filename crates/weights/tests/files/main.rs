//! Every file family, read, written and damaged. One binary: the parts share fixtures.

mod common;
mod config;
mod hostile;
mod quant;
mod read;
mod vocabulary;
mod write;
