//! Serves connections to the API's socket and to the listener for Prometheus.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use memlane_net::task;
use memlane_net::unix_socket;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::body::{MAX_BODY_BYTES, REQUEST_TIMEOUT};
use super::line::{Impatient, Line, MAX_CONNECTIONS, WRITE_TIMEOUT};
use super::routes::{self, Answer, Asked};
use super::streams::Streams;
use super::{Backend, Caller};

/// The API's socket cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the socket {} of the API: {error}", socket.display())]
pub struct ServerError {
    /// The socket.
    pub socket: PathBuf,
    /// The error of the system.
    pub error: io::Error,
}

/// Opens the API's socket for its owner and group, and replaces a socket that a dead daemon left.
///
/// # Errors
///
/// Fails if the system refuses the socket, or if another program uses the path.
pub fn bind(socket: &Path) -> Result<UnixListener, ServerError> {
    let failed = |error| ServerError { socket: socket.to_owned(), error };
    unix_socket::make_way(socket).map_err(failed)?;
    let listener = UnixListener::bind(socket).map_err(failed)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

/// Serves the API until dropped, on a thread with a [`tokio::task::LocalSet`].
pub async fn serve(listener: UnixListener, backend: Rc<dyn Backend>) -> Infallible {
    let (mut connections, streams) = (Connections::default(), Rc::<Streams>::default());
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        let caller = accepted.as_ref().map(Caller::of).unwrap_or_default();
        let (backend, streams) = (backend.clone(), streams.clone());
        let answer = move |line, request| {
            let asked = Asked { caller: caller.clone(), line, streams: streams.clone() };
            routes::answer(backend.clone(), asked, request)
        };
        connections.add(accepted, answer).await;
    }
}

/// Serves `GET /metrics`, and nothing else of the API, until dropped.
pub async fn serve_metrics(listener: TcpListener, backend: Rc<dyn Backend>) -> Infallible {
    let mut connections = Connections::default();
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        let backend = backend.clone();
        let answer = move |line, request| routes::answer_metrics(backend.clone(), line, request);
        connections.add(accepted, answer).await;
    }
}

/// The open connections. They end when this is dropped.
struct Connections {
    tasks: JoinSet<()>,
    free: Arc<Semaphore>,
    lines: Vec<Weak<Line>>,
}

impl Default for Connections {
    fn default() -> Self {
        Self { tasks: JoinSet::new(), free: Arc::new(Semaphore::new(MAX_CONNECTIONS)), lines: Vec::new() }
    }
}

impl Connections {
    async fn add<S, F>(
        &mut self,
        accepted: io::Result<S>,
        answer: impl Fn(Rc<Line>, Request<Incoming>) -> F + 'static,
    ) where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
        F: Future<Output = Result<Answer, Infallible>> + 'static,
    {
        while self.tasks.try_join_next().is_some() {}
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Most likely the process is out of descriptors. They come back, so the listener goes on.
                let error = memlane_kvm::descriptors::explain(error);
                tracing::warn!("cannot accept a connection to the API: {error}");
                return sleep(Duration::from_millis(100)).await;
            }
        };
        if self.free.available_permits() == 0 {
            self.make_room();
        }
        let permit = self.free.clone().acquire_owned().await.expect("it is never closed");
        let line = Line::new();
        self.lines.push(Rc::downgrade(&line));
        task::spawn_in(&mut self.tasks, "API connection", async move {
            let stream = TokioIo::new(Impatient::new(stream, WRITE_TIMEOUT));
            let service = service_fn(|request| answer(line.clone(), request));
            let mut builder = http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_TIMEOUT)
                .max_buf_size(MAX_BODY_BYTES);
            tokio::select! {
                served = builder.serve_connection(stream, service) => if let Err(error) = served {
                    tracing::debug!("a connection to the API ended: {error}");
                },
                () = line.hung_up() => tracing::debug!("a connection to the API made way for another"),
            }
            drop(permit);
        });
    }

    /// Ends the connection that has been idle for longest.
    fn make_room(&mut self) {
        self.lines.retain(|line| line.strong_count() > 0);
        let lines = self.lines.iter().filter_map(Weak::upgrade);
        let idle = lines.filter_map(|line| Some((line.idle_since()?, line)));
        if let Some((_, line)) = idle.min_by_key(|(since, _)| *since) {
            line.hang_up();
        }
    }
}
