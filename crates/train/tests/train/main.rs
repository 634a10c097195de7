//! Behaviour of the trainer on tiny models.

mod arithmetic;
mod checkpoints;
mod faulty_disk;
mod layouts;
mod resume;
mod support;
