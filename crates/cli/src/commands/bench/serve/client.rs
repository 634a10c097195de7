//! One streamed request, token by token.

use super::load::Planned;
use crate::exit::usage;
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

/// Longest wait for anything.
const TIMEOUT: Duration = Duration::from_secs(600);

/// One request from the user's side. Times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sample {
    /// From the start of the run to the asking.
    pub at_ms: f64,
    /// Tokens of the prompt, as the server counts them.
    pub prompt_tokens: usize,
    /// Tokens of the answer, as the server counts them, or else its chunks.
    pub output_tokens: usize,
    /// Prompt tokens the server had in a cache.
    pub cached_tokens: usize,
    /// From asking to the first chunk with a choice.
    pub ttft_ms: f64,
    /// From there to the last, over the tokens between.
    pub tpot_ms: f64,
    /// From asking to the end.
    pub e2e_ms: f64,
    /// Between chunks.
    #[serde(skip)]
    pub gaps_ms: Vec<f64>,
    /// Why there is no answer.
    pub error: Option<String>,
}

/// What a hearth server says of its memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes of weights.
    pub weight_bytes: f64,
    /// Bytes of keys and values of one token.
    pub kv_bytes_per_token: f64,
}

/// Asks one server.
pub struct Client {
    agent: ureq::Agent,
    base: String,
    model: String,
    key: Option<String>,
}

impl Client {
    /// Finds the model to ask for.
    ///
    /// # Errors
    /// A server that cannot be reached or lists no model.
    pub fn connect(url: &str, model: Option<&str>, key: Option<&str>) -> anyhow::Result<Self> {
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT));
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let mut client = Self {
            agent: config.build().into(),
            base,
            model: model.unwrap_or_default().to_owned(),
            key: key.map(str::to_owned),
        };
        if model.is_none() {
            let list = client.get("/v1/models").map_err(|e| usage(format!("{url} cannot be asked: {e}")))?;
            let id = serde_json::from_str::<Value>(&list)
                .ok()
                .and_then(|list| Some(list["data"][0]["id"].as_str()?.to_owned()));
            client.model =
                id.ok_or_else(|| usage(format!("{url}/v1/models names no model; give one with --model")))?;
        }
        Ok(client)
    }

    /// The model asked for.
    pub fn model(&self) -> &str {
        &self.model
    }

    fn get(&self, path: &str) -> Result<String, ureq::Error> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.call()?.body_mut().read_to_string()
    }

    /// What `/metrics` of a hearth server says of its memory.
    pub fn memory(&self) -> Option<Memory> {
        /// Tokens of a KV block.
        const BLOCK: f64 = hearth_kernels::paged::KV_BLOCK as f64;
        let text = self.get("/metrics").ok()?;
        let figure = |name: &str| -> Option<f64> {
            let line =
                text.lines().find(|line| line.starts_with(name) && line[name.len()..].starts_with('{'))?;
            line.rsplit(' ').next()?.parse().ok()
        };
        let blocks = figure("hearth_kv_blocks")?;
        Some(Memory {
            weight_bytes: figure("hearth_weight_bytes")?,
            kv_bytes_per_token: figure("hearth_kv_bytes")? / (blocks * BLOCK).max(1.0),
        })
    }

    /// Asks and reads to the end; whatever goes wrong is in the sample.
    pub fn ask(&self, planned: &Planned, run_start: Instant) -> Sample {
        let asked = Instant::now();
        let mut sample = Sample { at_ms: ms(asked.duration_since(run_start)), ..Sample::default() };
        if let Err(error) = self.stream(planned, asked, &mut sample) {
            sample.error = Some(error);
        }
        sample.e2e_ms = ms(asked.elapsed());
        sample
    }

    fn stream(&self, planned: &Planned, asked: Instant, sample: &mut Sample) -> Result<(), String> {
        let body = json!({
            "model": self.model, "prompt": planned.text, "max_tokens": planned.output_tokens, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        });
        let mut request = self.agent.post(format!("{}/v1/completions", self.base));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send_json(body).map_err(|e| e.to_string())?;
        if response.status() != 200 {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            return Err(format!("{}: {}", response.status(), text.chars().take(300).collect::<String>()));
        }
        let mut progress = Progress { asked, first: None, last: asked, chunks: 0 };
        for line in BufReader::new(response.body_mut().as_reader()).lines() {
            let line = line.map_err(|e| e.to_string())?;
            let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                return progress.finish(sample);
            }
            progress.chunk(data, sample)?;
        }
        Err("the stream ended without [DONE]".into())
    }
}

struct Progress {
    asked: Instant,
    first: Option<Instant>,
    last: Instant,
    chunks: usize,
}

impl Progress {
    fn chunk(&mut self, data: &str, sample: &mut Sample) -> Result<(), String> {
        let chunk: Value = serde_json::from_str(data).map_err(|e| format!("a chunk is not JSON: {e}"))?;
        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
            return Err(error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned));
        }
        if let Some(count) = chunk["usage"]["completion_tokens"].as_u64() {
            sample.output_tokens = count as usize;
            sample.prompt_tokens = chunk["usage"]["prompt_tokens"].as_u64().unwrap_or(0) as usize;
            let cached = &chunk["usage"]["prompt_tokens_details"]["cached_tokens"];
            sample.cached_tokens = cached.as_u64().unwrap_or(0) as usize;
        }
        let text = chunk["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty());
        if self.first.is_some() && !text {
            return Ok(());
        }
        if chunk["choices"].as_array().is_some_and(|choices| !choices.is_empty()) {
            let now = Instant::now();
            match self.first {
                None => {
                    self.first = Some(now);
                    sample.ttft_ms = ms(now.duration_since(self.asked));
                }
                Some(_) => sample.gaps_ms.push(ms(now.duration_since(self.last))),
            }
            self.chunks += 1;
            self.last = now;
        }
        Ok(())
    }

    fn finish(self, sample: &mut Sample) -> Result<(), String> {
        let first = self.first.ok_or("the stream had no tokens")?;
        if sample.output_tokens == 0 {
            sample.output_tokens = self.chunks;
        }
        let between = sample.output_tokens.saturating_sub(1);
        if between > 0 {
            sample.tpot_ms = ms(self.last.duration_since(first)) / between as f64;
        }
        Ok(())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
