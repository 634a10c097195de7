//! Every state that a few requests can lead to, whatever they do and whenever they come and go.
//!
//! A breadth-first walk over the scheduler itself. Its moves: a request arrives, between steps or while one runs; one
//! is cancelled; a step runs, and each sequence that got a token in it goes on or stops, any number of its guesses having
//! been right. In every state the claims of
//! the module's documentation are checked: no block is lost or written by two, every block of device and host holds what
//! it is known for, the oldest sequence moves in every
//! step and is never preempted, and left alone, every request comes to its end.

use super::cells::Cells;
use super::*;
use std::collections::{BTreeMap, HashSet, VecDeque};

/// One request of a world.
#[derive(Clone, Copy)]
struct Ask {
    prompt: usize,
    max_tokens: usize,
    family: u32,
    client: &'static str,
    priority: i32,
}

fn ask(prompt: usize, max_tokens: usize, family: u32, client: &'static str, priority: i32) -> Ask {
    Ask { prompt, max_tokens, family, client, priority }
}

struct World {
    limits: Limits,
    blocks: usize,
    /// Slots on the host.
    host: usize,
    block_tokens: usize,
    asks: Vec<Ask>,
    cancels: usize,
    /// Tokens that every sequence guesses whenever it can.
    guesses: usize,
}

#[derive(Clone)]
struct State {
    scheduler: Scheduler,
    arrived: usize,
    cancels_left: usize,
    /// Tokens generated, of requests that are not over.
    live: BTreeMap<RequestId, usize>,
    cells: Cells,
}

impl State {
    fn new(world: &World) -> Self {
        let scheduler = Scheduler::new(world.limits, world.blocks, world.block_tokens).with_host(world.host);
        let cells = Cells::new(&scheduler);
        Self { scheduler, arrived: 0, cancels_left: world.cancels, live: BTreeMap::new(), cells }
    }

    fn arrive(&mut self, world: &World) {
        let (id, ask) = (self.arrived as RequestId, world.asks[self.arrived]);
        let tokens = (0..ask.prompt as u32).map(|i| ask.family * 100 + i).collect();
        let arrival = Arrival {
            client: ask.client.into(),
            priority: ask.priority,
            ..Arrival::new(id, tokens, ask.max_tokens)
        };
        self.arrived += 1;
        match self.scheduler.enqueue(arrival) {
            Ok(()) => drop(self.live.insert(id, 0)),
            Err(full) => assert_eq!(full.waiting, world.limits.max_waiting),
        }
    }

    fn cancel(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        self.live.remove(&id);
        self.cancels_left -= 1;
    }

    /// The sequence that must never lose anything.
    fn oldest(&self) -> Option<(RequestId, usize)> {
        let all = self.scheduler.running.iter().chain(&self.scheduler.parked);
        all.min_by_key(|s| s.ticket).map(|s| (s.id, s.computed))
    }

    fn plan(&mut self) -> Vec<Part> {
        let before = self.oldest();
        let parts = self.scheduler.plan();
        self.cells.make(&self.scheduler.take_moves());
        let tokens: usize = parts.iter().map(|p| p.positions.len() + p.proposed).sum();
        assert!(tokens <= self.scheduler.limits.max_batch_tokens);
        assert_eq!(parts.is_empty(), self.live.is_empty(), "as long as there is somebody, somebody moves");
        if let Some((id, computed)) = before {
            let part = parts.iter().find(|p| p.id == id).expect("the oldest moves in every step");
            assert!(part.positions.start >= computed, "and is never preempted");
        }
        parts
    }

    /// The sequences that get a token from a planned step.
    fn grown(&self, world: &World, parts: &[Part]) -> Vec<RequestId> {
        let known = |p: &&Part| world.asks[p.id as usize].prompt + self.live[&p.id];
        parts.iter().filter(|p| p.positions.end == known(p)).map(|p| p.id).collect()
    }

    /// Ends a planned step, for those it gave a token as they fare.
    fn feed(&mut self, world: &World, parts: &[Part], fates: &BTreeMap<RequestId, Fate>) {
        let grown = self.grown(world, parts);
        for part in parts {
            let end = part.positions.end + part.proposed;
            assert!(end <= part.table.len() * world.block_tokens, "positions have blocks");
            let running =
                |s: &Scheduler| s.running.iter().find(|s| s.id == part.id).expect("it runs").clone();
            self.cells.compute(part, &running(&self.scheduler));
            let generated = self.live.get_mut(&part.id).expect("only live requests are planned");
            if !grown.contains(&part.id) {
                self.scheduler.stored(part.id);
                continue;
            }
            let fate = fates.get(&part.id).copied().unwrap_or_default();
            let tokens: Vec<u32> = (1..=fate.right + 1).map(|i| 7000 + (*generated + i) as u32).collect();
            *generated += tokens.len();
            assert!(*generated <= world.asks[part.id as usize].max_tokens, "no guess goes too far");
            self.scheduler.append(part.id, &tokens);
            self.cells.accept(part, &running(&self.scheduler), fate.right);
            self.scheduler.stored(part.id);
            if *generated >= world.asks[part.id as usize].max_tokens || fate.stops {
                self.live.remove(&part.id);
                self.scheduler.remove(part.id);
            } else {
                self.scheduler.propose(part.id, world.guesses);
            }
        }
    }

    fn check(&self) {
        let mut references = vec![0; self.scheduler.pool.total()];
        for sequence in &self.scheduler.running {
            sequence.table.iter().for_each(|b| references[*b as usize] += 1);
            assert!(sequence.table.len() <= sequence.blocks_at_most(self.scheduler.block_tokens));
        }
        assert_eq!(references, self.scheduler.pool.references(), "no block is lost, none is freed in use");
        self.cells.check(&self.scheduler);
        assert!(self.scheduler.parked.iter().all(|s| s.table.is_empty()));
        assert_eq!(self.scheduler.running() + self.scheduler.waiting(), self.live.len());
    }

    /// What distinguishes it from other states: all but numbers that only ever grow.
    fn shape(&self) -> String {
        let s = &self.scheduler;
        let sequence = |s: &Running| {
            (s.id, s.tokens.len(), s.computed, s.registered, s.table.to_vec(), s.reached, s.proposed)
        };
        let running: Vec<_> = s.running.iter().map(sequence).collect();
        let parked: Vec<_> = s.parked.iter().map(sequence).collect();
        format!(
            "{} {} {running:?} {parked:?} {} {}",
            self.arrived,
            self.cancels_left,
            s.queue.shape(),
            s.pool.shape()
        )
    }

    /// Left alone, everything ends. Returns the steps it took.
    fn drain(mut self, world: &World) -> usize {
        for step in 0..200 {
            if self.live.is_empty() {
                assert_eq!(self.scheduler.pool.used(), 0, "all blocks are back");
                return step;
            }
            let parts = self.plan();
            self.feed(world, &parts, &BTreeMap::new());
            self.check();
        }
        panic!("somebody never ends: {:?}", self.scheduler);
    }

    /// Every state one move away.
    fn successors(&self, world: &World) -> Vec<State> {
        let mut next = Vec::new();
        if self.arrived < world.asks.len() {
            let mut state = self.clone();
            state.arrive(world);
            next.push(state);
        }
        if self.cancels_left > 0 {
            next.extend(self.live.keys().map(|id| {
                let mut state = self.clone();
                state.cancel(*id);
                state
            }));
        }
        if !self.live.is_empty() {
            self.steps(world, &mut next);
        }
        next
    }

    fn steps(&self, world: &World, next: &mut Vec<State>) {
        let mut planned = self.clone();
        let parts = planned.plan();
        let grown = planned.grown(world, &parts);
        for arrives in [false, true] {
            if arrives && planned.arrived == world.asks.len() {
                continue;
            }
            for fates in all_fates(&parts, &grown) {
                let mut state = planned.clone();
                if arrives {
                    state.arrive(world);
                }
                state.feed(world, &parts, &fates);
                next.push(state);
            }
        }
    }
}

/// What becomes of a sequence that gets a token.
#[derive(Clone, Copy, Default)]
struct Fate {
    /// Guesses that were right.
    right: usize,
    stops: bool,
}

/// Every way that the sequences of `grown` can fare together.
fn all_fates(parts: &[Part], grown: &[RequestId]) -> Vec<BTreeMap<RequestId, Fate>> {
    let mut all = vec![BTreeMap::new()];
    for part in parts.iter().filter(|part| grown.contains(&part.id)) {
        let fates = (0..=part.proposed).flat_map(|right| [false, true].map(|stops| Fate { right, stops }));
        let with = |fate: Fate| {
            let add = move |others: &BTreeMap<_, _>| {
                let mut fates = others.clone();
                fates.insert(part.id, fate);
                fates
            };
            all.iter().map(add).collect::<Vec<_>>()
        };
        all = fates.flat_map(with).collect();
    }
    all
}

/// What a walk came by.
struct Seen {
    states: usize,
    /// Most on one way.
    preemptions: u64,
    /// Most blocks brought back from the host on one way.
    brought_back: u64,
}

/// Walks through all states.
fn explore(world: &World) -> Seen {
    let first = State::new(world);
    let mut seen = HashSet::from([first.shape()]);
    let mut frontier = VecDeque::from([first]);
    let (mut preemptions, mut brought_back) = (0, 0);
    while let Some(state) = frontier.pop_front() {
        state.check();
        preemptions = preemptions.max(state.scheduler.preemptions());
        brought_back = brought_back.max(state.scheduler.pool.moved().1);
        state.clone().drain(world);
        for next in state.successors(world) {
            if seen.insert(next.shape()) {
                frontier.push_back(next);
            }
        }
        assert!(seen.len() < 400_000, "the walk does not end");
    }
    Seen { states: seen.len(), preemptions, brought_back }
}

fn limits(max_seqs: usize, max_batch_tokens: usize, max_waiting: usize, max_overtaken: usize) -> Limits {
    Limits { max_seqs, max_batch_tokens, max_waiting, max_overtaken }
}

#[test]
fn no_state_is_a_deadlock_loses_a_block_or_starves_a_request() {
    let worlds = [
        // Three long answers over a cache that holds one and a half: trust, growth, preemption.
        World {
            limits: limits(3, 4, 3, 2),
            blocks: 6,
            host: 0,
            block_tokens: 1,
            asks: vec![ask(1, 5, 1, "a", 0), ask(2, 4, 2, "a", 0), ask(1, 4, 3, "b", 0)],
            cancels: 1,
            guesses: 0,
        },
        // Samples of one prompt, which wait for one another's blocks, in blocks of two.
        World {
            limits: limits(3, 3, 3, 2),
            blocks: 5,
            host: 0,
            block_tokens: 2,
            asks: vec![ask(5, 4, 1, "a", 0), ask(5, 4, 1, "a", 0), ask(5, 2, 1, "b", 0)],
            cancels: 1,
            guesses: 0,
        },
        // Four short ones of several clients and priorities, two at a time, a queue that fills up.
        World {
            limits: limits(2, 2, 2, 1),
            blocks: 4,
            host: 0,
            block_tokens: 1,
            asks: vec![
                ask(1, 3, 1, "a", 0),
                ask(2, 2, 1, "a", 0),
                ask(1, 3, 2, "b", 1),
                ask(1, 1, 1, "c", 1),
            ],
            cancels: 0,
            guesses: 0,
        },
        // The first with two guesses at a time, in blocks of one: trust, growth and preemption beside them.
        World {
            limits: limits(3, 5, 3, 2),
            blocks: 6,
            host: 0,
            block_tokens: 1,
            asks: vec![ask(1, 5, 1, "a", 0), ask(2, 4, 2, "a", 0), ask(1, 3, 3, "b", 0)],
            cancels: 1,
            guesses: 2,
        },
        // Guesses across the ends of blocks that samples of one prompt share.
        World {
            limits: limits(2, 4, 3, 2),
            blocks: 5,
            host: 0,
            block_tokens: 2,
            asks: vec![ask(3, 5, 1, "a", 0), ask(3, 5, 1, "a", 0), ask(3, 2, 1, "b", 0)],
            cancels: 0,
            guesses: 3,
        },
        // Two families of prompts that push each other's blocks to a host of two slots, and preemption beside it.
        World {
            limits: limits(2, 3, 3, 2),
            blocks: 5,
            host: 2,
            block_tokens: 1,
            asks: vec![ask(3, 2, 1, "a", 0), ask(3, 2, 2, "a", 0), ask(3, 2, 1, "b", 0)],
            cancels: 1,
            guesses: 0,
        },
        // The same in blocks of two with guesses, over a host of a single slot.
        World {
            limits: limits(2, 4, 3, 2),
            blocks: 4,
            host: 1,
            block_tokens: 2,
            asks: vec![ask(5, 3, 1, "a", 0), ask(3, 4, 2, "a", 0), ask(5, 2, 1, "b", 0)],
            cancels: 0,
            guesses: 2,
        },
        // Three that outgrow the device together and find their own blocks on the host when they go on.
        World {
            limits: limits(3, 4, 3, 2),
            blocks: 5,
            host: 4,
            block_tokens: 1,
            asks: vec![ask(1, 4, 1, "a", 0), ask(2, 3, 2, "a", 0), ask(1, 3, 3, "b", 0)],
            cancels: 0,
            guesses: 0,
        },
    ];
    let (mut states, mut preemptions, mut brought_back) = (0, 0, 0);
    for world in &worlds {
        let seen = explore(world);
        states += seen.states;
        preemptions += seen.preemptions;
        brought_back += seen.brought_back;
    }
    assert!(
        states > 2_000 && preemptions > 0 && brought_back > 0,
        "{states} states, {preemptions} preemptions, {brought_back} blocks brought back: too small to tell"
    );
}
