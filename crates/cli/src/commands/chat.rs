//! `hearth chat`: a conversation, on a terminal or through a pipe.

use crate::commands::generate::{SamplingArgs, Words};
use crate::exit::usage;
use crate::running::{ModelArgs, Running, rate};
use crate::ui::{Report, Ui};
use hearth_data::{ChatTemplate, Message, Tokenizer};
use serde::Serialize;
use serde_json::Map;
use std::io::{BufRead, IsTerminal};
use std::time::Instant;

/// Talks with a model: one line in, one answer out, until the input ends or the line is /exit.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ChatArgs {
    /// Which model
    #[command(flatten)]
    pub model: ModelArgs,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens per answer
    #[arg(short, value_name = "N", default_value_t = 512)]
    pub n: usize,
    /// How tokens are chosen
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// The conversation.
#[derive(Clone, Debug, Serialize)]
pub struct ChatReport {
    /// Every message.
    pub messages: Vec<Message>,
    /// Tokens the model said.
    pub tokens: usize,
    /// Tokens per second while it spoke, prompts included.
    pub tok_s: f64,
}

/// Talks until the input ends.
///
/// # Errors
/// A model without tokenizer or chat template; a conversation longer than the context.
pub fn run(args: &ChatArgs, ui: &Ui) -> anyhow::Result<ChatReport> {
    let running = Running::start(&args.model, 1, ui)?;
    let model = &running.model;
    let tokenizer = model.need_tokenizer("chatting needs one")?;
    let template = model.template.as_ref().ok_or_else(|| {
        usage(format!("{} has no chat template; use hearth generate", model.files.path.display()))
    })?;
    let mut talk = Talk { running: &running, tokenizer, template, args, ui, messages: Vec::new() };
    talk.messages.extend(args.system.as_ref().map(|text| Message::new("system", text)));
    let prompted = std::io::stdin().is_terminal() && ui.on_terminal();
    if prompted {
        ui.note("say something; /exit or Ctrl-D ends the conversation");
    }
    let (mut tokens, mut time) = (0, std::time::Duration::ZERO);
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if prompted {
            ui.stream("> ")?;
        }
        let Some(line) = lines.next().transpose()? else { break };
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            text => {
                let start = Instant::now();
                tokens += talk.answer(text)?;
                time += start.elapsed();
            }
        }
    }
    Ok(ChatReport { messages: talk.messages, tokens, tok_s: rate(tokens, time) })
}

struct Talk<'a> {
    running: &'a Running,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    args: &'a ChatArgs,
    ui: &'a Ui,
    messages: Vec<Message>,
}

impl Talk<'_> {
    /// Adds what the user says, streams what the model answers, and returns how many tokens that took.
    fn answer(&mut self, text: &str) -> anyhow::Result<usize> {
        self.messages.push(Message::new("user", text));
        let rendered = self.template.render(&self.messages, true, &Map::new())?;
        // The template writes BOS itself where the model wants one.
        let prompt = self.tokenizer.encode(&rendered, false)?;
        let room = self.running.engine.context_limit().saturating_sub(prompt.len());
        if room == 0 {
            return Err(usage(format!(
                "the conversation has {} tokens, the context holds {}; start a new one",
                prompt.len(),
                self.running.engine.context_limit()
            )));
        }
        let mut words = Words::new(Some(self.tokenizer.stream(true)));
        let stop = self.running.model.eos_tokens();
        let answer = self.running.generate(
            prompt,
            self.args.n.min(room),
            self.args.sampling.sampling(),
            stop,
            |id| Ok(self.ui.stream(&words.push(id)?)?),
        )?;
        self.ui.stream(&(words.flush()? + "\n"))?;
        self.messages.push(Message::new("assistant", words.all));
        Ok(answer.tokens.len())
    }
}

impl Report for ChatReport {
    fn text(&self) -> String {
        String::new()
    }

    fn aside(&self) -> Option<String> {
        Some(format!("{} tokens, {:.1} tok/s", self.tokens, self.tok_s))
    }
}
