use super::cells::Cells;
use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// What a test wants of one request.
#[derive(Clone, Copy, Debug)]
struct Wish {
    prompt: usize,
    max_tokens: usize,
    /// Tokens after which it stops by itself.
    stops_after: usize,
    /// Prompts of one family begin alike.
    family: u32,
}

impl Wish {
    fn new(prompt: usize, max_tokens: usize) -> Self {
        Wish { prompt, max_tokens, stops_after: max_tokens, family: 0 }
    }

    fn of_family(self, family: u32) -> Self {
        Wish { family, ..self }
    }

    fn tokens(&self) -> Vec<u32> {
        (0..self.prompt as u32).map(|i| self.family * 1000 + i).collect()
    }
}

/// How many tokens are guessed, and how many of them are right: anything, and always the same.
#[derive(Clone, Copy, Debug, Default)]
struct Guesses {
    most: usize,
}

impl Guesses {
    fn made(self, id: RequestId, generated: usize) -> usize {
        (id as usize * 5 + generated * 3) % (self.most + 1)
    }

    fn right(self, id: RequestId, generated: usize) -> usize {
        (id as usize + generated * 7) % (self.most + 1)
    }
}

/// Plays the engine: feeds plans back, checks every rule on the way.
struct Play {
    scheduler: Scheduler,
    limits: Limits,
    wishes: BTreeMap<RequestId, Wish>,
    /// Positions computed and tokens generated, of live requests.
    progress: BTreeMap<RequestId, (usize, usize)>,
    next_id: RequestId,
    /// In the order they were admitted.
    started: Vec<RequestId>,
    finished: BTreeSet<RequestId>,
    guesses: Guesses,
    cells: Cells,
}

impl Play {
    fn new(limits: Limits, blocks: usize, block_tokens: usize) -> Self {
        Self::with_host(limits, blocks, 0, block_tokens)
    }

    fn with_host(limits: Limits, blocks: usize, host: usize, block_tokens: usize) -> Self {
        let scheduler = Scheduler::new(limits, blocks, block_tokens).with_host(host);
        Play {
            cells: Cells::new(&scheduler),
            scheduler,
            limits,
            wishes: BTreeMap::new(),
            progress: BTreeMap::new(),
            next_id: 0,
            started: Vec::new(),
            finished: BTreeSet::new(),
            guesses: Guesses::default(),
        }
    }

    fn enqueue(&mut self, wish: Wish) -> Option<RequestId> {
        let id = self.next_id;
        self.next_id += 1;
        let arrival = Arrival::new(id, wish.tokens(), wish.max_tokens);
        match self.scheduler.enqueue(arrival) {
            Ok(()) => {
                self.wishes.insert(id, wish);
                self.progress.insert(id, (0, 0));
                self.check_blocks();
                Some(id)
            }
            Err(full) => {
                assert_eq!(full.waiting, self.limits.max_waiting);
                None
            }
        }
    }

    fn cancel(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        self.progress.remove(&id);
        self.check_blocks();
    }

    /// One step. Returns how many tokens it held.
    fn step(&mut self) -> usize {
        let parts = self.scheduler.plan();
        let tokens: usize = parts.iter().map(|p| p.positions.len() + p.proposed).sum();
        assert!(tokens <= self.limits.max_batch_tokens);
        assert!(parts.len() <= self.limits.max_seqs);
        let is_decode = |p: &Part| {
            let known = self.wishes[&p.id].prompt + self.progress[&p.id].1;
            p.positions.start >= self.wishes[&p.id].prompt
                && p.positions.end == known
                && p.positions.len() == 1
        };
        assert!(parts.is_sorted_by_key(|p| !is_decode(p)), "decodes come first");
        self.cells.make(&self.scheduler.take_moves());
        for part in parts {
            self.feed(part);
        }
        self.check_blocks();
        tokens
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    fn feed(&mut self, part: Part) {
        let wish = self.wishes[&part.id];
        let (computed, generated) = self.progress.get_mut(&part.id).expect("only live requests are planned");
        assert!(
            part.positions.end + part.proposed <= part.table.len() * self.scheduler.block_tokens,
            "positions have blocks"
        );
        let again = part.positions.start < *computed;
        assert!(!again || self.scheduler.preemptions() > 0, "every position once, unless preempted");
        assert!(part.positions.start <= *computed || part.cached > 0, "in order, unless found computed");
        *computed = part.positions.end.max(*computed);
        let running = |s: &Scheduler| s.running.iter().find(|s| s.id == part.id).expect("it runs").clone();
        self.cells.compute(&part, &running(&self.scheduler));
        let most = wish.stops_after.min(wish.max_tokens);
        let gets = match part.positions.end < wish.prompt + *generated {
            true => 0,
            false => (1 + self.guesses.right(part.id, *generated).min(part.proposed)).min(most - *generated),
        };
        if gets > 0 {
            let tokens: Vec<u32> = (0..gets).map(|i| 7001 + (*generated + i) as u32).collect();
            self.scheduler.append(part.id, &tokens);
            self.cells.accept(&part, &running(&self.scheduler), gets - 1);
            *computed = *computed + gets - 1;
            *generated += gets;
        }
        self.scheduler.stored(part.id);
        if part.positions.end < wish.prompt {
            return;
        }
        if *generated >= most {
            self.scheduler.remove(part.id);
            self.progress.remove(&part.id);
            self.finished.insert(part.id);
        } else if gets > 0 {
            self.scheduler.propose(part.id, self.guesses.made(part.id, *generated));
        }
    }

    /// Sequences that run or ran, by ticket.
    fn admitted(&self) -> Vec<&Running> {
        let mut all: Vec<_> = self.scheduler.running.iter().chain(&self.scheduler.parked).collect();
        all.sort_by_key(|s| s.ticket);
        all
    }

    fn check_blocks(&mut self) {
        let known = &self.started;
        assert!(self.scheduler.parked.iter().all(|s| s.table.is_empty()));
        let new: Vec<_> = self.admitted().iter().map(|s| s.id).filter(|id| !known.contains(id)).collect();
        self.started.extend(new);
        let mut references = vec![0; self.scheduler.pool.total()];
        for sequence in &self.scheduler.running {
            sequence.table.iter().for_each(|b| references[*b as usize] += 1);
            let own = sequence.computed / self.scheduler.block_tokens;
            for block in sequence.table.iter().skip(own.max(sequence.registered)) {
                assert_eq!(
                    references[*block as usize], 1,
                    "blocks still to be written belong to one sequence"
                );
            }
        }
        assert_eq!(references, self.scheduler.pool.references(), "what runs is what is used");
        self.cells.check(&self.scheduler);
        assert_eq!(self.scheduler.running() + self.scheduler.waiting(), self.progress.len());
    }

    /// Runs until nothing is left; every step must compute something.
    fn finish(&mut self) {
        while !self.progress.is_empty() {
            assert!(self.step() > 0, "stuck with {:?}", self.scheduler);
        }
        assert_eq!(self.scheduler.pool.used(), 0, "all blocks are back");
        assert!(self.started.is_sorted(), "first come, first served: {:?}", self.started);
    }
}

fn limits(max_seqs: usize, max_batch_tokens: usize, max_waiting: usize) -> Limits {
    Limits { max_seqs, max_batch_tokens, max_waiting, max_overtaken: 9 }
}

#[test]
fn decodes_come_first_and_prompts_fill_the_rest_of_the_step() {
    let mut play = Play::new(limits(4, 8, 9), 100, 4);
    for (family, prompt) in [(0, 3), (1, 4), (2, 10)] {
        play.enqueue(Wish::new(prompt, 5).of_family(family));
    }
    let spans = |play: &mut Play| {
        let parts = play.scheduler.plan();
        let spans: Vec<_> = parts.iter().map(|p| (p.id, p.positions.clone())).collect();
        parts.into_iter().for_each(|p| play.feed(p));
        spans
    };
    assert_eq!(spans(&mut play), [(0, 0..3), (1, 0..4), (2, 0..1)]);
    assert_eq!(spans(&mut play), [(0, 3..4), (1, 4..5), (2, 1..7)]);
    assert_eq!(spans(&mut play), [(0, 4..5), (1, 5..6), (2, 7..10)]);
    play.finish();
}

#[test]
fn a_request_that_does_not_fit_yet_waits_and_is_not_overtaken() {
    let mut play = Play::new(limits(4, 8, 9), 4, 4);
    let big = play.enqueue(Wish::new(12, 1));
    let bigger = play.enqueue(Wish::new(8, 4));
    let small = play.enqueue(Wish::new(1, 1));
    assert!(big.is_some() && bigger.is_some() && small.is_some());
    assert_eq!((play.scheduler.running(), play.scheduler.waiting()), (1, 2), "the small one waits its turn");
    play.finish();
    assert_eq!(play.started, [0, 1, 2]);
}

#[test]
fn cancelling_frees_blocks_for_the_next_in_line_at_once() {
    let mut play = Play::new(limits(1, 8, 9), 4, 4);
    let first = play.enqueue(Wish::new(8, 8)).expect("room");
    let second = play.enqueue(Wish::new(8, 8)).expect("room");
    let third = play.enqueue(Wish::new(1, 1)).expect("room");
    play.step();
    play.cancel(second);
    play.cancel(first);
    assert_eq!((play.scheduler.running(), play.scheduler.waiting()), (1, 0));
    play.finish();
    assert_eq!(play.started, [first, third]);
    play.scheduler.remove(first);
    assert_eq!(play.scheduler.blocks().used(), 0, "an unknown id changes nothing");
}

#[test]
fn what_may_grow_long_runs_on_trust_and_the_youngest_makes_room() {
    let mut play = Play::new(limits(4, 8, 9), 10, 4);
    for family in 0..3 {
        // Reserved, each would take all ten blocks.
        play.enqueue(Wish::new(6, 34).of_family(family));
    }
    assert_eq!((play.scheduler.running(), play.scheduler.waiting()), (3, 0));
    let mut order = Vec::new();
    while !play.progress.is_empty() {
        let before: Vec<_> = play.progress.keys().copied().collect();
        assert!(play.step() > 0);
        order.extend(before.into_iter().filter(|id| !play.progress.contains_key(id)));
    }
    assert_eq!(order, [0, 1, 2]);
    assert!(play.scheduler.preemptions() >= 2);
    play.finish();
}

#[test]
fn what_fits_with_reserve_is_never_preempted() {
    let mut play = Play::new(limits(3, 8, 9), 30, 4);
    for family in 0..3 {
        play.enqueue(Wish::new(6, 34).of_family(family));
    }
    play.finish();
    assert_eq!(play.scheduler.preemptions(), 0);
}

#[test]
fn a_patient_request_is_served_under_endless_traffic_of_higher_priority() {
    let mut play = Play::new(limits(1, 8, 9), 8, 4);
    play.enqueue(Wish::new(1, 3));
    let poor = Arrival { priority: -1, client: "poor".into(), ..Arrival::new(1000, vec![1], 1) };
    play.scheduler.enqueue(poor).expect("room");
    for id in 2000..2100 {
        let rich = Arrival { priority: 9, client: "rich".into(), ..Arrival::new(id, vec![2], 1) };
        play.scheduler.enqueue(rich).expect("one at a time");
        for part in play.scheduler.plan() {
            play.scheduler.stored(part.id);
            play.scheduler.remove(part.id);
            if part.id == 1000 {
                return;
            }
        }
    }
    panic!("starved");
}

#[test]
fn samples_of_one_prompt_compute_it_once_and_share_its_blocks() {
    let mut play = Play::new(limits(4, 8, 9), 100, 4);
    for _ in 0..4 {
        play.enqueue(Wish::new(18, 5));
    }
    let mut computed = 0;
    while play.progress.values().any(|(computed, _)| *computed < 18) {
        computed += play.step();
    }
    let generated: usize = play.progress.values().map(|(_, generated)| generated - 1).sum();
    assert_eq!(computed - generated, 18 + 3 * 2, "each computes only what follows the last full block");
    assert_eq!(play.scheduler.pool.references().iter().filter(|r| **r == 4).count(), 4);
    play.finish();
}

#[test]
fn a_later_turn_finds_the_earlier_ones_and_a_scored_prompt_does_not_look() {
    let mut play = Play::new(limits(4, 64, 9), 100, 4);
    let first = play.enqueue(Wish::new(10, 7)).expect("room");
    play.finish();
    let turn = |id, reuse| {
        let said = Wish::new(10, 0).tokens().into_iter().chain((1..7).map(|i| 7000 + i)).chain([1, 2, 3]);
        Arrival { reuse, ..Arrival::new(id, said.collect(), 1) }
    };
    let mut found = |arrival: Arrival| {
        let id = arrival.id;
        play.scheduler.enqueue(arrival).expect("room");
        let part = play.scheduler.plan().remove(0);
        play.scheduler.remove(id);
        (part.cached, part.positions)
    };
    assert_eq!(found(turn(first + 1, true)), (16, 16..19), "prompt and output");
    assert_eq!(found(turn(first + 2, false)), (0, 0..19));
    assert_eq!(
        found(Arrival { root: 1, ..turn(first + 3, true) }),
        (0, 0..19),
        "another root shares nothing"
    );
}

/// Conversations take turns; together they are three times as long as the cache.
#[test]
fn turns_of_more_conversations_than_the_device_holds_are_found_on_the_host() {
    let cached = |host: usize| {
        let mut play = Play::with_host(limits(1, 64, 9), 5, host, 4);
        let mut found = Vec::new();
        for turn in 0..12 {
            play.enqueue(Wish::new(13, 2).of_family(turn % 4));
            let parts = play.scheduler.plan();
            play.cells.make(&play.scheduler.take_moves());
            found.push(parts[0].cached);
            parts.into_iter().for_each(|part| play.feed(part));
            play.finish();
        }
        (found.split_off(4), play.scheduler.pool.moved())
    };
    assert_eq!(cached(0).0, [0; 8]);
    let (found, (out, back)) = cached(8);
    assert_eq!(found, [12; 8], "all but the last, partial block");
    assert!(out > back && back >= 8 * 3, "{out} out, {back} back");
}

#[test]
fn what_a_failed_step_left_behind_is_not_shared() {
    let mut play = Play::new(limits(2, 64, 9), 100, 4);
    let arrival = |id| Arrival::new(id, vec![1; 9], 1);
    play.scheduler.enqueue(arrival(0)).expect("room");
    play.scheduler.plan();
    play.scheduler.remove(0);
    play.scheduler.enqueue(arrival(1)).expect("room");
    assert_eq!(play.scheduler.plan()[0].positions, 0..9);
}

#[test]
fn the_queue_is_bounded_by_those_that_really_wait() {
    let mut play = Play::new(limits(2, 8, 1), 100, 4);
    let taken: Vec<bool> = (0..5).map(|_| play.enqueue(Wish::new(1, 2)).is_some()).collect();
    assert_eq!(taken, [true, true, true, false, false]);
    let mut none = Play::new(limits(1, 8, 0), 100, 4);
    assert!(none.enqueue(Wish::new(1, 2)).is_some(), "what can run at once does not wait");
    assert!(none.enqueue(Wish::new(1, 2)).is_none());
    play.finish();
    none.finish();
}

/// Every schedule of up to three small requests, arriving and leaving at every possible step.
#[test]
fn every_small_schedule_finishes() {
    let shapes = [(1, 0), (1, 1), (1, 3), (2, 2), (3, 1), (4, 0)];
    let wish = |i: usize| Wish::new(shapes[i].0, shapes[i].1);
    let mut schedules = 0;
    for (seqs, tokens, blocks, block_tokens) in [(1, 1, 4, 1), (2, 3, 5, 1), (3, 8, 3, 2), (2, 2, 1, 4)] {
        for code in 0..shapes.len().pow(3) * 3 * 3 * 8 * 2 {
            let host = [0, 1, blocks][code / 7 % 3];
            let mut code = code;
            let mut digit = |base: usize| (code % base, code /= base).0;
            let kinds = [digit(shapes.len()), digit(shapes.len()), digit(shapes.len())];
            let (pause_1, pause_2, cancel_at) = (digit(3), digit(3), digit(8));
            let family = digit(2) as u32;
            let mut play = Play::with_host(limits(seqs, tokens, 3), blocks, host, block_tokens);
            play.guesses.most = seqs - 1;
            play.enqueue(wish(kinds[0]));
            play.steps(pause_1);
            play.enqueue(wish(kinds[1]).of_family(family));
            play.steps(pause_2);
            play.enqueue(wish(kinds[2]));
            play.steps(cancel_at / 2);
            // Half of the schedules lose a request on the way.
            let cancelled = (cancel_at % 2 == 1).then_some((cancel_at / 2 % 3) as RequestId);
            let alive = cancelled.is_some_and(|id| play.progress.contains_key(&id));
            cancelled.into_iter().for_each(|id| play.cancel(id));
            play.finish();
            assert_eq!(play.finished.len(), 3 - usize::from(alive));
            schedules += 1;
        }
    }
    assert!(schedules > 100_000);
}

#[derive(Clone, Debug)]
enum Move {
    Enqueue(Wish),
    Cancel(usize),
    Step,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let wish = (1..40usize, 0..24usize, 0..30usize, 0..3u32).prop_map(
        |(prompt, max_tokens, stops_after, family)| Wish { prompt, max_tokens, stops_after, family },
    );
    let one = prop_oneof![
        4 => wish.prop_map(Move::Enqueue),
        1 => (0..100usize).prop_map(Move::Cancel),
        6 => Just(Move::Step),
    ];
    proptest::collection::vec(one, 1..120)
}

proptest! {
    #[test]
    fn any_load_is_served_in_order_within_all_limits(
        moves in moves(),
        max_seqs in 1..6usize,
        spare_tokens in 0..20usize,
        max_waiting in 0..5usize,
        spare_blocks in 0..20usize,
        block_tokens in 1..9usize,
        guesses in 0..5usize,
        host in 0..30usize,
    ) {
        let blocks = 64usize.div_ceil(block_tokens) + spare_blocks;
        let limits = limits(max_seqs, max_seqs + spare_tokens, max_waiting);
        let mut play = Play::with_host(limits, blocks, host, block_tokens);
        play.guesses.most = guesses;
        for m in moves {
            match m {
                Move::Enqueue(wish) => {
                    play.enqueue(wish);
                }
                Move::Cancel(n) => {
                    let live: Vec<RequestId> = play.progress.keys().copied().collect();
                    if let Some(id) = live.get(n % live.len().max(1)) {
                        play.cancel(*id);
                    }
                }
                Move::Step => play.steps(1),
            }
        }
        play.finish();
    }
}
