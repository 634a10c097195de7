//! `POST /v1/completions`.

use super::fields::Fields;
use super::options::{MOST_LOGPROBS, Options};
use super::prompt::{self, Prompt};
use crate::error::ApiError;

/// Tokens generated when the request does not say.
pub(crate) const DEFAULT_MAX_TOKENS: usize = 16;

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CompletionRequest {
    pub(crate) model: Option<String>,
    pub(crate) prompts: Vec<Prompt>,
    /// `None` = [`DEFAULT_MAX_TOKENS`], or fewer where they would not fit.
    pub(crate) max_tokens: Option<usize>,
    /// Begin the text with the prompt.
    pub(crate) echo: bool,
    /// Alternatives per position.
    pub(crate) logprobs: Option<usize>,
    /// Add BOS to text prompts where the tokenizer asks for it. Never to token ids.
    pub(crate) add_special_tokens: bool,
    /// Choices generated per prompt, of which the best `n` are given.
    pub(crate) best_of: usize,
    pub(crate) options: Options,
}

/// Parses a body.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn parse(body: &[u8], vocab_size: usize) -> Result<CompletionRequest, ApiError> {
    let mut fields = Fields::parse(body)?;
    refuse_suffix(&mut fields)?;
    let most = super::options::MOST_CHOICES as i64;
    let best_of = fields.integer("best_of", 1..=most)?.map(|count| count as usize);
    let request = CompletionRequest {
        model: fields.string("model")?,
        prompts: prompt::take(&mut fields, "prompt", vocab_size)?,
        max_tokens: fields.count("max_tokens", usize::MAX)?,
        echo: fields.boolean("echo")?.unwrap_or(false),
        logprobs: fields.count("logprobs", MOST_LOGPROBS)?,
        add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
        options: Options::take(&mut fields, vocab_size)?,
        best_of: 1,
    };
    let best_of = check_best_of(best_of, &request.options)?;
    Ok(CompletionRequest { best_of, ..request })
}

fn check_best_of(best_of: Option<usize>, options: &Options) -> Result<usize, ApiError> {
    let n = options.n;
    match best_of {
        Some(best_of) if best_of < n => {
            let message = format!("\"best_of\" is {best_of}, it must be at least \"n\", which is {n}");
            Err(ApiError::field("best_of", message))
        }
        Some(best_of) if best_of > n && options.stream.is_some() => {
            let message = "\"best_of\" above \"n\" cannot be streamed: which are best is known at the end";
            Err(ApiError::field("best_of", message))
        }
        best_of => Ok(best_of.unwrap_or(n)),
    }
}

fn refuse_suffix(fields: &mut Fields) -> Result<(), ApiError> {
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(fields.refuse("suffix", "\"suffix\" (text after the completion) is not supported"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::options::StreamOptions;
    use axum::http::StatusCode;

    const VOCAB: usize = 320;

    fn accepted(body: &str) -> CompletionRequest {
        parse(body.as_bytes(), VOCAB).unwrap_or_else(|e| panic!("{body}: {e}"))
    }

    #[test]
    fn what_is_not_said_has_openai_s_defaults() {
        let request = accepted(r#"{"prompt": "x"}"#);
        assert_eq!(request.prompts, [Prompt::Text("x".into())]);
        assert_eq!((request.max_tokens, request.echo, request.logprobs), (None, false, None));
        let options = request.options;
        assert_eq!((options.n, options.stream, options.ignore_eos), (1, None, false));
        assert_eq!(options.sampling, hearth_engine::api::Sampling::default());
    }

    #[test]
    fn every_sampling_field_is_taken() {
        let body = r#"{"prompt": "x", "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125,
            "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2,
            "logit_bias": {"5": -100, "319": 1.5}, "seed": -1}"#;
        let expected = hearth_engine::api::Sampling {
            temperature: 0.5,
            top_p: 0.25,
            top_k: 7,
            min_p: 0.125,
            repetition_penalty: 1.5,
            presence_penalty: -1.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(5, -100.0), (319, 1.5)],
            seed: Some(u64::MAX),
            ..Default::default()
        };
        let options = accepted(body).options;
        assert_eq!(options.sampling, expected);
        assert_eq!((options.sampling_of(0).seed, options.sampling_of(1).seed), (Some(u64::MAX), Some(0)));
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let text = |s: &str| Prompt::Text(s.into());
        for (json, expected) in [
            (r#""a""#, vec![text("a")]),
            (r#"["a", ""]"#, vec![text("a"), text("")]),
            ("[1, 2.0, 319]", vec![Prompt::Tokens(vec![1, 2, 319])]),
            ("[[1], [2, 3]]", vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]),
        ] {
            assert_eq!(accepted(&format!(r#"{{"prompt": {json}}}"#)).prompts, expected, "{json}");
        }
    }

    #[test]
    fn requests_of_the_usual_clients_are_accepted() {
        for body in [
            // vllm bench serve
            r#"{"model": "m", "prompt": "x", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8,
                "logprobs": null, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}"#,
            // guidellm
            r#"{"prompt": "x", "stream": true, "stop": null, "ignore_eos": true, "max_tokens": 8,
                "stream_options": {"include_usage": true, "continuous_usage_stats": true}}"#,
            // lm-eval
            r#"{"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 1, "logprobs": 1, "echo": true,
                "temperature": 0, "seed": 1234}"#,
            // openai-python with everything unknown
            r#"{"prompt": ["x"], "best_of": 1, "suffix": null, "user": "u", "store": false, "whatever": {"a": []},
                "top_k": -1, "response_format": {"type": "text"}, "logit_bias": {"5": -100, "6": 1.5}}"#,
        ] {
            accepted(body);
        }
    }

    #[test]
    fn users_and_priorities_reach_the_queue() {
        let standing = accepted(r#"{"prompt": "x", "user": "ann", "priority": -3}"#).options.standing;
        assert_eq!((standing.client.as_deref(), standing.priority), (Some("ann"), 3));
        assert_eq!(accepted(r#"{"prompt": "x"}"#).options.standing, Default::default());
    }

    #[test]
    fn stream_options_are_read_only_for_streams() {
        let options = |body| accepted(body).options.stream;
        let given = r#"{"prompt": "x", "stream": true, "stream_options": {"include_usage": true}}"#;
        let expected = StreamOptions { include_usage: true, continuous_usage: false };
        assert_eq!(options(given), Some(expected));
        assert_eq!(options(r#"{"prompt": "x", "stream_options": {"include_usage": true}}"#), None);
    }

    #[test]
    fn wrong_requests_are_refused_with_the_field_named() {
        for (body, param, words) in [
            ("", None, "not valid JSON"),
            (r#"{"prompt": "x""#, None, "not valid JSON"),
            ("[]", None, "a list of 0"),
            ("{}", Some("prompt"), "missing"),
            (r#"{"prompt": null}"#, Some("prompt"), "missing"),
            (r#"{"prompt": 5}"#, Some("prompt"), "5"),
            (r#"{"prompt": []}"#, Some("prompt"), "empty list"),
            (r#"{"prompt": ["x", 5]}"#, Some("prompt"), "5"),
            (r#"{"prompt": [5, "x"]}"#, Some("prompt"), "position 1"),
            (r#"{"prompt": [[5], "x", {}]}"#, Some("prompt"), "an object"),
            (r#"{"prompt": [320]}"#, Some("prompt"), "token id 320 at position 0"),
            (r#"{"prompt": [[1, 99999999999]]}"#, Some("prompt"), "99999999999"),
            (r#"{"prompt": [-1]}"#, Some("prompt"), "-1"),
            (r#"{"prompt": [1.5]}"#, Some("prompt"), "1.5"),
            (r#"{"prompt": "x", "model": 3}"#, Some("model"), "a string"),
            (r#"{"prompt": "x", "max_tokens": -1}"#, Some("max_tokens"), "at least 0"),
            (r#"{"prompt": "x", "max_tokens": "8"}"#, Some("max_tokens"), "\"8\""),
            (r#"{"prompt": "x", "max_tokens": 1.5}"#, Some("max_tokens"), "1.5"),
            (r#"{"prompt": "x", "temperature": "hot"}"#, Some("temperature"), "from 0 to 2"),
            (r#"{"prompt": "x", "temperature": 2.1}"#, Some("temperature"), "2.1"),
            (r#"{"prompt": "x", "temperature": -0.1}"#, Some("temperature"), "-0.1"),
            (r#"{"prompt": "x", "top_p": 1.1}"#, Some("top_p"), "from 0 to 1"),
            (r#"{"prompt": "x", "min_p": -1}"#, Some("min_p"), "from 0 to 1"),
            (r#"{"prompt": "x", "top_k": -2}"#, Some("top_k"), "at least -1"),
            (r#"{"prompt": "x", "repetition_penalty": 0}"#, Some("repetition_penalty"), "0"),
            (r#"{"prompt": "x", "presence_penalty": 3}"#, Some("presence_penalty"), "from -2 to 2"),
            (r#"{"prompt": "x", "frequency_penalty": true}"#, Some("frequency_penalty"), "true"),
            (r#"{"prompt": "x", "logit_bias": [1]}"#, Some("logit_bias"), "an object"),
            (r#"{"prompt": "x", "logit_bias": {"x": 1}}"#, Some("logit_bias"), "token ids below 320"),
            (r#"{"prompt": "x", "logit_bias": {"320": 1}}"#, Some("logit_bias"), "320"),
            (r#"{"prompt": "x", "logit_bias": {"1": 101}}"#, Some("logit_bias"), "101"),
            (r#"{"prompt": "x", "seed": "s"}"#, Some("seed"), "64 bits"),
            (r#"{"prompt": "x", "n": 0}"#, Some("n"), "from 1 to 128"),
            (r#"{"prompt": "x", "n": 129}"#, Some("n"), "from 1 to 128"),
            (r#"{"prompt": "x", "best_of": 0}"#, Some("best_of"), "from 1 to 128"),
            (r#"{"prompt": "x", "best_of": 1, "n": 2}"#, Some("best_of"), "at least"),
            (r#"{"prompt": "x", "best_of": 2, "stream": true}"#, Some("best_of"), "streamed"),
            (r#"{"prompt": "x", "priority": 0.5}"#, Some("priority"), "an integer"),
            (r#"{"prompt": "x", "user": 5}"#, Some("user"), "a string"),
            (r#"{"prompt": "x", "min_tokens": -1}"#, Some("min_tokens"), "at least 0"),
            (
                r#"{"prompt": "x", "include_stop_str_in_output": 1}"#,
                Some("include_stop_str_in_output"),
                "a boolean",
            ),
            (r#"{"prompt": "x", "suffix": "end"}"#, Some("suffix"), "not supported"),
            (r#"{"prompt": "x", "stop": 5}"#, Some("stop"), "list of strings"),
            (r#"{"prompt": "x", "stop": ["a", null]}"#, Some("stop"), "null"),
            (r#"{"prompt": "x", "stop": ""}"#, Some("stop"), "empty"),
            (r#"{"prompt": "x", "stop_token_ids": ["a"]}"#, Some("stop_token_ids"), "\"a\""),
            (r#"{"prompt": "x", "echo": "yes"}"#, Some("echo"), "a boolean"),
            (r#"{"prompt": "x", "stream": 1}"#, Some("stream"), "a boolean"),
            (r#"{"prompt": "x", "stream_options": true}"#, Some("stream_options"), "an object"),
            (
                r#"{"prompt": "x", "stream_options": {"include_usage": 1}}"#,
                Some("stream_options.include_usage"),
                "a boolean",
            ),
            (r#"{"prompt": "x", "logprobs": 21}"#, Some("logprobs"), "from 0 to 20"),
            (r#"{"prompt": "x", "logprobs": true}"#, Some("logprobs"), "true"),
            (r#"{"prompt": "x", "prompt_logprobs": -1}"#, Some("prompt_logprobs"), "from 0 to 20"),
            (r#"{"prompt": "x", "prompt_logprobs": 21}"#, Some("prompt_logprobs"), "21"),
            (r#"{"prompt": "x", "prompt_logprobs": "1"}"#, Some("prompt_logprobs"), "an integer"),
            (r#"{"prompt": "x", "prompt_logprobs": 0, "stream": true}"#, Some("prompt_logprobs"), "streamed"),
            (r#"{"prompt": "x", "response_format": {"type": "xml"}}"#, Some("response_format"), "xml"),
        ] {
            let error = parse(body.as_bytes(), VOCAB).expect_err(body);
            assert_eq!(error.status, StatusCode::BAD_REQUEST, "{body}");
            assert_eq!(error.param.as_deref(), param, "{body}: {error}");
            assert!(error.message.contains(words), "{body}: {error}");
        }
    }

    #[test]
    fn hostile_bodies_give_short_messages() {
        let long = "x".repeat(1 << 20);
        let deep = "[".repeat(100_000);
        for body in [
            format!(r#"{{"prompt": "x", "temperature": "{long}"}}"#),
            format!(r#"{{"prompt": {deep}"#),
            format!(r#"{{"prompt": "x", "stop": ["{long}"]}}"#),
            format!(r#"{{"prompt": "x", "stop": [{}"a"]}}"#, r#""a","#.repeat(40)),
            format!(r#"{{"prompt": "x", "logit_bias": {{"{long}": 1}}}}"#),
        ] {
            let error = parse(body.as_bytes(), VOCAB).expect_err("hostile");
            assert!(error.message.len() < 300, "{}", error.message);
        }
    }
}
