//! One question over real HTTP, as any OpenAI client would put it.

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::time::Instant;

/// A question and what was said.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// The question.
    pub prompt: String,
    /// The answer.
    pub text: String,
    /// Tokens per second after the first.
    #[serde(skip)]
    pub decode_tok_s: f64,
}

/// Asks and reads the streamed answer.
///
/// # Errors
/// A server that refuses, breaks off or says something else than server-sent events.
pub fn ask(url: &str, question: &str) -> anyhow::Result<Answer> {
    let body = json!({
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 48,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let response =
        ureq::post(format!("{url}/v1/chat/completions")).send_json(&body).context("the server refused")?;
    let (mut text, mut first, mut last, mut tokens) = (String::new(), None, Instant::now(), 0);
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line.context("the answer broke off")?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(Answer { prompt: question.into(), text, decode_tok_s: speed(tokens, first, last) });
        }
        let chunk: Value = serde_json::from_str(data).context("an event that is not JSON")?;
        if let Some(error) = chunk.get("error") {
            bail!("the server could not go on: {error}");
        }
        if let Some(words) = chunk["choices"][0]["delta"]["content"].as_str() {
            text.push_str(words);
            last = Instant::now();
            first.get_or_insert(last);
        }
        tokens = chunk["usage"]["completion_tokens"].as_u64().unwrap_or(tokens);
    }
    bail!("the answer broke off")
}

fn speed(tokens: u64, first: Option<Instant>, last: Instant) -> f64 {
    let time = first.map_or(0.0, |first| (last - first).as_secs_f64());
    if time > 0.0 { tokens.saturating_sub(1) as f64 / time } else { 0.0 }
}
