//! `hearth generate`: continues a prompt.

use crate::exit::usage;
use crate::machine;
use crate::running::{Guessed, ModelArgs, Running, SpeculationArgs, Streaming, check_tokens, parse_tokens};
use crate::ui::{Report, Ui, bytes};
use hearth_data::StreamDecoder;
use hearth_engine::EngineConfig;
use hearth_engine::api::Sampling;
use serde::Serialize;

/// Continues a text or a list of token ids.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct GenerateArgs {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue
    #[arg(short, long, value_name = "TEXT", conflicts_with = "tokens", required_unless_present = "tokens")]
    pub prompt: Option<String>,
    /// Token ids to continue, as 1,2,3
    #[arg(long, value_name = "IDS")]
    pub tokens: Option<String>,
    /// Most tokens to generate
    #[arg(short, value_name = "N", default_value_t = 64)]
    pub n: usize,
    /// How tokens are chosen
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Whether tokens are guessed
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Go on after tokens that end a text
    #[arg(long)]
    pub ignore_eos: bool,
}

/// How the next token is chosen.
#[derive(Clone, Debug, clap::Args)]
pub struct SamplingArgs {
    /// 0 = always the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; 1 = off
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Most likely tokens kept; 0 = off
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Tokens less likely than this share of the most likely one are dropped; 0 = off
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// Equal seeds give equal tokens
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
}

impl Default for SamplingArgs {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: None }
    }
}

impl SamplingArgs {
    /// As the engine takes it.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            seed: self.seed,
            ..Sampling::default()
        }
    }
}

/// What was generated.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateReport {
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Their text; empty for a model without tokenizer.
    pub text: String,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
    /// Generated tokens per second, after the first.
    pub decode_tok_s: f64,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// What was streamed; nothing if all weights are on the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub streaming: Option<Streaming>,
    /// What was guessed in advance; nothing if that was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculation: Option<Guessed>,
    #[serde(skip)]
    streamed: bool,
}

/// Generates; the text goes to stdout as it comes unless JSON is wanted.
///
/// # Errors
/// A model that cannot be loaded, a prompt that does not fit.
pub fn run(args: &GenerateArgs, ui: &Ui) -> anyhow::Result<GenerateReport> {
    let ids =
        args.tokens.as_deref().map(parse_tokens).transpose().map_err(|e| usage(format!("--tokens: {e}")))?;
    if args.model.live_adapters().count() > 1 {
        return Err(usage("one text is generated, with one adapter: give --adapter NAME=DIR once"));
    }
    let config = EngineConfig { max_seqs: 1, ..EngineConfig::default() };
    let running = Running::start_serving(&args.model, &args.speculation, config, ui)?;
    let model = &running.model;
    let prompt = match (ids, &args.prompt) {
        (Some(ids), _) => ids,
        (None, Some(text)) => model.need_tokenizer("give token ids with --tokens")?.encode(text, true)?,
        (None, None) => return Err(usage("there is nothing to continue; give --prompt or --tokens")),
    };
    check_tokens(&prompt, model.files.config.vocab_size)?;
    let stop = if args.ignore_eos { Vec::new() } else { model.eos_tokens() };
    let mut text = Words::new(model.tokenizer.as_ref().map(|t| t.stream(true)));
    let answer = running
        .generate(prompt, args.n, args.sampling.sampling(), stop, |id| Ok(ui.stream(&text.push(id)?)?))?;
    ui.stream(&text.flush()?)?;
    Ok(GenerateReport {
        tokens: answer.tokens,
        streamed: text.decoder.is_some(),
        text: text.all,
        prefill_tok_s: answer.prefill_tok_s,
        decode_tok_s: answer.decode_tok_s,
        peak_rss_bytes: machine::peak_rss_bytes(),
        streaming: Streaming::of(&running.engine),
        speculation: Guessed::of(&running.engine),
    })
}

/// Text in the making.
pub struct Words {
    decoder: Option<StreamDecoder>,
    /// Everything so far.
    pub all: String,
}

impl Words {
    /// Without a decoder there will be no text.
    pub fn new(decoder: Option<StreamDecoder>) -> Self {
        Self { decoder, all: String::new() }
    }

    /// The text a token completes.
    ///
    /// # Errors
    /// When the tokenizer's own decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, hearth_data::Error> {
        let text = self.decoder.as_mut().map_or(Ok(String::new()), |d| d.push(id))?;
        self.all.push_str(&text);
        Ok(text)
    }

    /// What is left at the end.
    ///
    /// # Errors
    /// As [`Words::push`].
    pub fn flush(&mut self) -> Result<String, hearth_data::Error> {
        let text = self.decoder.as_mut().map_or(Ok(String::new()), |d| d.flush())?;
        self.all.push_str(&text);
        Ok(text)
    }
}

impl Report for GenerateReport {
    /// The text has been streamed already; only ids remain to be shown where there is none.
    fn text(&self) -> String {
        if self.streamed {
            return "\n".into();
        }
        self.tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
    }

    fn aside(&self) -> Option<String> {
        let speed = format!(
            "{} tokens, prefill {:.1} tok/s, decode {:.1} tok/s",
            self.tokens.len(),
            self.prefill_tok_s,
            self.decode_tok_s
        );
        Some(match &self.streaming {
            None => speed,
            Some(s) => format!("{speed}; streamed {} a pass at {:.2} GB/s", bytes(s.bytes_per_pass), s.gb_s),
        })
    }
}
