//! Drives one sequence: submits it, turns events into text, measures, cancels.

use super::stops::StopMatcher;
use super::text::SequenceText;
use super::{Finish, Piece, Update};
use crate::constrain::AT_FAULT;
use crate::constrain::format::Format;
use crate::error::ApiError;
use crate::metrics::{Timing, reason_name};
use crate::record::{About, Recording};
use crate::state::{AppState, Loaded, Phase, SequenceGuard};
use hearth_engine::api::{Event, FinishReason, Generation, Request, Standing, SubmitError, TokenLogprobs};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, watch};

/// Pause before a sequence of a batch knocks again at a full queue.
const KNOCK_AGAIN: Duration = Duration::from_millis(20);

/// One sequence to be generated, and what its text is to look like.
pub(crate) struct Sequence {
    pub(crate) request: Request,
    /// Begin with the prompt.
    pub(crate) echo: bool,
    /// Report the prompt's log-probabilities with this many alternatives.
    pub(crate) prompt_logprobs: Option<usize>,
    /// The prompt in the client's words.
    pub(crate) prompt_text: Option<Arc<str>>,
    pub(crate) stops: Vec<String>,
    /// The stop string stays at the end of the text.
    pub(crate) include_stop: bool,
    /// How the request stands in the queue.
    pub(crate) standing: Standing,
    /// What `request`'s grammar was made of.
    pub(crate) format: Option<Arc<Format>>,
    /// Tokens that end the sequence but are reported with their log-probability. A harness that scores prompts reads
    /// one more entry than there are prompt tokens, whatever that last token is.
    pub(crate) reported_stop_tokens: Vec<u32>,
    pub(crate) skip_special: bool,
}

/// Updates of all sequences of a request, each with the sequence's index. Dropping this cancels them.
pub(crate) type Updates = UnboundedReceiver<(usize, Update)>;

/// Starts `sequences`. At most [`max_seqs`](crate::ServerConfig::max_seqs) of them are with the engine at a time.
///
/// # Errors
/// When the engine does not take the first one. The others wait for room.
pub(crate) fn start(
    state: &AppState,
    service: &Arc<Loaded>,
    sequences: Vec<Sequence>,
    about: About,
    arrived: Instant,
) -> Result<Updates, ApiError> {
    let (sender, updates) = unbounded_channel();
    let about = Arc::new(about);
    let wants_content = state.config().observers.want_content();
    let room = Arc::new(Semaphore::new(state.config().max_seqs.max(1)));
    for (index, mut sequence) in sequences.into_iter().enumerate() {
        sequence.standing.max_queue_time = state.config().max_queue_time;
        let generation = match index {
            0 => Some(service.engine.submit_as(sequence.request.clone(), sequence.standing.clone())?),
            _ => None,
        };
        let task = Task {
            state: state.clone(),
            service: service.clone(),
            out: Outlet { index, sender: sender.clone() },
            room: room.clone(),
            phase: state.phase(),
            timing: Timing::new(state.metrics().clone(), arrived),
            recording: Recording {
                about: about.clone(),
                sequence: index,
                arrived,
                started: None,
                first: None,
                generated: 0,
                cached_tokens: 0,
                tokens: wants_content.then(Vec::new),
            },
            _guard: state.count_sequence(),
        };
        tokio::spawn(task.run(sequence, generation));
    }
    Ok(updates)
}

struct Outlet {
    index: usize,
    sender: UnboundedSender<(usize, Update)>,
}

impl Outlet {
    fn send(&self, update: Update) {
        // Nobody listening means cancelled; `run` notices by `closed`.
        let _ = self.sender.send((self.index, update));
    }
}

struct Task {
    state: AppState,
    service: Arc<Loaded>,
    out: Outlet,
    room: Arc<Semaphore>,
    phase: watch::Receiver<Phase>,
    timing: Timing,
    recording: Recording,
    _guard: SequenceGuard,
}

impl Task {
    /// Runs to the end, the client's leaving, the request's deadline or the server's end, whichever is first.
    async fn run(mut self, sequence: Sequence, generation: Option<Generation>) {
        let left = self.out.sender.clone();
        let deadline = deadline(self.state.config().request_timeout, self.timing.arrived());
        let mut phase = self.phase.clone();
        let end = tokio::select! {
            biased;
            () = left.closed() => Ok("cancelled"),
            _ = phase.wait_for(|phase| *phase == Phase::Ending) => Err(ApiError::shutting_down()),
            limit = deadline => Err(ApiError::request_timeout(limit)),
            done = self.generate(&sequence, generation) => done.map(reason_name),
        };
        let (end, failure) = match end {
            Ok(end) => (end, None),
            Err(error) => ("failed", Some(error)),
        };
        let error = failure.as_ref().map(ToString::to_string);
        let record = self.recording.finish(&sequence.request, sequence.format.as_deref(), end, error);
        self.state.config().observers.tell(&record);
        if let Some(failure) = failure {
            self.out.send(Update::Failed(failure));
        }
    }

    async fn generate(
        &mut self,
        sequence: &Sequence,
        generation: Option<Generation>,
    ) -> Result<FinishReason, ApiError> {
        let room = self.room.clone();
        let _permit = room.acquire().await;
        let mut generation = match generation {
            Some(generation) => generation,
            None => self.submit(sequence).await?,
        };
        let stops = StopMatcher::new(sequence.stops.clone(), sequence.include_stop);
        let mut text = SequenceText::new(self.service.tokenizer.as_ref(), sequence.skip_special, stops)
            .at_least(sequence.request.sampling.min_tokens);
        let waits_for_logprobs = sequence.request.prompt_logprobs.is_some();
        if !waits_for_logprobs {
            self.begin(sequence, &mut text, Vec::new())?;
        }
        while let Some(event) = generation.next().await {
            match event {
                Event::Prompt(logprobs) if waits_for_logprobs => self.begin(sequence, &mut text, logprobs)?,
                Event::Prompt(_) | Event::Embedding(_) => {}
                Event::Token { id, logprobs } => {
                    self.note(&generation, id);
                    if self.token(sequence, &mut text, id, logprobs)? {
                        return Ok(FinishReason::Stop);
                    }
                }
                Event::Finished { reason, cached_tokens } => {
                    self.recording.started = generation.started();
                    self.recording.cached_tokens = cached_tokens;
                    self.end(text.finish().map_err(internal)?, Finish { reason, cached_tokens });
                    return Ok(reason);
                }
                // Trying again would fail again.
                Event::Failed(why) if why.contains(AT_FAULT) => {
                    return Err(ApiError::bad_request(why));
                }
                Event::Overdue { limit } => {
                    let retry_after_s = self.service.engine.retry_after_s();
                    return Err(ApiError::queue_timeout(limit, retry_after_s));
                }
                Event::Failed(why) => return Err(ApiError::internal(why)),
            }
        }
        Err(ApiError::internal("the engine ended the generation without a result"))
    }

    /// Remembers when a token came, and which.
    fn note(&mut self, generation: &Generation, id: u32) {
        self.timing.token();
        let recording = &mut self.recording;
        recording.generated += 1;
        if recording.first.is_none() {
            recording.first = Some(Instant::now());
            recording.started = generation.started();
            recording.started.into_iter().for_each(|at| self.timing.started(at));
        }
        if let Some(tokens) = &mut recording.tokens {
            tokens.push(id);
        }
    }

    /// Waits for a place in the engine's queue.
    async fn submit(&self, sequence: &Sequence) -> Result<Generation, ApiError> {
        loop {
            match self.service.engine.submit_as(sequence.request.clone(), sequence.standing.clone()) {
                Err(SubmitError::Busy { .. }) => tokio::time::sleep(KNOCK_AGAIN).await,
                result => return Ok(result?),
            }
        }
    }

    fn begin(
        &self,
        sequence: &Sequence,
        text: &mut SequenceText,
        logprobs: Vec<Option<TokenLogprobs>>,
    ) -> Result<(), ApiError> {
        let prompt = &sequence.request.prompt;
        if let Some(most) = sequence.prompt_logprobs {
            self.out.send(Update::Scored(with_at_most(most, logprobs.clone())));
        }
        if !sequence.echo {
            return text.skip_prompt(prompt).map_err(internal);
        }
        // What was scored for another reason is not shown here.
        let logprobs = match sequence.request.logprobs {
            Some(most) => with_at_most(most, logprobs),
            None => Vec::new(),
        };
        let echo = text.echo(prompt, sequence.prompt_text.as_deref(), logprobs).map_err(internal)?;
        self.out.send(Update::Echo(echo));
        Ok(())
    }

    /// Takes a token; `true` when it was the last.
    fn token(
        &mut self,
        sequence: &Sequence,
        text: &mut SequenceText,
        id: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Result<bool, ApiError> {
        let stop = Finish { reason: FinishReason::Stop, cached_tokens: 0 };
        if sequence.reported_stop_tokens.contains(&id) {
            text.push_silent(id, logprobs);
            self.end(text.finish().map_err(internal)?, stop);
            return Ok(true);
        }
        let (piece, stopped) = text.push(id, logprobs).map_err(internal)?;
        match stopped {
            true => self.end(piece, stop),
            false => self.out.send(Update::Piece(piece)),
        }
        Ok(stopped)
    }

    fn end(&mut self, piece: Piece, finish: Finish) {
        self.timing.finished(finish.reason);
        self.out.send(Update::Piece(Piece { finish: Some(finish), ..piece }));
    }
}

/// The reports with so many alternatives: a prompt is scored once, for whoever wants most.
fn with_at_most(most: usize, mut rows: Vec<Option<TokenLogprobs>>) -> Vec<Option<TokenLogprobs>> {
    rows.iter_mut().flatten().for_each(|row| row.top.truncate(most));
    rows
}

/// Completes when the request has taken too long, with the limit.
async fn deadline(limit: Option<Duration>, arrived: Instant) -> Duration {
    match limit {
        Some(limit) => {
            tokio::time::sleep_until((arrived + limit).into()).await;
            limit
        }
        None => std::future::pending().await,
    }
}

fn internal(error: hearth_data::Error) -> ApiError {
    ApiError::internal(error.to_string())
}
