//! Preferences → pairs of examples: the same prompt with the better and with the worse reply.

use crate::error::Error;
use crate::example::{Encoded, Encoder, TrainOn, end_with_eos, from_row, mask};
use crate::format::Preference;
use crate::message::Message;
use crate::template::ChatTemplate;
use crate::tokenizer::{Tokenizer, Tokens};
use crate::turns::{self, Reply};
use crate::{Example, Half, IGNORE};
use serde_json::{Map, Value};

impl Encoder<'_> {
    /// Chosen and rejected, trained on the reply alone. `train_on` says what of a reply counts: the assistant's
    /// turns, or everything after the prompt, as TRL counts.
    pub(crate) fn preference(&self, preference: &Preference, format: &str) -> Result<Encoded, Error> {
        match preference {
            Preference::Tokens { chosen, rejected } => Ok(self.pair(from_row(chosen), from_row(rejected))),
            Preference::Text { prompt, chosen, rejected } => {
                let tokenizer = self.tokenizer(format)?;
                let (mut chosen, mut rejected) =
                    (completed(tokenizer, prompt, chosen)?, completed(tokenizer, prompt, rejected)?);
                train_from_where_they_part(&mut chosen, &mut rejected);
                Ok(self.pair(chosen, rejected))
            }
            Preference::Conversation { prompt, chosen, rejected, variables } => {
                let (tokenizer, template) = (self.tokenizer(format)?, self.template(format)?);
                let reply = |messages: &[Message]| {
                    let whole = [prompt.as_slice(), messages].concat();
                    self.replied(tokenizer, template, &whole, prompt.len(), variables)
                };
                let ((chosen, first), (rejected, second)) = (reply(chosen)?, reply(rejected)?);
                Ok(Encoded {
                    reply_rewritten: first.rewrites || second.rewrites,
                    prompt_differs: first.prompt_differs || second.prompt_differs,
                    ..self.pair(chosen, rejected)
                })
            }
        }
    }

    /// A conversation trained from message `first` on.
    fn replied(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        messages: &[Message],
        first: usize,
        variables: &Map<String, Value>,
    ) -> Result<(Example, Reply), Error> {
        let reply = match self.train_on {
            TrainOn::Assistant => turns::find_reply(template, messages, first, variables)?,
            TrainOn::All => turns::everything_from(template, messages, first, variables)?,
        };
        // The template has written BOS where the model wants it.
        let tokens = tokenizer.encode_with_spans(&reply.marked.text, false)?;
        let example = match (self.train_on, reply.marked.trained.first()) {
            (TrainOn::All, Some(everything)) => trained_from(tokens, everything.start),
            _ => mask(tokenizer, tokens, &reply.marked.trained),
        };
        Ok((example, reply))
    }

    /// Truncates both; a pair of which one half has nothing to train, or whose halves are the same, is left out.
    fn pair(&self, mut chosen: Example, mut rejected: Example) -> Encoded {
        let cut = [&mut chosen, &mut rejected].map(|half| half.truncate(self.max_seq_len));
        let mut encoded = Encoded { truncated: usize::from(cut[0] || cut[1]), ..Encoded::default() };
        if chosen.is_untrained() || rejected.is_untrained() {
            encoded.dropped = 1;
        } else if chosen == rejected {
            encoded.identical = true;
        } else {
            let half = |example: Example, half: Half| Example { half: Some(half), ..example };
            encoded.examples = vec![half(chosen, Half::Chosen), half(rejected, Half::Rejected)];
        }
        encoded
    }
}

/// A text that goes on after its prompt, ended by EOS.
fn completed(tokenizer: &Tokenizer, prompt: &str, reply: &str) -> Result<Example, Error> {
    let tokens = tokenizer.encode_with_spans(&format!("{prompt}{reply}"), true)?;
    let mut example = trained_from(tokens, prompt.len());
    end_with_eos(tokenizer, &mut example);
    Ok(example)
}

/// The end of one prompt may be other tokens before one reply than before the other: these tell the two apart and count.
fn train_from_where_they_part(a: &mut Example, b: &mut Example) {
    let same = a.ids.iter().zip(&b.ids).take_while(|(a, b)| a == b).count();
    for half in [a, b] {
        let untold = half.labels.iter_mut().zip(&half.ids).skip(same);
        untold.for_each(|(label, &id)| *label = id as i32);
    }
}

/// Labels the tokens that hold something at or beyond byte `start`. A token that begins before it counts: where a
/// prompt ends in the middle of a token (a space, mostly), that token may be what tells the replies apart; and where
/// it does not, it has the same probability in both and falls out of their difference.
fn trained_from(tokens: Tokens, start: usize) -> Example {
    let label = |(&id, span): (&u32, &std::ops::Range<usize>)| {
        if span.end > start { id as i32 } else { IGNORE }
    };
    let labels = tokens.ids.iter().zip(&tokens.spans).map(label).collect();
    Example { ids: tokens.ids, labels, half: None }
}
