//! What every storage must do, and how the faulty one fails.
mod conformance;
mod faults;
