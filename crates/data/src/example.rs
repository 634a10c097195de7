//! Rows → examples: token ids with labels.

use crate::error::Error;
use crate::format::{Instruction, Row, TokenRow};
use crate::message::Message;
use crate::template::ChatTemplate;
use crate::tokenizer::{Tokenizer, Tokens};
use crate::turns::{self, MarkedText, Turns};
use crate::{Example, IGNORE};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::ops::Range;

/// Which tokens of a conversation or instruction count towards the loss. Plain text is trained as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// What the assistant says, its end-of-turn token included.
    #[default]
    Assistant,
    /// Everything.
    All,
}

/// Makes examples of rows.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// Needed for everything but token ids.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Needed for conversations.
    pub template: Option<&'a ChatTemplate>,
    /// Which tokens count.
    pub train_on: TrainOn,
    /// Longest example. Longer text is cut into several examples; anything else loses its end.
    pub max_seq_len: usize,
}

/// What became of one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    /// Its examples, all with at least one trained token. A preference gives two: chosen, then rejected.
    pub examples: Vec<Example>,
    /// Examples that lost their end to `max_seq_len`; a pair counts once.
    pub truncated: usize,
    /// Examples left out because no token of them is trained; pairs, because none of one reply is.
    pub dropped: usize,
    /// The pair was left out because its replies are the same tokens.
    pub identical: bool,
    /// The template rewrites earlier turns, so that only the last ones of a reply are trained.
    pub reply_rewritten: bool,
    /// The template rewrites earlier turns, so that the conversation became one example for each assistant turn.
    pub split_by_turn: bool,
    /// The template's generation prompt is not how the assistant's turns begin.
    pub prompt_differs: bool,
}

impl Encoder<'_> {
    /// Makes examples of a row of format `format` (a name, for messages).
    ///
    /// # Errors
    /// When the row needs a tokenizer or template that is not there, or the template refuses it.
    pub fn encode(&self, row: &Row, format: &str) -> Result<Encoded, Error> {
        match row {
            Row::Tokens(row) => Ok(self.finish(vec![from_row(row)])),
            Row::Conversation { messages, variables } => {
                self.conversation(self.tokenizer(format)?, self.template(format)?, messages, variables)
            }
            Row::Instruction(instruction) => {
                let tokenizer = self.tokenizer(format)?;
                match self.template {
                    Some(template) => {
                        self.conversation(tokenizer, template, &conversation_of(instruction), &Map::new())
                    }
                    None => Ok(self.finish(vec![self.instruction(tokenizer, instruction)?])),
                }
            }
            Row::Text(text) => Ok(self.finish(self.text(self.tokenizer(format)?, text)?)),
            Row::Preference(preference) => self.preference(preference, format),
        }
    }

    pub(crate) fn tokenizer(&self, format: &str) -> Result<&Tokenizer, Error> {
        self.tokenizer.ok_or_else(|| Error::NoTokenizer { format: format.to_owned() })
    }

    pub(crate) fn template(&self, format: &str) -> Result<&ChatTemplate, Error> {
        self.template.ok_or_else(|| Error::NoTemplate { format: format.to_owned() })
    }

    fn conversation(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        messages: &[Message],
        variables: &Map<String, Value>,
    ) -> Result<Encoded, Error> {
        let turns = match self.train_on {
            TrainOn::Assistant => turns::find(template, messages, variables)?,
            TrainOn::All => {
                let text = template.render(messages, false, variables)?;
                let everything = Range { start: 0, end: text.len() };
                let texts = vec![MarkedText { text, trained: vec![everything] }];
                Turns { texts, rewrites: false, prompt_differs: false }
            }
        };
        let examples = turns
            .texts
            .iter()
            .map(|marked| {
                // The template has written BOS where the model wants it.
                let tokens = tokenizer.encode_with_spans(&marked.text, false)?;
                Ok(match self.train_on {
                    TrainOn::Assistant => mask(tokenizer, tokens, &marked.trained),
                    TrainOn::All => from_ids(&tokens.ids, None),
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let encoded = self.finish(examples);
        Ok(Encoded { split_by_turn: turns.rewrites, prompt_differs: turns.prompt_differs, ..encoded })
    }

    /// Stanford Alpaca's prompt, for models without a chat template.
    fn instruction(&self, tokenizer: &Tokenizer, row: &Instruction) -> Result<Example, Error> {
        let prompt = alpaca_prompt(row);
        let text = format!("{prompt}{}", row.output);
        let tokens = tokenizer.encode_with_spans(&text, true)?;
        let answer = prompt.len()..text.len();
        let mut example = match self.train_on {
            TrainOn::Assistant => mask(tokenizer, tokens, std::slice::from_ref(&answer)),
            TrainOn::All => from_ids(&tokens.ids, None),
        };
        end_with_eos(tokenizer, &mut example);
        Ok(example)
    }

    /// A text, ended by EOS, in pieces of `max_seq_len` tokens.
    fn text(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<Example>, Error> {
        let mut whole = from_ids(&tokenizer.encode(text, true)?, None);
        end_with_eos(tokenizer, &mut whole);
        Ok(whole.ids.chunks(self.max_seq_len.max(1)).map(|ids| from_ids(ids, None)).collect())
    }

    /// Truncates, and leaves out what has nothing to train.
    fn finish(&self, examples: Vec<Example>) -> Encoded {
        let mut encoded = Encoded::default();
        for mut example in examples {
            encoded.truncated += usize::from(example.truncate(self.max_seq_len));
            if example.is_untrained() {
                encoded.dropped += 1;
            } else {
                encoded.examples.push(example);
            }
        }
        encoded
    }
}

impl Example {
    /// Cuts the end off if it is longer than `max_seq_len`; tells whether it was.
    pub(crate) fn truncate(&mut self, max_seq_len: usize) -> bool {
        let too_long = self.ids.len() > max_seq_len;
        self.ids.truncate(max_seq_len);
        self.labels.truncate(max_seq_len);
        too_long
    }

    /// Whether no token counts. Nothing predicts the first one, so its label does not.
    pub(crate) fn is_untrained(&self) -> bool {
        self.labels.iter().skip(1).all(|&label| label == IGNORE)
    }
}

fn from_ids(ids: &[u32], labels: Option<&[i32]>) -> Example {
    let labels = labels.map_or_else(|| ids.iter().map(|&id| id as i32).collect(), <[i32]>::to_vec);
    Example { ids: ids.to_vec(), labels, half: None }
}

pub(crate) fn from_row(row: &TokenRow) -> Example {
    from_ids(&row.ids, row.labels.as_deref())
}

/// Labels the tokens that lie in `trained`. A token that begins before a range stays out: at inference it belongs to
/// the prompt. What a template writes after the token that ends a turn (a line break, mostly) is not the
/// assistant's, and stays out too.
pub(crate) fn mask(tokenizer: &Tokenizer, tokens: Tokens, trained: &[Range<usize>]) -> Example {
    let mut labels = vec![IGNORE; tokens.ids.len()];
    for range in trained {
        let inside = |span: &Range<usize>| {
            span.start >= range.start && span.start < range.end && span.end > range.start
        };
        let mut at: Vec<usize> = (0..tokens.ids.len()).filter(|&k| inside(&tokens.spans[k])).collect();
        if let Some(last) = at.iter().rposition(|&k| tokenizer.is_special(tokens.ids[k])) {
            let after = &at[last + 1..];
            let blank = |&k: &usize| tokenizer.token_bytes(tokens.ids[k]).iter().all(u8::is_ascii_whitespace);
            if after.iter().all(blank) {
                at.truncate(last + 1);
            }
        }
        for k in at {
            labels[k] = tokens.ids[k] as i32;
        }
    }
    Example { ids: tokens.ids, labels, half: None }
}

/// Adds EOS where the tokenizer has not, and trains it.
pub(crate) fn end_with_eos(tokenizer: &Tokenizer, example: &mut Example) {
    let Some(eos) = tokenizer.eos_id() else { return };
    if example.ids.last() == Some(&eos) {
        example.labels.pop();
    } else {
        example.ids.push(eos);
    }
    example.labels.push(eos as i32);
}

fn conversation_of(row: &Instruction) -> Vec<Message> {
    let mut messages = Vec::with_capacity(3);
    if let Some(system) = &row.system {
        messages.push(Message::new("system", system.as_str()));
    }
    let separator = if row.input.is_empty() { "" } else { "\n\n" };
    messages.push(Message::new("user", format!("{}{separator}{}", row.instruction, row.input)));
    messages.push(Message::new("assistant", row.output.as_str()));
    messages
}

/// The prompt of <https://github.com/tatsu-lab/stanford_alpaca>; a system message takes the place of its preamble.
fn alpaca_prompt(row: &Instruction) -> String {
    let preamble = match (&row.system, row.input.is_empty()) {
        (Some(system), _) => system,
        (None, true) => {
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        }
        (None, false) => {
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request."
        }
    };
    let input = if row.input.is_empty() { String::new() } else { format!("### Input:\n{}\n\n", row.input) };
    format!("{preamble}\n\n### Instruction:\n{}\n\n{input}### Response:\n", row.instruction)
}
