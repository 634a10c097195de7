//! Speculative decoding: several tokens of a sequence in one forward pass.
//!
//! Behind the token that is due, a pass computes tokens that were guessed to follow it. Then each position is sampled as
//! ever, with the request's own parameters and the position's own random number, and sampling goes on as long as the
//! guess is what was sampled. Since a row's logits depend on the tokens before it and on nothing else, the tokens are
//! those of decoding one by one, bit for bit, whatever was guessed; a guess decides only how many come at once.
//!
//! Guesses are looked up in the sequence itself (prompt lookup, n-grams): what followed the last tokens where they stood
//! before. That is free, and right where a model quotes, edits or repeats. Or a smaller model makes them (`draft`).
//!
//! What costs is the row that checks a guess. The more sequences share a step, the more a row takes of it, so the surer a
//! guess must be: each sequence counts how often its guesses were right, also those it only made in its mind, and tries
//! those that are worth it in the batch as it is.

/// How tokens are guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speculation {
    /// Most tokens guessed at a time.
    pub draft_tokens: usize,
}

/// Most draft tokens at a time that may be asked for.
pub const MOST_DRAFT_TOKENS: usize = 32;
/// Shortest run of tokens that must have occurred before.
const SHORTEST: usize = 2;
/// Longest run that is looked for: two places that agree in so many tokens are equally good.
const LONGEST: usize = 8;
/// Tokens without a guess after those of a draft model were not worth their cost; twice as many each time, up to
/// [`LONGEST_PAUSE`].
const PAUSE: usize = 8;
const LONGEST_PAUSE: usize = 256;
/// A step takes as long before its first row as so many more rows take: with weights in memory, those are read once for all
/// rows.
const ROWS_OF_A_STEP: f32 = 3.0;
/// How many times as long a weight takes to come from disk.
const SLOWNESS_OF_DISK: f32 = 8.0;
/// Weight of the newest guess in the share of those that were right.
const NEWEST: f32 = 0.125;

/// Where guesses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The sequence itself.
    Lookup,
    /// A model that runs before each step.
    Draft,
}

/// What a guess costs, as shares of what a step costs.
///
/// A step of `b` rows takes the time of `c + b` rows and gives each sequence a token. One more row is worth it if it brings
/// a token with a probability of `b / (c + b)` at least: alone nearly anything is, in a full batch only what is nearly
/// certain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cost {
    /// `c`.
    rows_of_a_step: f32,
    /// What a pass of the draft model takes of a step.
    draft: f32,
}

impl Cost {
    /// Of a model whose weights take `bytes`, `streamed` of them from disk in every step, and a draft model of
    /// `draft_bytes`.
    pub(crate) fn new(bytes: u64, streamed: u64, draft_bytes: u64) -> Self {
        let bytes = bytes.max(1) as f32;
        let slower = 1.0 + SLOWNESS_OF_DISK * streamed as f32 / bytes;
        Self { rows_of_a_step: ROWS_OF_A_STEP * slower, draft: draft_bytes as f32 / (bytes * slower) }
    }

    /// The least probability at which a guess pays among so many sequences: the `n`-th, counted from 0. A draft model's first
    /// is not charged with the pass it comes from: who never tries never learns.
    fn least(&self, batch: usize, n: usize) -> f32 {
        let batch = batch.max(1) as f32;
        batch / (self.rows_of_a_step + batch) + if n == 0 { 0.0 } else { self.draft }
    }
}

/// One sequence's guesses, and how much they are worth: what is guessed wrong was computed for nothing.
#[derive(Clone, Debug)]
pub(crate) struct Guesser {
    source: Source,
    cost: Cost,
    most: usize,
    /// How many of the tokens guessed were right, where those before them were: by the length of the run that they were
    /// found behind; a draft model's have one figure.
    right: [f32; LONGEST + 1],
    /// Length of the run behind which the last guess was found.
    run: usize,
    /// Tokens left without a guess.
    pause: usize,
    /// How many they are next time.
    next_pause: usize,
}

impl Guesser {
    pub(crate) fn new(speculation: Speculation, source: Source, cost: Cost) -> Self {
        // The longer the run, the likelier it goes on; a sequence soon knows better.
        let at_first = |run: usize| 1.0 - 1.0 / run.max(2) as f32;
        let right = match source {
            Source::Lookup => std::array::from_fn(at_first),
            Source::Draft => [0.8; LONGEST + 1],
        };
        let most = speculation.draft_tokens;
        Self { source, cost, most, right, run: 0, pause: 0, next_pause: PAUSE }
    }

    /// Puts what probably follows `tokens` into `guess`, nothing if there is no reason to think so, and says how many of
    /// those tokens are worth a try beside so many other sequences. A draft model's guess comes later.
    pub(crate) fn guess(&mut self, tokens: &[u32], batch: usize, guess: &mut Vec<u32>) -> usize {
        guess.clear();
        match self.source {
            Source::Lookup => {
                let (run, found) = lookup(tokens, self.most);
                self.run = run;
                guess.extend(found);
                self.worth(batch, guess.len())
            }
            Source::Draft if self.pause > 0 => {
                self.pause -= 1;
                // One, to see whether it is right by now.
                usize::from(self.pause == 0)
            }
            Source::Draft => {
                let count = self.worth(batch, self.most);
                if count == 0 {
                    self.pause = self.next_pause;
                    self.next_pause = (2 * self.next_pause).min(LONGEST_PAUSE);
                }
                count
            }
        }
    }

    /// How many of `count` tokens are likely enough to be right.
    fn worth(&self, batch: usize, count: usize) -> usize {
        let mut likely = 1.0;
        let pays = |n: &usize| {
            likely *= self.right[self.behind(*n)];
            likely >= self.cost.least(batch, *n)
        };
        (0..count).take_while(pays).count()
    }

    /// Which figure tells of the `n`-th token of a guess: each is found behind a run one token longer.
    fn behind(&self, n: usize) -> usize {
        match self.source {
            Source::Lookup => (self.run + n).min(LONGEST),
            Source::Draft => 0,
        }
    }

    /// Learns from the tokens that came, of which some had been guessed, tried or not.
    pub(crate) fn learn(&mut self, guess: &[u32], given: &[u32]) {
        for (n, (guessed, given)) in guess.iter().zip(given).enumerate() {
            let right = guessed == given;
            let share = &mut self.right[self.behind(n)];
            *share += NEWEST * (f32::from(right) - *share);
            if !right {
                return;
            }
            self.next_pause = PAUSE;
        }
    }
}

/// What followed the last tokens where the longest run of them stood before, the latest among equals, and that run's length.
/// Where that runs into the end of what is known it goes on from its own beginning: a loop is guessed to go on.
fn lookup(tokens: &[u32], count: usize) -> (usize, Vec<u32>) {
    let Some((&last, before)) = tokens.split_last() else { return (0, Vec::new()) };
    let mut best = (SHORTEST - 1, 0);
    for (i, _) in before.iter().enumerate().rev().filter(|(_, token)| **token == last) {
        let run = before[..i].iter().rev().zip(before.iter().rev()).take(LONGEST - 1);
        let length = 1 + run.take_while(|(a, b)| a == b).count();
        if length > best.0 {
            best = (length, i + 1);
        }
        if length == LONGEST {
            break;
        }
    }
    match best {
        (length, _) if length < SHORTEST => (0, Vec::new()),
        (length, start) => (length, tokens[start..].iter().cycle().take(count).copied().collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_run_decides_and_among_equals_the_latest() {
        for (tokens, expected) in [
            (&[][..], &[][..]),
            (&[1], &[]),
            (&[1, 2, 3], &[]),
            (&[1, 2, 9, 2], &[]),
            (&[1, 2, 3, 4, 1, 2], &[3, 4, 1, 2]),
            (&[1, 2, 3, 9, 1, 2, 4, 8, 1, 2], &[4, 8, 1, 2]),
            (&[0, 1, 2, 3, 9, 5, 1, 2, 4, 8, 0, 1, 2], &[3, 9, 5, 1]),
            (&[7, 7, 7], &[7, 7, 7, 7]),
            (&[5, 1, 2, 1, 2], &[1, 2, 1, 2]),
        ] {
            assert_eq!(lookup(tokens, 4).1, expected, "{tokens:?}");
        }
        assert_eq!(lookup(&[1, 2, 1, 2], 0), (2, vec![]));
    }

    fn guesser(source: Source, cost: Cost) -> Guesser {
        Guesser::new(Speculation { draft_tokens: 6 }, source, cost)
    }

    /// How many are tried beside so many sequences, when so many of a hundred were right.
    fn tried(source: Source, cost: Cost, right: usize, batch: usize) -> usize {
        let mut guesser = guesser(source, cost);
        // A run of two, of three, and so on.
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3];
        let mut guess = Vec::new();
        for i in 0..300 {
            guesser.guess(&tokens, 1, &mut guess);
            let came = if i * right % 100 < right { [4, 5, 6, 7, 8, 9] } else { [0; 6] };
            // Of what is not certain the first token tells enough.
            let told = if right == 100 { 6 } else { 1 };
            guesser.learn(&[4, 5, 6, 7, 8, 9][..told], &came);
        }
        guesser.pause = 0;
        guesser.guess(&tokens, batch, &mut guess)
    }

    #[test]
    fn the_larger_the_batch_the_surer_a_guess_must_be() {
        let cost = Cost::new(1000, 0, 0);
        for source in [Source::Lookup, Source::Draft] {
            let tried = |right, batch| tried(source, cost, right, batch);
            assert_eq!([1, 8, 32].map(|batch| tried(100, batch)), [6, 6, 6], "certain, so never in vain");
            assert_eq!([1, 8, 32].map(|batch| tried(0, batch)), [0, 0, 0]);
            assert!(tried(50, 1) > 0 && tried(50, 8) == 0, "{source:?}");
        }
    }

    #[test]
    fn where_weights_come_from_disk_a_guess_costs_little() {
        let (memory, disk) = (Cost::new(1000, 0, 0), Cost::new(1000, 900, 0));
        for batch in [1, 8, 32] {
            assert!(disk.least(batch, 0) < memory.least(batch, 0));
        }
        assert!(tried(Source::Lookup, disk, 50, 8) > 0);
    }

    #[test]
    fn a_draft_model_s_passes_are_counted_after_the_first() {
        let large = Cost::new(1000, 0, 900);
        assert_eq!([1, 8].map(|batch| tried(Source::Draft, large, 100, batch)), [1, 1]);
        let small = Cost::new(1000, 0, 50);
        assert_eq!([1, 8].map(|batch| tried(Source::Draft, small, 100, batch)), [6, 6]);
    }

    #[test]
    fn what_was_not_tried_is_learned_from_all_the_same() {
        let mut guesser = guesser(Source::Lookup, Cost::new(1000, 0, 0));
        let (tokens, mut guess) = ([1, 2, 3, 1, 2], Vec::new());
        assert_eq!(guesser.guess(&tokens, 32, &mut guess), 0, "too many others");
        for _ in 0..40 {
            guesser.learn(&[3, 1, 2, 3, 1, 2], &[3, 1, 2, 3, 1, 2]);
            guesser.guess(&tokens, 32, &mut guess);
        }
        assert_eq!((guesser.guess(&tokens, 32, &mut guess), guess.len()), (6, 6));
    }

    #[test]
    fn a_draft_model_that_is_wrong_is_asked_less_and_less() {
        let mut guesser = guesser(Source::Draft, Cost::new(1000, 0, 50));
        let mut asked = Vec::new();
        for token in 0..700 {
            if guesser.guess(&[1, 2], 8, &mut Vec::new()) > 0 {
                asked.push(token);
                guesser.learn(&[7], &[8]);
            }
        }
        let gaps: Vec<usize> = asked.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps.is_sorted() && gaps.last() > Some(&200), "{gaps:?}");
    }
}
