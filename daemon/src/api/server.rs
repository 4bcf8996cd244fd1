//! Serves connections to the API's socket and to the listener for Prometheus.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use memlane_net::unix_socket;
use tokio::net::{TcpListener, UnixListener};
use tokio::time::sleep;

use super::access::Access;
use super::connections::Connections;
use super::gate::Gate;
use super::routes::{self, Asked};
use super::shares::Holder;
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

/// Opens the API's socket with this mode, and replaces a socket that a dead daemon left.
///
/// # Errors
///
/// Fails if the system refuses the socket, or if another program uses the path.
pub fn bind(socket: &Path, mode: u32) -> Result<UnixListener, ServerError> {
    let failed = |error| ServerError { socket: socket.to_owned(), error };
    unix_socket::make_way(socket).map_err(failed)?;
    let listener = UnixListener::bind(socket).map_err(failed)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Serves the API to those who have `access`, until dropped, on a thread with a [`tokio::task::LocalSet`].
pub async fn serve(listener: UnixListener, access: Access, backend: Rc<dyn Backend>) -> Infallible {
    let gate = Rc::new(Gate::new(access));
    let (mut connections, streams) = (Connections::default(), Rc::<Streams>::default());
    loop {
        let Some(stream) = accepted(listener.accept().await).await else { continue };
        let caller = Caller::of(&stream);
        let role = match gate.admit(&caller) {
            Ok(role) => role,
            Err(why) => {
                gate.turn_away(stream, why);
                continue;
            }
        };
        let holder = Holder { role, user: caller.uid };
        if let Err(crowd) = connections.make_room_for(holder) {
            gate.turn_away(stream, crowd);
            continue;
        }
        let (backend, streams, gate) = (backend.clone(), streams.clone(), gate.clone());
        let answer = move |line, request| {
            let (caller, streams, gate) = (caller.clone(), streams.clone(), gate.clone());
            routes::answer(backend.clone(), Asked { caller, role, line, streams, gate }, request)
        };
        connections.add(stream, Some(holder), answer).await;
    }
}

/// Serves `GET /metrics`, and nothing else of the API, until dropped.
pub async fn serve_metrics(listener: TcpListener, backend: Rc<dyn Backend>) -> Infallible {
    let mut connections = Connections::default();
    loop {
        let Some(stream) = accepted(listener.accept().await).await else { continue };
        let backend = backend.clone();
        let answer = move |line, request| routes::answer_metrics(backend.clone(), line, request);
        connections.add(stream, None, answer).await;
    }
}

async fn accepted<S, A>(accepted: io::Result<(S, A)>) -> Option<S> {
    match accepted {
        Ok((stream, _)) => Some(stream),
        Err(error) => {
            // Most likely the process is out of descriptors. They come back, so the listener goes on.
            let error = memlane_kvm::descriptors::explain(error);
            tracing::warn!("cannot accept a connection to the API: {error}");
            sleep(Duration::from_millis(100)).await;
            None
        }
    }
}
