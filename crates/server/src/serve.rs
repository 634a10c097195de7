//! Accept, drain, stop.

use crate::config::ServerConfig;
use crate::connection::Patient;
use crate::error::ServeError;
use crate::router::router;
use crate::state::{AppState, Phase};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long connections may take to deliver their last error after the drain timeout.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Pause after the system refused a connection for want of something of its own.
const OUT_OF_FILES: Duration = Duration::from_millis(50);

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
    let mut connections = Connections::new(&state);
    tokio::select! {
        error = accept(&listener, &mut connections) => return Err(error),
        () = shutdown => {}
    }
    // Closed at once: who connects now finds another server or none.
    drop(listener);
    state.enter(Phase::Draining);
    let Connections { graceful, tasks, .. } = connections;
    let drained = graceful.shutdown();
    tokio::pin!(drained);
    if timeout(state.config().drain_timeout, &mut drained).await.is_ok() {
        return Ok(());
    }
    let sequences = state.sequences();
    state.enter(Phase::Ending);
    let _ = timeout(LAST_WORDS, &mut drained).await;
    // What is left are idle or stuck connections: they go with their tasks.
    drop(tasks);
    match sequences {
        0 => Ok(()),
        _ => Err(ServeError::DrainTimeout { sequences, seconds: state.config().drain_timeout.as_secs_f32() }),
    }
}

/// Takes connections for ever.
async fn accept(listener: &TcpListener, connections: &mut Connections) -> ServeError {
    loop {
        // Beyond the limit clients wait in the system's own queue.
        let Ok(room) = connections.room.clone().acquire_owned().await else {
            return std::io::Error::other("the limit of connections is gone").into();
        };
        match listener.accept().await {
            Ok((stream, _)) => connections.serve(stream, room),
            Err(error) if is_passing(error.kind()) => {}
            Err(error) if error.raw_os_error().is_some() => tokio::time::sleep(OUT_OF_FILES).await,
            Err(error) => return error.into(),
        }
        while connections.tasks.try_join_next().is_some() {}
    }
}

/// Whether an error is about the connection that was to be taken, and not about the listener.
fn is_passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused)
}

struct Connections {
    app: Router,
    http: http1::Builder,
    graceful: GracefulShutdown,
    room: Arc<Semaphore>,
    tasks: JoinSet<()>,
    write_timeout: Duration,
}

impl Connections {
    fn new(state: &AppState) -> Self {
        let ServerConfig { header_timeout, write_timeout, max_connections, .. } = *state.config();
        let mut http = http1::Builder::new();
        // Also how long a connection may be idle between requests: waiting for a head is all it does.
        http.timer(TokioTimer::new()).header_read_timeout(header_timeout);
        Self {
            app: router(state.clone()),
            http,
            graceful: GracefulShutdown::new(),
            room: Arc::new(Semaphore::new(max_connections.max(1))),
            tasks: JoinSet::new(),
            write_timeout,
        }
    }

    fn serve(&mut self, stream: TcpStream, room: OwnedSemaphorePermit) {
        // Tokens are small packets: waiting to fill one would hold back every token but the first.
        let _ = stream.set_nodelay(true);
        let stream = TokioIo::new(Patient::new(stream, self.write_timeout));
        let service = TowerToHyperService::new(self.app.clone());
        let connection = self.graceful.watch(self.http.serve_connection(stream, service));
        self.tasks.spawn(async move {
            let _room = room;
            // A connection that breaks is its client's affair: its requests are dropped, which cancels them.
            let _ = connection.await;
        });
    }
}
