//! Behaviour of the trainer on tiny models.

mod arithmetic;
mod checkpoints;
mod dpo;
mod faulty_disk;
mod layouts;
mod mutants;
mod plans;
mod resume;
mod states;
mod support;
mod synthetic;
mod tiny;
