//! What every backend promises, as programs that all ranks of a world run together: the same code whether they are
//! threads of a test or processes under a launcher.

mod endings;
mod ordered;
mod parts;
mod refusals;
mod results;
mod values;

use hearth_collective::{Buffer, Error, ProcessGroup, buffer};

/// A world of ranks; each case opens its own part of it, so that it may end that.
pub type World<'a> = &'a mut dyn ProcessGroup;

/// A promise and the program that checks it.
pub type Case = (&'static str, fn(World));

/// Runs every promise on this rank.
pub fn run_all(world: World) {
    for (name, case) in
        [results::CASES, refusals::CASES, parts::CASES, ordered::CASES, endings::CASES].concat()
    {
        if world.rank() == 0 {
            println!("{} ranks: {name}", world.world_size());
        }
        case(world);
        world.barrier().unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// A group of the same ranks that a case may end.
fn fresh(world: World) -> Box<dyn ProcessGroup> {
    let rank = world.rank();
    world.split(0, rank).expect("split")
}

fn owned(bytes: &[u8]) -> Box<dyn Buffer> {
    Box::new(bytes.to_vec())
}

/// What all_gather puts in an output of `length` bytes.
fn gather(group: World, partition: &[u8], length: usize) -> Result<Vec<u8>, Error> {
    group.all_gather(owned(partition), owned(&vec![0; length])).map(buffer::into_vec)
}

/// What all_to_all puts in an output of `length` bytes.
fn transpose(group: World, input: &[u8], length: usize) -> Result<Vec<u8>, Error> {
    group.all_to_all(owned(input), owned(&vec![0; length])).map(buffer::into_vec)
}

fn spread(group: World, root: usize, buffer: &[u8]) -> Result<Vec<u8>, Error> {
    group.broadcast(root, owned(buffer)).map(buffer::into_vec)
}
