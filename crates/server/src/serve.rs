//! Accept, drain, stop.

use crate::error::ServeError;
use crate::router::router;
use crate::state::{AppState, Phase};
use axum::serve::ListenerExt;
use std::future::{Future, IntoFuture};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::timeout;

/// How long connections may take to deliver their last error after the drain timeout.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves until `shutdown` completes; then takes no new connections and requests, and lets those in flight finish
/// within [`drain_timeout`](crate::ServerConfig::drain_timeout).
///
/// # Errors
/// [`ServeError::Listener`] when accepting fails, [`ServeError::DrainTimeout`] when requests had to be ended.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    // Tokens are small packets: waiting to fill one would hold back every token but the first.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let signal = {
        let state = state.clone();
        async move {
            shutdown.await;
            state.enter(Phase::Draining);
        }
    };
    let server = axum::serve(listener, router(state.clone())).with_graceful_shutdown(signal).into_future();
    tokio::pin!(server);
    tokio::select! {
        done = &mut server => return Ok(done?),
        () = drain_deadline(&state) => {}
    }
    let sequences = state.sequences();
    state.enter(Phase::Ending);
    let _ = timeout(LAST_WORDS, &mut server).await;
    match sequences {
        // Only idle or stuck connections were left.
        0 => Ok(()),
        _ => Err(ServeError::DrainTimeout { sequences, seconds: state.config().drain_timeout.as_secs_f32() }),
    }
}

async fn drain_deadline(state: &AppState) {
    let mut phase = state.phase();
    if phase.wait_for(|phase| *phase != Phase::Open).await.is_ok() {
        tokio::time::sleep(state.config().drain_timeout).await;
    }
}
