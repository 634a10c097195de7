//! Failures: what a client is told, and why serving ended.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hearth_engine::api::SubmitError;
use serde_json::{Value, json};
use std::time::Duration;

/// A failure in the shape OpenAI's clients parse.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub(crate) status: StatusCode,
    /// `error.type`.
    pub(crate) kind: &'static str,
    /// One sentence.
    pub(crate) message: String,
    /// The field at fault.
    pub(crate) param: Option<String>,
    /// `error.code`.
    pub(crate) code: Option<&'static str>,
    /// Seconds for `Retry-After`.
    pub(crate) retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400 about the request as a whole.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 about one field.
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad_request(message) }
    }

    /// The same error about another field.
    pub(crate) fn about(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    /// 401.
    pub(crate) fn unauthorized(message: &str) -> Self {
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// 404 or 405 about a path.
    pub(crate) fn route(status: StatusCode, message: String) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// 403.
    pub(crate) fn forbidden(message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 404 for an adapter that is not loaded.
    pub(crate) fn no_such_adapter(asked: &str) -> Self {
        let message = format!("no adapter {} is loaded", excerpt(asked));
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { param: Some("lora_name".into()), ..error }
    }

    /// 404 for a model that is not served here.
    pub(crate) fn no_such_model(asked: &str, served: &str, adapters: &[String]) -> Self {
        let adapters = match adapters {
            [] => String::new(),
            some => format!(" and {} adapters, which /v1/models lists", some.len()),
        };
        let message =
            format!("model {} is not served here; this server has {served:?}{adapters}", excerpt(asked));
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { param: Some("model".into()), code: Some("model_not_found"), ..error }
    }

    /// 413.
    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("the request body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// 408: the client was too slow.
    pub(crate) fn body_timeout(limit: Duration) -> Self {
        let message = format!("the request body did not arrive within {} seconds", limit.as_secs_f32());
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// 503 while the model loads.
    pub(crate) fn loading() -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the model is still loading");
        Self { code: Some("loading"), retry_after: Some(1), ..error }
    }

    /// 503 once shutdown has begun.
    pub(crate) fn shutting_down() -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the server is shutting down");
        Self { code: Some("shutting_down"), retry_after: Some(1), ..error }
    }

    /// 504: [`crate::ServerConfig::request_timeout`] has passed.
    pub(crate) fn request_timeout(limit: Duration) -> Self {
        let message =
            format!("the request was not finished within the limit of {} seconds", limit.as_secs_f32());
        let error = Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", message);
        Self { code: Some("timeout"), ..error }
    }

    /// 503: [`crate::ServerConfig::max_queue_time`] has passed.
    pub(crate) fn queue_timeout(limit: Duration, retry_after_s: u32) -> Self {
        let message =
            format!("the request was not begun within the limit of {} seconds", limit.as_secs_f32());
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { code: Some("queue_timeout"), retry_after: Some(retry_after_s), ..error }
    }

    /// 429: there is no room for a body or an answer of so many bytes now.
    pub(crate) fn no_room(needed: u64, limit: u64, retry_after_s: u32) -> Self {
        let message = format!(
            "requests and answers under way leave no room for {needed} of {limit} bytes; try again later"
        );
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("no_room"), retry_after: Some(retry_after_s), ..error }
    }

    /// 400: the longest answer would never fit; `fewer` says of what.
    pub(crate) fn answer_too_large(param: &str, fewer: &str, needed: u64, limit: u64) -> Self {
        let message = format!(
            "the longest answer would take {needed} bytes, there is room for {limit}: ask for fewer {fewer}"
        );
        Self::field(param, message)
    }

    /// 500.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The JSON body, also the data of a final SSE event.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::EmptyPrompt | SubmitError::TokenOutOfRange { .. } => Self::field("prompt", message),
            SubmitError::Sampling { .. } => Self::bad_request(message),
            SubmitError::AdapterRank { .. } => Self::field("model", message),
            SubmitError::TooLong { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::bad_request(message) }
            }
            SubmitError::Busy { retry_after_s, .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
                Self { code: Some("queue_full"), retry_after: Some(retry_after_s), ..error }
            }
            SubmitError::Stopped => Self::shutting_down(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A client's text, quoted and short enough for a message.
pub(crate) fn excerpt(text: &str) -> String {
    const LIMIT: usize = 60;
    let mut out: String = text.chars().take(LIMIT).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    format!("{out:?}")
}

/// Why [`crate::serve()`] ended otherwise than by a complete drain.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener failed.
    #[error("the listener failed: {0}")]
    Listener(#[from] std::io::Error),
    /// Requests were still running when the drain timeout had passed; they were ended with an error.
    #[error("{sequences} sequences were still running {seconds} seconds after shutdown began and were ended")]
    DrainTimeout {
        /// Sequences that did not finish.
        sequences: usize,
        /// The limit.
        seconds: f32,
    },
}
