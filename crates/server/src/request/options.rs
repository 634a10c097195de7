//! What completions and chat have in common: sampling, stops, streaming.

use super::fields::{Fields, as_token, describe};
use crate::constrain::format::{self, Asked};
use crate::error::ApiError;
use crate::state::Loaded;
use hearth_engine::api::{Sampling, Standing};
use serde_json::Value;
use std::hash::{BuildHasher, RandomState};

/// Most choices per prompt.
pub(crate) const MOST_CHOICES: usize = 128;
/// Most alternatives per position.
pub(crate) const MOST_LOGPROBS: usize = 20;
/// Most stop strings, and their longest length in bytes: each generated token is compared with all of them.
const MOST_STOPS: usize = 32;
const LONGEST_STOP: usize = 512;

/// Options of a generation, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Options {
    pub(crate) sampling: Sampling,
    /// Choices per prompt.
    pub(crate) n: usize,
    /// Texts that end a choice.
    pub(crate) stop: Vec<String>,
    /// The stop string stays at the end of the text.
    pub(crate) include_stop: bool,
    /// What the output must conform to.
    pub(crate) format: Asked,
    /// Tokens that end a choice, besides the model's own.
    pub(crate) stop_token_ids: Vec<u32>,
    /// Go on after the model's end-of-sequence token.
    pub(crate) ignore_eos: bool,
    /// Leave control tokens out of the text.
    pub(crate) skip_special_tokens: bool,
    /// Give token ids beside the text.
    pub(crate) return_token_ids: bool,
    /// Report each prompt token's log-probability, and those of this many alternatives.
    pub(crate) prompt_logprobs: Option<usize>,
    /// How the request stands in the queue.
    pub(crate) standing: Standing,
    /// `None` = one JSON answer.
    pub(crate) stream: Option<StreamOptions>,
}

/// How to stream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct StreamOptions {
    /// End with a chunk without choices that holds the usage.
    pub(crate) include_usage: bool,
    /// Put the usage so far into every chunk.
    pub(crate) continuous_usage: bool,
}

impl Options {
    /// Takes the common fields out of a request.
    pub(crate) fn take(fields: &mut Fields, vocab_size: usize) -> Result<Self, ApiError> {
        let stream = stream(fields)?;
        Ok(Self {
            sampling: sampling(fields, vocab_size)?,
            n: fields.integer("n", 1..=MOST_CHOICES as i64)?.map_or(1, |n| n as usize),
            stop: stop(fields)?,
            include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
            format: format::take(fields)?,
            stop_token_ids: stop_token_ids(fields)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            prompt_logprobs: prompt_logprobs(fields, stream.is_some())?,
            standing: standing(fields)?,
            stream,
        })
    }

    /// Whether the text itself matters: stop strings are looked for in it, formats are about it.
    pub(crate) fn needs_text(&self) -> bool {
        !self.stop.is_empty() || self.format.is_some()
    }

    /// Compiles the format and chooses a seed where none was given, so that it can be told afterwards.
    ///
    /// # Errors
    /// 400 when the format cannot be used, or fewer tokens are allowed than are demanded.
    pub(crate) fn settle(&mut self, service: &Loaded, max_tokens: Option<usize>) -> Result<(), ApiError> {
        let least = self.sampling.min_tokens;
        if let Some(most) = max_tokens.filter(|&most| most < least) {
            let message = format!("\"min_tokens\" is {least}, which is more than the {most} allowed");
            return Err(ApiError::field("min_tokens", message));
        }
        if let Some((format, field)) = &self.format {
            if least > 0 {
                let message = format!("\"min_tokens\" cannot be combined with {field:?}");
                return Err(ApiError::field("min_tokens", message));
            }
            self.sampling.grammar = Some(service.grammars()?.compile(format, field)?);
        }
        self.sampling.seed.get_or_insert_with(|| RandomState::new().hash_one("a fresh seed"));
        Ok(())
    }

    /// Tokens that end a choice of a model with these end-of-sequence tokens.
    pub(crate) fn stop_tokens(&self, eos_tokens: &[u32]) -> Vec<u32> {
        // Where a format is complete nothing but the end may follow.
        let ignored = self.ignore_eos && self.sampling.grammar.is_none();
        let eos_tokens = if ignored { &[] } else { eos_tokens };
        [eos_tokens, &self.stop_token_ids].concat()
    }

    /// Bytes that every choice has a copy of, or two while the engine takes it.
    pub(crate) fn copied(&self) -> usize {
        let stops: usize = self.stop.iter().map(|stop| size_of::<String>() + stop.len()).sum();
        2 * (size_of_val(&self.stop_token_ids[..]) + size_of_val(&self.sampling.logit_bias[..])) + stops
    }

    /// Sampling of choice `index`: with a seed given, each choice has its own, derived from it.
    pub(crate) fn sampling_of(&self, index: usize) -> Sampling {
        let seed = self.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
        Sampling { seed, ..self.sampling.clone() }
    }
}

fn sampling(fields: &mut Fields, vocab_size: usize) -> Result<Sampling, ApiError> {
    let default = Sampling::default();
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(default.temperature),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(default.top_p),
        // −1 is another server's way to say "off".
        top_k: fields.integer("top_k", -1..=i64::MAX)?.map_or(default.top_k, |k| k.max(0) as usize),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(default.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=100.0)?
            .unwrap_or(default.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(default.frequency_penalty),
        logit_bias: logit_bias(fields, vocab_size)?,
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
        min_tokens: fields.count("min_tokens", usize::MAX)?.unwrap_or(0),
        grammar: None,
    })
}

fn prompt_logprobs(fields: &mut Fields, streams: bool) -> Result<Option<usize>, ApiError> {
    let count = fields.count("prompt_logprobs", MOST_LOGPROBS)?;
    if count.is_some() && streams {
        let message = "\"prompt_logprobs\" cannot be streamed; leave \"stream\" out";
        return Err(fields.refuse("prompt_logprobs", message));
    }
    Ok(count)
}

fn logit_bias(fields: &mut Fields, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let mut out = Vec::new();
    for (key, value) in biases.rest() {
        let token = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size).ok_or_else(|| {
            fields.refuse(
                "logit_bias",
                format!(
                    "\"logit_bias\" has the key {}; keys must be token ids below {vocab_size}",
                    crate::error::excerpt(&key)
                ),
            )
        })?;
        let bias = value.as_f64().filter(|b| (-100.0..=100.0).contains(b)).ok_or_else(|| {
            fields.refuse(
                "logit_bias",
                format!(
                    "\"logit_bias\" of token {token} must be a number from -100 to 100, not {}",
                    describe(&value)
                ),
            )
        })?;
        out.push((token, bias as f32));
    }
    Ok(out)
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let expected = "a string or a list of strings";
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if list.len() > MOST_STOPS {
        let message = format!("\"stop\" has {} strings; at most {MOST_STOPS} are allowed", list.len());
        return Err(fields.refuse("stop", message));
    }
    list.into_iter()
        .map(|value| match value {
            Value::String(text) if text.is_empty() => {
                Err(fields.refuse("stop", "\"stop\" must not contain an empty string"))
            }
            Value::String(text) if text.len() > LONGEST_STOP => Err(fields.refuse(
                "stop",
                format!("a string in \"stop\" has {} bytes; at most {LONGEST_STOP} are allowed", text.len()),
            )),
            Value::String(text) => Ok(text),
            other => Err(fields.wrong("stop", expected, &other)),
        })
        .collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let list = fields.list("stop_token_ids")?.unwrap_or_default();
    list.iter()
        .map(|v| as_token(v).ok_or_else(|| fields.wrong("stop_token_ids", "a list of token ids", v)))
        .collect()
}

/// Users take turns. Of priorities a lower one comes first, as in vLLM; the engine counts the other way round.
fn standing(fields: &mut Fields) -> Result<Standing, ApiError> {
    let most = i64::from(i32::MAX);
    let priority = fields.integer("priority", -most..=most)?.unwrap_or(0);
    let client = fields.string("user")?.map(Into::into);
    Ok(Standing { client, priority: -(priority as i32), max_queue_time: None })
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let on = fields.boolean("stream")?.unwrap_or(false);
    let options = match fields.object("stream_options")? {
        None => StreamOptions::default(),
        Some(mut options) => StreamOptions {
            include_usage: options.boolean("include_usage")?.unwrap_or(false),
            continuous_usage: options.boolean("continuous_usage_stats")?.unwrap_or(false),
        },
    };
    // Options without a stream mean nothing and hurt nobody: some clients always send them.
    Ok(on.then_some(options))
}
