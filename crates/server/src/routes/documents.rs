//! `GET /` and `GET /openapi.json`: what is the same for every model.

use axum::http::header;
use axum::response::{Html, IntoResponse, Response};

/// One page that talks to this server, whole in itself.
const PLAYGROUND: &str = include_str!("../playground.html");
const OPENAPI: &str = include_str!("../openapi.json");
/// The page loads nothing from anywhere and talks to nobody else.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; \
                      connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'";

pub(crate) async fn playground() -> Response {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(PLAYGROUND)).into_response()
}

pub(crate) async fn openapi() -> Response {
    let text = OPENAPI.replace("\"VERSION\"", concat!("\"", env!("CARGO_PKG_VERSION"), "\""));
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}
