//! Behaviour of the trainer on tiny models.

mod arithmetic;
mod checkpoints;
mod dpo;
mod faulty_disk;
mod layouts;
mod plans;
mod resume;
mod support;
mod synthetic;
