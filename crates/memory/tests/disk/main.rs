//! What every way to reach a disk must do.
mod behind;
mod files;
mod prefetch;
mod probe;
mod support;
mod tiles;
