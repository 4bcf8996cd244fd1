//! The API's socket, and the listener for Prometheus.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::body::{MAX_BODY_BYTES, REQUEST_TIMEOUT};
use super::routes::{self, Answer};
use super::{Backend, Caller};
use crate::task;
use crate::unix_socket;

/// Connections served at once; more wait to be accepted.
pub const MAX_CONNECTIONS: usize = 128;

/// There is no API.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the socket {} of the API: {error}", socket.display())]
pub struct ServerError {
    /// The socket.
    pub socket: PathBuf,
    /// Why.
    pub error: io::Error,
}

/// Opens the API's socket for its owner and group. One that a dead daemon left is replaced.
pub fn bind(socket: &Path) -> Result<UnixListener, ServerError> {
    let failed = |error| ServerError { socket: socket.to_owned(), error };
    unix_socket::make_way(socket).map_err(failed)?;
    let listener = UnixListener::bind(socket).map_err(failed)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

/// Serves the API until dropped, on a thread with a [`tokio::task::LocalSet`].
pub async fn serve(listener: UnixListener, backend: Rc<dyn Backend>) -> Infallible {
    let mut connections = Connections::default();
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        let caller = accepted.as_ref().map(Caller::of).unwrap_or_default();
        let (accepted, backend) = (accepted.map(TokioIo::new), backend.clone());
        connections
            .add(accepted, move |request| routes::answer(backend.clone(), caller.clone(), request))
            .await;
    }
}

/// Serves `GET /metrics`, and nothing else of the API, until dropped.
pub async fn serve_metrics(listener: TcpListener, backend: Rc<dyn Backend>) -> Infallible {
    let mut connections = Connections::default();
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| TokioIo::new(stream));
        let backend = backend.clone();
        connections.add(accepted, move |request| routes::answer_metrics(backend.clone(), request)).await;
    }
}

/// Connections under way; they end when this is dropped.
struct Connections {
    tasks: JoinSet<()>,
    free: Arc<Semaphore>,
}

impl Default for Connections {
    fn default() -> Self {
        Self { tasks: JoinSet::new(), free: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }
}

impl Connections {
    async fn add<S, F>(&mut self, accepted: io::Result<S>, answer: impl Fn(Request<Incoming>) -> F + 'static)
    where
        S: Read + Write + Unpin + 'static,
        F: Future<Output = Result<Answer, Infallible>> + 'static,
    {
        while self.tasks.try_join_next().is_some() {}
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, most likely: they come back, the listener must not go away.
                tracing::warn!("cannot accept a connection to the API: {error}");
                return sleep(Duration::from_millis(100)).await;
            }
        };
        let permit = self.free.clone().acquire_owned().await.expect("it is never closed");
        task::spawn_in(&mut self.tasks, "API connection", async move {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_TIMEOUT)
                .max_buf_size(MAX_BODY_BYTES)
                .serve_connection(stream, service_fn(answer))
                .await;
            if let Err(error) = served {
                tracing::debug!("a connection to the API ended: {error}");
            }
            drop(permit);
        });
    }
}
