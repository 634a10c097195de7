//! The loop on its own thread: plan a step, run it, tell the callers.

use super::{Mode, Shared, State};
use crate::draft::Draft;
use crate::kv::Move;
use crate::runner::{Forward, SequenceStep};
use crate::scheduler::{Part, RequestId};
use crate::sequence::{Outcome, Sequence};
use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// What ends the requests of an engine that stops.
const STOPPED: &str = "the engine is shutting down";

/// Pause of an engine with nothing to do before it looks whether its weights can be had again.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Owns the model and every sequence that was accepted and is not over.
pub struct Worker<F> {
    shared: Arc<Shared>,
    forward: F,
    draft: Option<Draft>,
    sequences: HashMap<RequestId, Sequence>,
}

/// Says on drop that the worker has ended.
struct Gone(Arc<Shared>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.advance_to(Mode::Gone);
    }
}

/// A sequence during a step.
struct Moving {
    id: RequestId,
    /// Position of its first token in the step.
    start: usize,
    /// Position after its last known token in the step.
    end: usize,
    /// Tokens that were guessed to follow.
    proposed: usize,
    sequence: Sequence,
}

impl<F: Forward> Worker<F> {
    pub fn new(shared: Arc<Shared>, forward: F, draft: Option<Draft>) -> Self {
        Self { shared, forward, draft, sequences: HashMap::new() }
    }

    /// Works until told to end. Whatever happens, nobody is left waiting.
    pub fn run(self) {
        // Dropped last, also by a panic: the model's memory is free before anyone who waits for the end goes on.
        let _gone = Gone(self.shared.clone());
        let mut worker = self;
        let end = catch_unwind(AssertUnwindSafe(|| {
            while let Some((parts, moves)) = worker.next_step() {
                worker.move_blocks(&moves);
                worker.step(parts);
                if let Some(why) = worker.forward.is_lost() {
                    return Some(ended(&why));
                }
            }
            None
        }));
        worker.fail_all(end.unwrap_or_else(|panic| Some(ended(message(&*panic)))));
    }

    /// Ends all requests: with a failure, or because the engine was told to stop.
    fn fail_all(&mut self, failure: Option<String>) {
        let why = failure.clone().unwrap_or_else(|| STOPPED.into());
        let shared = self.shared.clone();
        let mut state = shared.lock();
        state.failure = failure;
        state.mode = state.mode.max(Mode::Stopping);
        self.absorb(&mut state);
        for sequence in self.sequences.values() {
            sequence.fail(why.clone());
        }
        for (id, _) in self.sequences.drain() {
            state.scheduler.remove(id);
        }
    }

    /// The next step, and what must be copied before it; waits for one. `None` when the engine is to end.
    fn next_step(&mut self) -> Option<(Vec<Part>, Vec<Move>)> {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        loop {
            self.absorb(&mut state);
            if state.mode == Mode::Stopping {
                return None;
            }
            self.drop_cancelled(&mut state);
            self.drop_overdue(&mut state);
            let parts = state.scheduler.plan();
            if !parts.is_empty() {
                return Some((parts, state.scheduler.take_moves()));
            }
            if state.mode == Mode::Draining {
                return None;
            }
            state = match state.fault {
                None => shared.wait(state),
                Some(_) => self.look_again(&shared, state),
            };
        }
    }

    /// Waits, since the last step found no weights, but not for ever: nobody asks a server that says it cannot answer, so
    /// it finds out by itself when it can.
    fn look_again<'a>(&mut self, shared: &'a Shared, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let (state, waited) = shared.wait_at_most(state, LOOK_AGAIN);
        if !waited.timed_out() {
            return state;
        }
        drop(state);
        let found = catch_unwind(AssertUnwindSafe(|| {
            self.draft.as_mut().map_or(Ok(()), Draft::check)?;
            self.forward.check()
        }));
        let mut state = shared.lock();
        if let Ok(Ok(())) = found {
            state.fault = None;
        }
        state
    }

    fn absorb(&mut self, state: &mut State) {
        self.sequences.extend(state.arrived.drain(..));
    }

    fn drop_cancelled(&mut self, state: &mut State) {
        let cancelled = self.sequences.extract_if(|_, sequence| sequence.is_cancelled());
        for (id, _) in cancelled {
            state.scheduler.remove(id);
            state.stats.cancelled += 1;
        }
    }

    fn drop_overdue(&mut self, state: &mut State) {
        let now = Instant::now();
        let scheduler = &mut state.scheduler;
        let overdue = self
            .sequences
            .extract_if(|id, sequence| sequence.overdue(now).is_some() && scheduler.is_queued(*id))
            .collect::<Vec<_>>();
        for (id, sequence) in overdue {
            sequence.give_up(sequence.overdue(now).expect("it was a moment ago"));
            state.scheduler.remove(id);
            state.stats.overdue += 1;
        }
    }

    /// Not caught like a failing step: what lies where would not be known any more.
    fn move_blocks(&mut self, moves: &[Move]) {
        self.forward.move_blocks(moves);
        if let Some(draft) = &mut self.draft {
            draft.move_blocks(moves);
        }
    }

    fn step(&mut self, parts: Vec<Part>) {
        let guessed = catch_unwind(AssertUnwindSafe(|| match &mut self.draft {
            Some(draft) => draft.guess(&parts, &mut self.sequences),
            None => Ok(()),
        }));
        let (mut moving, steps): (Vec<Moving>, Vec<SequenceStep>) =
            parts.into_iter().map(|part| self.set_out(part)).unzip();
        let forward = AssertUnwindSafe(|| {
            self.forward.forward(&steps, &mut |i, token, logits| {
                let m = &mut moving[i];
                m.sequence.take_logits(m.start + token, logits);
            })
        });
        let run = match guessed {
            Ok(Ok(())) => catch_unwind(forward),
            failed => failed,
        };
        let failure = match &run {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("a step failed: {error}")),
            Err(panic) => Some(format!("a step failed: {}", message(&**panic))),
        };
        // Whoever hears of the step can learn by then that there will be no other.
        if let Some(why) = self.forward.is_lost() {
            self.shared.lock().failure = Some(ended(&why));
        }
        let outcomes: Vec<Outcome> = match &failure {
            None => moving.iter_mut().map(|m| m.sequence.settle(m.end)).collect(),
            Some(why) => moving.iter().map(|m| m.sequence.fail(why.clone())).collect(),
        };
        let shared = self.shared.clone();
        let mut state = shared.lock();
        state.stats.steps += 1;
        // A panic tells of what was asked for, an error of the machine: that one others will meet too.
        if run.is_ok() {
            state.fault = failure;
        }
        for (m, outcome) in moving.into_iter().zip(outcomes) {
            self.book(&mut state, m, outcome);
        }
    }

    fn set_out(&mut self, part: Part) -> (Moving, SequenceStep) {
        let mut sequence = self.sequences.remove(&part.id).expect("only accepted sequences are planned");
        let (id, start, end, proposed) = (part.id, part.positions.start, part.positions.end, part.proposed);
        let step = sequence.step(part);
        (Moving { id, start, end, proposed, sequence }, step)
    }

    fn book(&mut self, state: &mut State, mut m: Moving, outcome: Outcome) {
        let prompt = m.sequence.prompt();
        state.stats.prompt_tokens += (m.end.min(prompt) - m.start.min(prompt)) as u64;
        let (grew, is_over, has_failed) = match outcome {
            Outcome::Prefilling => (0, false, false),
            Outcome::Grew(grew) => (grew, false, false),
            Outcome::Ended { grew, finished } => (grew, true, !finished),
        };
        state.stats.generated_tokens += grew as u64;
        state.stats.drafts += u64::from(m.proposed > 0);
        state.stats.draft_tokens += m.proposed as u64;
        state.stats.accepted_tokens += m.sequence.judge(m.proposed) as u64;
        if !has_failed {
            if grew > 0 {
                state.scheduler.append(m.id, m.sequence.last_tokens(grew));
            }
            state.scheduler.stored(m.id);
        }
        if is_over {
            state.stats.cached_tokens += m.sequence.cached() as u64;
            state.stats.finished += u64::from(!has_failed);
            state.pace.ended(Instant::now(), state.scheduler.waiting());
            state.scheduler.remove(m.id);
            return;
        }
        if grew > 0 {
            let batch = state.scheduler.running();
            state.scheduler.propose(m.id, m.sequence.propose(batch));
        }
        self.sequences.insert(m.id, m.sequence);
    }
}

/// What ends the requests of an engine that cannot go on.
fn ended(why: &str) -> String {
    format!("the engine failed: {why}")
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason was given")
}
