//! Speculative decoding: several tokens of a sequence in one forward pass.
//!
//! Behind the token that is due, a pass computes tokens that were guessed to follow it. Then each position is sampled as
//! ever, with the request's own parameters and the position's own random number, and sampling goes on as long as the
//! guess is what was sampled. Since a row's logits depend on the tokens before it and on nothing else, the tokens are
//! those of decoding one by one, bit for bit, whatever was guessed; a guess decides only how many come at once.
//!
//! Guesses are looked up in the sequence itself (prompt lookup, n-grams): what followed the last tokens where they stood
//! before. That is free, and right where a model quotes, edits or repeats. Or a smaller model makes them (`draft`).

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
/// Tokens without a guess after a sequence's guesses went wrong down to the last one.
const PAUSE: usize = 8;

/// Where guesses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The sequence itself.
    Lookup,
    /// A model that runs before each step.
    Draft,
}

/// One sequence's guesses, and how much they are worth: what is guessed wrong was computed for nothing.
#[derive(Clone, Debug)]
pub(crate) struct Guesser {
    source: Source,
    most: usize,
    /// How many tokens to guess: doubled when all were right, halved when none was.
    trust: usize,
    /// Tokens left without a guess.
    pause: usize,
}

impl Guesser {
    pub(crate) fn new(speculation: Speculation, source: Source) -> Self {
        let most = speculation.draft_tokens;
        Self { source, most, trust: most, pause: 0 }
    }

    /// Puts what probably follows `tokens` into `guess`, nothing if there is no reason to think so, and says how many
    /// tokens that are. A draft model's guess is as long and comes later.
    pub(crate) fn guess(&mut self, tokens: &[u32], guess: &mut Vec<u32>) -> usize {
        guess.clear();
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        if self.source == Source::Draft {
            return self.trust;
        }
        guess.extend(lookup(tokens, self.trust));
        guess.len()
    }

    /// Learns what became of a guess.
    pub(crate) fn learn(&mut self, proposed: usize, accepted: usize) {
        match (proposed, accepted) {
            (0, _) => {}
            (_, 0) if self.trust == 1 => self.pause = PAUSE,
            (_, 0) => self.trust /= 2,
            (proposed, accepted) if accepted == proposed => self.trust = (self.trust * 2).min(self.most),
            _ => {}
        }
    }
}

/// What followed the last tokens where the longest run of them stood before, the latest among equals. Where that runs
/// into the end of what is known it goes on from its own beginning: a loop is guessed to go on.
fn lookup(tokens: &[u32], count: usize) -> Vec<u32> {
    let Some((&last, before)) = tokens.split_last() else { return Vec::new() };
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
        (length, _) if length < SHORTEST => Vec::new(),
        (_, start) => tokens[start..].iter().cycle().take(count).copied().collect(),
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
            assert_eq!(lookup(tokens, 4), expected, "{tokens:?}");
        }
        assert!(lookup(&[1, 2, 1, 2], 0).is_empty());
    }

    #[test]
    fn what_goes_wrong_is_guessed_less_and_less() {
        let tokens = [1, 2, 3, 4, 5, 6, 1, 2];
        for source in [Source::Lookup, Source::Draft] {
            let mut guesser = Guesser::new(Speculation { draft_tokens: 4 }, source);
            let (mut lengths, mut guess) = (Vec::new(), vec![7]);
            for _ in 0..12 {
                let proposed = guesser.guess(&tokens, &mut guess);
                assert_eq!(guess.len(), if source == Source::Lookup { proposed } else { 0 });
                lengths.push(proposed);
                guesser.learn(proposed, 0);
            }
            assert_eq!(lengths, [4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            guesser.pause = 0;
            for expected in [1, 2, 4, 4] {
                assert_eq!(guesser.guess(&tokens, &mut guess), expected);
                guesser.learn(expected, expected);
            }
        }
    }
}
