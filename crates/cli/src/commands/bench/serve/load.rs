//! Lengths, prompts and arrivals, the same for the same seed.

/// Common words; most are one token of most vocabularies.
const WORDS: &[&str] = &[
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job",
    "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father", "power",
    "hour", "game", "line", "end", "member", "law", "car", "city", "name", "team", "minute", "idea", "body",
    "back", "parent", "face", "level", "office", "door", "health", "person", "art", "war", "history",
    "party", "result", "change", "morning", "reason", "research", "girl", "moment", "air", "teacher",
    "force", "order", "green", "river", "stone", "light", "music", "paper", "garden",
];

/// One request to be made.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The prompt.
    pub text: String,
    /// Words in it.
    pub words: usize,
    /// Tokens to generate.
    pub output_tokens: usize,
}

/// What requests look like.
#[derive(Clone, Debug)]
pub struct Load {
    prompt_tokens: usize,
    output_tokens: usize,
    spread: f64,
    tokens_per_word: f64,
    /// How many conversations take turns, and the tokens that all requests of one begin with.
    shared: Option<(usize, usize)>,
}

impl Load {
    /// Normally distributed lengths around two means; `spread` is the standard deviation's share of the mean.
    pub fn new(prompt_tokens: usize, output_tokens: usize, spread: f64) -> Self {
        Self { prompt_tokens, output_tokens, spread, tokens_per_word: 1.0, shared: None }
    }

    /// The same where requests of `conversations` take turns, and those of one begin with the same `tokens`.
    pub fn in_conversations(self, conversations: usize, tokens: usize) -> Self {
        Self { shared: (conversations > 0).then_some((conversations, tokens)), ..self }
    }

    /// Learns how many tokens the server's vocabulary has for so many words.
    pub fn learn(&mut self, words: usize, tokens: usize) {
        if words > 0 && tokens > 0 {
            self.tokens_per_word = tokens as f64 / words as f64;
        }
    }

    /// A prompt of about so many tokens that begins like no other.
    pub fn one(&self, prompt_tokens: usize, output_tokens: usize, seed: u64) -> Planned {
        let words = ((prompt_tokens as f64 / self.tokens_per_word).round() as usize).max(1);
        let mut random = Random(seed);
        let text: Vec<&str> =
            (0..words).map(|_| WORDS[(random.next() % WORDS.len() as u64) as usize]).collect();
        Planned { text: text.join(" "), words, output_tokens }
    }

    /// All requests of a run.
    pub fn plan(&self, count: usize, seed: u64) -> Vec<Planned> {
        let mut random = Random(seed);
        let mut length = |mean: usize| {
            let drawn = mean as f64 * (1.0 + self.spread * random.normal());
            (drawn.round() as usize).clamp(1, mean.saturating_mul(4))
        };
        let lengths: Vec<_> =
            (0..count).map(|_| (length(self.prompt_tokens), length(self.output_tokens))).collect();
        let one = |(i, (prompt, output)): (usize, (usize, usize))| {
            let own = self.one(prompt, output, Random(seed.wrapping_add(i as u64 + 1)).next());
            let Some((conversations, tokens)) = self.shared else { return own };
            let begin = self.one(tokens, 0, Random(!seed ^ (i % conversations) as u64).next());
            Planned { text: begin.text + " " + &own.text, words: begin.words + own.words, ..own }
        };
        lengths.into_iter().enumerate().map(one).collect()
    }
}

/// Moments in seconds at which `count` requests arrive: a Poisson process.
pub fn arrivals(count: usize, rate: f64, seed: u64) -> Vec<f64> {
    let (mut random, mut now) = (Random(seed ^ 0xa221_7a15), 0.0);
    std::iter::repeat_with(|| {
        now -= (1.0 - random.uniform()).ln() / rate;
        now
    })
    .take(count)
    .collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller's transform.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_the_mean_and_the_spread_asked_for() {
        let plan = Load::new(1000, 100, 0.3).plan(4000, 1);
        for (of, mean) in [
            (Box::new(|p: &Planned| p.words) as Box<dyn Fn(&Planned) -> usize>, 1000.0),
            (Box::new(|p: &Planned| p.output_tokens), 100.0),
        ] {
            let values: Vec<f64> = plan.iter().map(|p| of(p) as f64).collect();
            let average = values.iter().sum::<f64>() / 4000.0;
            let deviation = (values.iter().map(|v| (v - average).powi(2)).sum::<f64>() / 4000.0).sqrt();
            assert!((average / mean - 1.0).abs() < 0.02, "{average}");
            assert!((deviation / mean - 0.3).abs() < 0.02, "{deviation}");
        }
        assert_eq!(Load::new(8, 8, 0.3).plan(3, 7)[2].text, Load::new(8, 8, 0.3).plan(3, 7)[2].text);
    }

    #[test]
    fn requests_of_one_conversation_begin_alike_and_go_on_differently() {
        let plan = Load::new(20, 8, 0.0).in_conversations(3, 50).plan(9, 5);
        let words = |i: usize| plan[i].text.split(' ').collect::<Vec<_>>();
        for i in 0..9 {
            assert_eq!((words(i).len(), plan[i].words), (70, 70));
            assert_eq!(words(i)[..50], words(i % 3)[..50]);
            assert_ne!(words(i)[..50], words((i + 1) % 3)[..50]);
            assert!(i < 3 || words(i)[50..] != words(i % 3)[50..]);
        }
    }

    #[test]
    fn arrivals_come_at_the_rate() {
        let moments = arrivals(5000, 4.0, 3);
        assert!(moments.windows(2).all(|pair| pair[0] < pair[1]));
        assert!((moments[4999] / 1250.0 - 1.0).abs() < 0.05, "{}", moments[4999]);
    }
}
