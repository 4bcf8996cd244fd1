//! Admits callers to the API, and turns away those who may not use it before anything that they say is read.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use memlane_api::json::to_json;
use memlane_api::types::{ApiError, ErrorBody, ErrorCode};
use memlane_net::log_limiter::LogLimiter;
use memlane_net::task;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::warn;

use super::Caller;
use super::access::{Access, Role};
use super::call::Call;

/// Connections that are turned away are told why, at most this many at once. Beyond that they are closed without a word.
const MAX_FAREWELLS: usize = 16;
/// A connection that is turned away is closed after this time at the latest.
const FAREWELL: Duration = Duration::from_secs(1);

/// The gate of the API.
pub(super) struct Gate {
    access: Access,
    farewells: Rc<Semaphore>,
    told: RefCell<LogLimiter<(Option<u32>, &'static str)>>,
}

impl Gate {
    pub(super) fn new(access: Access) -> Self {
        Self { access, farewells: Rc::new(Semaphore::new(MAX_FAREWELLS)), told: RefCell::default() }
    }

    /// Returns the role of a caller.
    ///
    /// # Errors
    ///
    /// Fails if the caller may not use the API at all, with the answer for it.
    pub(super) fn admit(&self, caller: &Caller) -> Result<Role, ApiError> {
        let Some(role) = self.access.role(caller) else {
            self.log(caller, "closed a connection to the API: its user may neither look nor order");
            return Err(self.forbidden(caller, "may neither look nor give orders", Role::Viewer));
        };
        Ok(role)
    }

    /// Checks that a caller may make a call.
    ///
    /// # Errors
    ///
    /// Fails if the call needs another role, with the answer for it.
    pub(super) fn check(&self, caller: &Caller, role: Role, call: Call) -> Result<(), ApiError> {
        if role >= call.needs() {
            return Ok(());
        }
        self.log(caller, "refused an order: its user may only look");
        Err(self.forbidden(caller, "may look, but not give orders", call.needs()))
    }

    fn forbidden(&self, caller: &Caller, what: &str, needed: Role) -> ApiError {
        let user = caller.uid.map_or("an unknown user".to_owned(), |uid| format!("user {uid}"));
        ApiError::new(ErrorCode::Forbidden, format!("{user} {what}; {}", self.access.who_may(needed)))
    }

    /// Logs what callers can cause as often as they like.
    fn log(&self, caller: &Caller, what: &'static str) {
        if let Some(left_out) = self.told.borrow_mut().say((caller.uid, what)) {
            warn!(%caller, left_out, "{what}");
        }
    }

    /// Closes a connection that is not served, and tells the caller why, if that can be done at once.
    pub(super) fn turn_away(&self, stream: UnixStream, why: ApiError) {
        let farewells = self.farewells.clone();
        task::spawn("API connection that is turned away", async move {
            let Ok(_place) = farewells.try_acquire() else { return };
            let _ = timeout(FAREWELL, farewell(stream, why)).await;
        });
    }
}

/// Answers whatever is asked with the same error. The request is thrown away unseen, but it is waited for: a client that is
/// answered before it asks takes that for a mistake, and one that is hung up on while it asks may not see the answer.
async fn farewell(mut stream: UnixStream, why: ApiError) -> std::io::Result<()> {
    let mut unread = [0; 4096];
    if stream.read(&mut unread).await? == 0 {
        return Ok(());
    }
    let status = why.code.http_status();
    let body = to_json(&ErrorBody { error: why });
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stranger(text: &str) -> ApiError {
        ApiError::new(ErrorCode::Forbidden, text)
    }

    #[tokio::test]
    async fn who_is_turned_away_is_told_why_once_it_has_asked() {
        for asks in ["GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n", "nonsense"] {
            let (here, mut there) = UnixStream::pair().unwrap();
            let farewell = tokio::spawn(farewell(here, stranger("not for you")));
            let too_early = timeout(Duration::from_millis(50), there.read(&mut [0])).await;
            assert!(too_early.is_err(), "the answer comes before the request");
            there.write_all(asks.as_bytes()).await.unwrap();
            let mut answer = String::new();
            there.read_to_string(&mut answer).await.unwrap();
            drop(there);
            farewell.await.unwrap().unwrap();
            assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("connection: close"), "{answer}");
            assert!(answer.contains("\"code\":\"forbidden\"") && answer.contains("not for you"), "{answer}");
        }
    }

    #[tokio::test]
    async fn who_says_nothing_and_leaves_is_let_go() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        farewell(here, stranger("not for you")).await.unwrap();
    }
}
