//! One request on its way: its tokens, its sampler, and what it tells its caller.

use crate::api::{
    Adapter, Constraint, Event, FinishReason, Generation, Pooling, Request, Sampling, SubmitError,
    TokenLogprobs,
};
use crate::pool::Pool;
use crate::runner::SequenceStep;
use crate::sampler::logprobs::LogSoftmax;
use crate::sampler::{SampleError, Sampler};
use crate::scheduler::Part;
use crate::speculation::Guesser;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// A request and what has become of it.
pub struct Sequence {
    /// Prompt and output.
    tokens: Vec<u32>,
    prompt: usize,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    min_tokens: usize,
    sampler: Sampler,
    adapter: Option<Arc<Adapter>>,
    /// When it is to be admitted at the latest, and how long that is from its arrival.
    overdue_at: Option<(Instant, Duration)>,
    /// Prompt tokens found in the prefix cache.
    cached: usize,
    constraint: Option<Box<dyn Constraint>>,
    /// The vector in the making, if that is what is wanted.
    pool: Option<Pool>,
    logprobs: Option<usize>,
    scoring: Option<Scoring>,
    /// Guesses the tokens that follow, where that is wanted.
    guesser: Option<Guesser>,
    /// Tokens guessed to follow those known.
    guess: Vec<u32>,
    /// Tokens that were known before this step.
    known: usize,
    /// What this step's logits led to, until the step is over.
    news: Vec<Event>,
    /// How they ended it.
    end: Option<End>,
    /// Unbounded, yet never more than a prompt report and `max_tokens` events: a slow reader stops nobody.
    events: UnboundedSender<Event>,
    cancel: Arc<AtomicBool>,
    started: Arc<OnceLock<Instant>>,
}

/// Log-probabilities of the prompt, in the making.
struct Scoring {
    alternatives: usize,
    rows: Vec<Option<TokenLogprobs>>,
}

/// How a sequence ends.
enum End {
    Finished(FinishReason),
    Failed(String),
}

/// How a sequence left a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Some of its known tokens are still to be computed.
    Prefilling,
    /// Longer by so many tokens.
    Grew(usize),
    /// Over: after a last token, after a stop token or an exhausted prompt, or by failure.
    Ended {
        /// Tokens sent in this step.
        grew: usize,
        /// Whether it ended as it should.
        finished: bool,
    },
}

impl Sequence {
    /// A sequence whose vector is wanted.
    pub fn embedding(
        prompt: Vec<u32>,
        pooling: Pooling,
        adapter: Option<Arc<Adapter>>,
    ) -> (Self, Generation) {
        let request = Request {
            prompt,
            max_tokens: 0,
            stop_tokens: Vec::new(),
            sampling: Sampling::default(),
            logprobs: None,
            prompt_logprobs: None,
            adapter,
        };
        let (mut sequence, generation) = Self::constrained(request, None, None);
        sequence.pool = Some(Pool::new(pooling, sequence.prompt));
        (sequence, generation)
    }

    /// A sequence with the caller's end of it.
    ///
    /// # Errors
    /// [`SubmitError::Sampling`] when its grammar cannot be used.
    pub fn new(
        request: Request,
        max_queue_time: Option<Duration>,
        guesser: Option<Guesser>,
    ) -> Result<(Self, Generation), SubmitError> {
        let constraint = request.sampling.grammar.as_ref().map(|grammar| grammar.begin());
        let constraint = constraint.transpose().map_err(|what| SubmitError::Sampling { what })?;
        let (mut sequence, generation) = Self::constrained(request, constraint, max_queue_time);
        sequence.guesser = guesser;
        Ok((sequence, generation))
    }

    fn constrained(
        request: Request,
        constraint: Option<Box<dyn Constraint>>,
        max_queue_time: Option<Duration>,
    ) -> (Self, Generation) {
        let (events, receiver) = unbounded_channel();
        let cancel = Arc::new(AtomicBool::new(false));
        let started = Arc::new(OnceLock::new());
        let sequence = Self {
            constraint,
            min_tokens: request.sampling.min_tokens,
            pool: None,
            sampler: Sampler::new(request.sampling, &request.prompt),
            adapter: request.adapter,
            prompt: request.prompt.len(),
            tokens: request.prompt,
            max_tokens: request.max_tokens,
            cached: 0,
            overdue_at: max_queue_time.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit))),
            stop_tokens: request.stop_tokens,
            logprobs: request.logprobs,
            scoring: request.prompt_logprobs.map(|alternatives| Scoring { alternatives, rows: vec![None] }),
            guesser: None,
            guess: Vec::new(),
            known: 0,
            news: Vec::new(),
            end: None,
            events,
            cancel: cancel.clone(),
            started: started.clone(),
        };
        (sequence, Generation { events: receiver, cancel, started })
    }

    /// Tokens of the prompt.
    pub fn prompt(&self) -> usize {
        self.prompt
    }

    /// The longest wait it wanted, if it has waited longer by `now`.
    pub fn overdue(&self, now: Instant) -> Option<Duration> {
        self.overdue_at.filter(|(at, _)| *at <= now).map(|(_, limit)| limit)
    }

    /// Says that it waited too long.
    pub fn give_up(&self, limit: Duration) {
        self.send(Event::Overdue { limit });
    }

    /// Prompt tokens found in the prefix cache so far.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// The tokens chosen last.
    pub fn last_tokens(&self, count: usize) -> &[u32] {
        &self.tokens[self.tokens.len() - count..]
    }

    /// Guesses what follows; says how many tokens are worth a try in a batch of so many sequences.
    pub fn propose(&mut self, batch: usize) -> usize {
        self.guesser.as_mut().map_or(0, |guesser| guesser.guess(&self.tokens, batch, &mut self.guess))
    }

    /// What a draft model computes of the known tokens before it guesses behind the last of this sequence's part of a step.
    pub fn draft_step(&self, part: &Part, positions: Range<usize>) -> SequenceStep {
        let tokens = self.tokens[positions.clone()].to_vec();
        let wanted = tokens.len() - usize::from(positions.end == part.positions.end);
        self.drafted(tokens, positions.start, wanted, part)
    }

    /// What it computes next, if there is room for a further guess.
    pub fn next_draft_step(&self, part: &Part) -> Option<SequenceStep> {
        let &last = self.guess.last().filter(|_| self.guess.len() < part.proposed)?;
        Some(self.drafted(vec![last], part.positions.end + self.guess.len() - 1, 0, part))
    }

    fn drafted(&self, tokens: Vec<u32>, first_position: usize, wanted: usize, part: &Part) -> SequenceStep {
        SequenceStep {
            logits: wanted..tokens.len(),
            tokens,
            first_position,
            prompt: self.prompt,
            table: part.table.clone(),
            vectors: false,
            adapter: None,
        }
    }

    /// Guesses a token from a draft model's logits. Any will do where they are no distribution.
    pub fn push_guess(&mut self, logits: &[f32]) {
        let position = self.tokens.len() + self.guess.len();
        self.guess.push(self.sampler.choose(logits, position).unwrap_or(0));
    }

    /// How many of the tokens guessed for a step were right. They are not guessed again.
    pub fn judge(&mut self, proposed: usize) -> usize {
        let given = &self.tokens[self.known..];
        let accepted = self.guess.iter().take(proposed).zip(given).take_while(|(a, b)| a == b).count();
        if let Some(guesser) = &mut self.guesser {
            guesser.learn(&self.guess, given);
        }
        self.guess.clear();
        accepted
    }

    /// Whether nobody waits for it any more.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Acquire) || self.events.is_closed()
    }

    /// Its tokens at the planned positions, and behind them those of its guess that are to be tried.
    pub fn step(&mut self, part: Part) -> SequenceStep {
        self.cached = part.cached;
        let Range { start, end } = part.positions;
        self.started.get_or_init(Instant::now);
        self.known = self.tokens.len();
        let wanted = self.wanted(start, end);
        SequenceStep {
            tokens: self.tokens[start..end]
                .iter()
                .chain(self.guess.iter().take(part.proposed))
                .copied()
                .collect(),
            first_position: start,
            prompt: self.prompt,
            table: part.table,
            logits: wanted.start..wanted.end + part.proposed,
            vectors: self.pool.is_some(),
            adapter: self.adapter.clone(),
        }
    }

    /// Which tokens of `start..end` want logits, counted from `start`: those before a prompt token if the prompt
    /// is scored, and the last one known if another is to be chosen.
    fn wanted(&self, start: usize, end: usize) -> Range<usize> {
        if let Some(pool) = &self.pool {
            return pool.first_wanted().clamp(start, end) - start..end - start;
        }
        let chooses = end == self.tokens.len() && self.max_tokens > 0;
        let scored = if self.scoring.is_some() { end.min(self.prompt - 1) } else { start };
        let until = if chooses { end } else { scored.max(start) };
        let from = if scored > start { start } else { until - usize::from(chooses) };
        from - start..until - start
    }

    /// Takes the logits that follow the token at `position`, or the vector of that token.
    pub fn take_logits(&mut self, position: usize, logits: &[f32]) {
        if let Some(pool) = &mut self.pool {
            return pool.add(position, logits);
        }
        if let Err(error) = self.read_logits(position, logits) {
            let what = format!("the logits after token {position} cannot be used: {error}");
            self.end.get_or_insert(End::Failed(what));
        }
    }

    fn read_logits(&mut self, position: usize, logits: &[f32]) -> Result<(), SampleError> {
        let next = position + 1;
        if next < self.prompt {
            let scoring = self.scoring.as_mut().expect("asked for only to score the prompt");
            // A preempted sequence computes again what was reported already.
            if scoring.rows.len() == next {
                let report = LogSoftmax::new(logits)?.report(self.tokens[next], scoring.alternatives);
                scoring.rows.push(Some(report));
            }
            return Ok(());
        }
        // What follows a guess that was wrong says nothing.
        let computed =
            if position < self.known { self.tokens[position] } else { self.guess[position - self.known] };
        if self.end.is_some() || self.tokens.len() != next || self.tokens[position] != computed {
            return Ok(());
        }
        let allowed = self.allowed(logits)?;
        let token = self.sampler.choose(&allowed, next)?;
        let logprobs = match self.logprobs {
            Some(alternatives) => Some(LogSoftmax::new(logits)?.report(token, alternatives)),
            None => None,
        };
        self.take_token(token, logprobs);
        Ok(())
    }

    /// Goes on by a token, or comes to its end.
    fn take_token(&mut self, id: u32, logprobs: Option<TokenLogprobs>) {
        if self.stop_tokens.contains(&id) {
            self.end = Some(End::Finished(FinishReason::Stop));
            return;
        }
        self.tokens.push(id);
        self.sampler.record(id);
        self.news.push(Event::Token { id, logprobs });
        self.end = match self.constraint.as_mut().map(|constraint| constraint.advance(id)) {
            Some(Err(why)) => Some(End::Failed(why)),
            Some(Ok(true)) => Some(End::Finished(FinishReason::Stop)),
            _ if self.tokens.len() - self.prompt >= self.max_tokens => {
                Some(End::Finished(FinishReason::Length))
            }
            _ => None,
        };
    }

    /// The logits with what must not come next at −∞.
    fn allowed<'a>(&mut self, logits: &'a [f32]) -> Result<Cow<'a, [f32]>, SampleError> {
        let mut logits = Cow::Borrowed(logits);
        if self.tokens.len() - self.prompt < self.min_tokens {
            let logits = logits.to_mut();
            for &token in &self.stop_tokens {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(logits.to_mut()).map_err(SampleError::Constraint)?;
        }
        Ok(logits)
    }

    /// Draws the conclusion of a step that computed everything before position `computed`, and tells the caller.
    pub fn settle(&mut self, computed: usize) -> Outcome {
        if computed < self.known {
            return match self.end.take() {
                Some(End::Failed(why)) => self.fail(why),
                _ => Outcome::Prefilling,
            };
        }
        let failed = matches!(self.end, Some(End::Failed(_)));
        if let Some(scoring) = self.scoring.take().filter(|_| !failed) {
            self.send(Event::Prompt(scoring.rows));
        }
        if let Some(pool) = self.pool.take() {
            self.send(Event::Embedding(pool.finish()));
        }
        let grew = self.news.len();
        for event in std::mem::take(&mut self.news) {
            self.send(event);
        }
        match self.end.take() {
            Some(End::Failed(why)) => {
                self.fail(why);
                Outcome::Ended { grew, finished: false }
            }
            Some(End::Finished(reason)) => self.finish(reason, grew),
            // Nothing was to be generated.
            None if grew == 0 => self.finish(FinishReason::Length, 0),
            None => Outcome::Grew(grew),
        }
    }

    /// Ends it with a sentence.
    pub fn fail(&self, why: String) -> Outcome {
        self.send(Event::Failed(why));
        Outcome::Ended { grew: 0, finished: false }
    }

    fn finish(&self, reason: FinishReason, grew: usize) -> Outcome {
        self.send(Event::Finished { reason, cached_tokens: self.cached });
        Outcome::Ended { grew, finished: true }
    }

    /// A caller that is gone is noticed by [`Sequence::is_cancelled`].
    fn send(&self, event: Event) {
        self.events.send(event).ok();
    }
}
