//! A client of the daemon's API, over its Unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use memlane_protocol::wire::Label;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::types::{
    ApiError, Attach, CheckReport, ErrorBody, ErrorCode, GuestInfo, Launch, Migration, Order, PeerInfo,
    PortInfo, Resolve, Status,
};

/// The daemon listens on this socket unless its configuration names another one.
pub const DEFAULT_SOCKET: &str = "/run/memlane/api.sock";
/// An answer or an event may have at most this many bytes.
pub const MAX_ANSWER_BYTES: usize = 16 << 20;
/// A daemon that has not answered after this time is taken for hung. Preflights take the longest.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// A client of a daemon. Each call makes a connection of its own, so the daemon may restart between calls.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// A stream of the events of one migration.
#[derive(Debug)]
pub struct Events {
    socket: PathBuf,
    body: Incoming,
    decoder: EventDecoder,
    ended: bool,
}

/// The reason why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon listens on the socket.
    #[error(
        "no daemon answers on {}: {error}. Is it running? systemctl status memlaned; \
         does its configuration name another api_socket?",
        socket.display()
    )]
    NotRunning {
        /// The socket.
        socket: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The socket is not for this user.
    #[error(
        "may not use {}: {error}. Be root, or a member of the socket's group, or of one that [api] in the \
         configuration names",
        socket.display()
    )]
    Denied {
        /// The socket.
        socket: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The path is not a socket.
    #[error("{} is no socket; name the daemon's api_socket", socket.display())]
    NotASocket {
        /// Its path.
        socket: PathBuf,
    },
    /// The daemon does not answer.
    #[error("the daemon on {} has not answered for {} s; see journalctl -u memlaned", socket.display(), ANSWER_TIMEOUT.as_secs())]
    Silent {
        /// The socket.
        socket: PathBuf,
    },
    /// The connection broke.
    #[error("lost the daemon on {}: {why}. See journalctl -u memlaned", socket.display())]
    Lost {
        /// The socket.
        socket: PathBuf,
        /// How.
        why: String,
    },
    /// The answer is not understood.
    #[error(
        "cannot understand the answer of {}: {why}. Is it a memlaned of this version?",
        socket.display()
    )]
    Foreign {
        /// The socket.
        socket: PathBuf,
        /// Why.
        why: String,
    },
    /// The daemon answered with an error.
    #[error(transparent)]
    Api(#[from] ApiError),
}

impl Client {
    /// Makes a client of the daemon that listens on this socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Returns the path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Gets the state of the daemon: `GET /v1/status`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status").await
    }

    /// Lists the ports: `GET /v1/ports`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn ports(&self) -> Result<Vec<PortInfo>, ClientError> {
        self.get("/v1/ports").await
    }

    /// Lists the peers: `GET /v1/peers`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn peers(&self) -> Result<Vec<PeerInfo>, ClientError> {
        self.get("/v1/peers").await
    }

    /// Lists the attached guests: `GET /v1/guests`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn guests(&self) -> Result<Vec<GuestInfo>, ClientError> {
        self.get("/v1/guests").await
    }

    /// Starts a QEMU guest: `POST /v1/guests/launch`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn launch(&self, launch: &Launch) -> Result<GuestInfo, ClientError> {
        self.ask(Method::POST, "/v1/guests/launch", Some(launch)).await
    }

    /// Attaches a QEMU guest that another program started: `POST /v1/guests/attach`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn attach(&self, attach: &Attach) -> Result<GuestInfo, ClientError> {
        self.ask(Method::POST, "/v1/guests/attach", Some(attach)).await
    }

    /// Detaches a QEMU guest: `POST /v1/guests/{name}/detach`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn detach(&self, name: &str) -> Result<GuestInfo, ClientError> {
        let unknown =
            |error| ApiError::new(ErrorCode::UnknownGuest, format!("no guest has this name: {error}"));
        let name: Label = name.parse().map_err(unknown)?;
        self.ask(Method::POST, &format!("/v1/guests/{name}/detach"), None::<&Order>).await
    }

    /// Lists the migrations: `GET /v1/migrations`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn migrations(&self) -> Result<Vec<Migration>, ClientError> {
        self.get("/v1/migrations").await
    }

    /// Gets a migration: `GET /v1/migrations/{id}`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn migration(&self, id: &str) -> Result<Migration, ClientError> {
        self.get(&format!("/v1/migrations/{}", segment(id)?)).await
    }

    /// Makes a dry run of an order: `POST /v1/check`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn check(&self, order: &Order) -> Result<CheckReport, ClientError> {
        self.ask(Method::POST, "/v1/check", Some(order)).await
    }

    /// Gives an order: `POST /v1/migrations`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn migrate(&self, order: &Order) -> Result<Migration, ClientError> {
        self.ask(Method::POST, "/v1/migrations", Some(order)).await
    }

    /// Asks to cancel a migration: `DELETE /v1/migrations/{id}`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn cancel(&self, id: &str) -> Result<Migration, ClientError> {
        self.ask(Method::DELETE, &format!("/v1/migrations/{}", segment(id)?), None::<&Order>).await
    }

    /// Decides about a guest in doubt: `POST /v1/migrations/{id}/resolve`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn resolve(&self, id: &str, resolve: &Resolve) -> Result<Migration, ClientError> {
        self.ask(Method::POST, &format!("/v1/migrations/{}/resolve", segment(id)?), Some(resolve)).await
    }

    /// Gives up the missing memory of a guest: `POST /v1/migrations/{id}/abandon`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn abandon(&self, id: &str) -> Result<Migration, ClientError> {
        self.ask(Method::POST, &format!("/v1/migrations/{}/abandon", segment(id)?), None::<&Order>).await
    }

    /// Follows a migration: `GET /v1/migrations/{id}/events`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn events(&self, id: &str) -> Result<Events, ClientError> {
        let path = format!("/v1/migrations/{}/events", segment(id)?);
        let answer = self.send(Method::GET, &path, Bytes::new()).await?;
        if !answer.status().is_success() {
            return Err(self.error_of(answer).await);
        }
        let decoder = EventDecoder::default();
        Ok(Events { socket: self.socket.clone(), body: answer.into_body(), decoder, ended: false })
    }

    /// Gets all metrics in the text format of Prometheus: `GET /metrics`.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be reached, or answers with an error.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let answer = self.send(Method::GET, "/metrics", Bytes::new()).await?;
        let bytes = self.read(answer.into_body()).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::GET, path, None::<&Order>).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| self.foreign(&error))?,
            None => Vec::new(),
        };
        let answer = self.send(method, path, body.into()).await?;
        if !answer.status().is_success() {
            return Err(self.error_of(answer).await);
        }
        let bytes = self.read(answer.into_body()).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.foreign(&error))
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.not_connected(error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(&error))?;
        // Ends with the answer's body; its error is the body's too.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "memlaned")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.foreign(&error))?;
        match timeout(ANSWER_TIMEOUT, sender.send_request(request)).await {
            Err(_) => Err(ClientError::Silent { socket: self.socket.clone() }),
            Ok(answer) => answer.map_err(|error| self.lost(&error)),
        }
    }

    async fn read(&self, body: Incoming) -> Result<Bytes, ClientError> {
        match timeout(ANSWER_TIMEOUT, Limited::new(body, MAX_ANSWER_BYTES).collect()).await {
            Err(_) => Err(ClientError::Silent { socket: self.socket.clone() }),
            Ok(Err(error)) => Err(self.lost(&*error)),
            Ok(Ok(body)) => Ok(body.to_bytes()),
        }
    }

    async fn error_of(&self, answer: Response<Incoming>) -> ClientError {
        let status = answer.status();
        let bytes = match self.read(answer.into_body()).await {
            Ok(bytes) => bytes,
            Err(error) => return error,
        };
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => ClientError::Api(body.error),
            Err(error) => {
                ClientError::Foreign { socket: self.socket.clone(), why: format!("status {status}, {error}") }
            }
        }
    }

    fn not_connected(&self, error: io::Error) -> ClientError {
        let socket = self.socket.clone();
        let is_socket = |path: &Path| {
            use std::os::unix::fs::FileTypeExt;
            path.metadata().is_ok_and(|found| found.file_type().is_socket())
        };
        match error.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied { socket, error },
            io::ErrorKind::ConnectionRefused if !is_socket(&socket) => ClientError::NotASocket { socket },
            _ => ClientError::NotRunning { socket, error },
        }
    }

    fn lost(&self, error: &dyn std::error::Error) -> ClientError {
        ClientError::Lost { socket: self.socket.clone(), why: error.to_string() }
    }

    fn foreign(&self, error: &dyn std::error::Error) -> ClientError {
        ClientError::Foreign { socket: self.socket.clone(), why: error.to_string() }
    }
}

impl Events {
    /// Returns the next event, or `None` after the one with an outcome.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost, or if an event cannot be read.
    pub async fn next(&mut self) -> Result<Option<Migration>, ClientError> {
        if self.ended {
            return Ok(None);
        }
        let lost = |why: String| ClientError::Lost { socket: self.socket.clone(), why };
        loop {
            if let Some(data) = self.decoder.next() {
                let migration: Migration = serde_json::from_str(&data).map_err(|error| {
                    ClientError::Foreign { socket: self.socket.clone(), why: error.to_string() }
                })?;
                self.ended = migration.outcome.is_some();
                return Ok(Some(migration));
            }
            if self.decoder.buffered() > MAX_ANSWER_BYTES {
                return Err(lost(format!("an event of more than {MAX_ANSWER_BYTES} bytes")));
            }
            match self.body.frame().await {
                None => return Err(lost("the events ended before the migration did".to_owned())),
                Some(Err(error)) => return Err(lost(error.to_string())),
                Some(Ok(frame)) => self.decoder.add(frame.data_ref().map_or(&[][..], |data| data)),
            }
        }
    }
}

/// Splits a stream of server-sent events (the HTML standard, 9.2.6, as far as
/// [`routes`](super::routes) uses it: one line of data an event, and `\n` at the end of lines).
#[derive(Debug, Default)]
struct EventDecoder {
    bytes: Vec<u8>,
}

impl EventDecoder {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn buffered(&self) -> usize {
        self.bytes.len()
    }

    /// The data of the next event that is complete and has data.
    fn next(&mut self) -> Option<String> {
        while let Some(end) = self.bytes.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.bytes.drain(..end + 2).collect();
            let data = event.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"data: "));
            if let Some(data) = data {
                return Some(String::from_utf8_lossy(data).into_owned());
            }
        }
        None
    }
}

/// Checks that an identity is a single segment of a path.
fn segment(id: &str) -> Result<&str, ClientError> {
    let fits = !id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    fits.then_some(id).ok_or_else(|| {
        let message = format!("{id:?} is not the identity of a migration, which has 32 hexadecimal digits");
        ApiError::new(ErrorCode::UnknownMigration, message).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_the_data_of_events_however_they_are_cut() {
        let stream = b"event: migration\ndata: {\"a\":1}\n\n:\n\nevent: ended\ndata: 2\n\ndata: cut";
        for cut in 0..stream.len() {
            let mut decoder = EventDecoder::default();
            let mut found = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                decoder.add(part);
                found.extend(std::iter::from_fn(|| decoder.next()));
            }
            assert_eq!(found, ["{\"a\":1}", "2"]);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(parts in proptest::collection::vec(".{0,20}|\n\n|data: ", 0..20)) {
            let mut decoder = EventDecoder::default();
            for part in parts {
                decoder.add(part.as_bytes());
                while decoder.next().is_some() {}
                prop_assert!(!decoder.bytes.windows(2).any(|pair| pair == b"\n\n"));
            }
        }
    }

    #[test]
    fn an_identity_is_one_segment() {
        assert!(segment("00ff").is_ok());
        for bad in ["", "a/b", "..", "a?b", "a b", &"0".repeat(65)] {
            assert!(segment(bad).is_err(), "{bad:?}");
        }
    }
}
