//! The open connections of a listener, and who makes room for whom.

use std::convert::Infallible;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use memlane_api::types::{ApiError, ErrorCode};
use memlane_net::task;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::body::{MAX_BODY_BYTES, REQUEST_TIMEOUT};
use super::line::{Impatient, Line, MAX_CONNECTIONS, WRITE_TIMEOUT};
use super::routes::Answer;
use super::shares::{Holder, Share};

/// The open connections. They end when this is dropped.
pub(super) struct Connections {
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
    /// Makes room for a connection of this caller. If its share of all connections is in use, the connection in that share
    /// which has been idle for longest ends.
    ///
    /// # Errors
    ///
    /// Fails if all connections in the share are busy, with the answer for the caller.
    pub(super) fn make_room_for(&mut self, holder: Holder) -> Result<(), ApiError> {
        self.lines.retain(|line| line.strong_count() > 0);
        for share in Share::of(holder) {
            let lines = self.lines.iter().filter_map(Weak::upgrade);
            let in_share: Vec<_> = lines.filter(|line| line.counts_towards(share)).collect();
            let most = share.most(MAX_CONNECTIONS);
            if in_share.len() >= most && !hang_up_on_idle(in_share.into_iter()) {
                let holders = share.holders();
                let text =
                    format!("{most} connections of {holders} are busy, which is all that they may have");
                return Err(ApiError::new(ErrorCode::Unavailable, text));
            }
        }
        Ok(())
    }

    /// Serves a connection. If there are as many as there may be, the one that has been idle for longest ends first; if
    /// all are busy, this waits until one is not.
    pub(super) async fn add<S, F>(
        &mut self,
        stream: S,
        holder: Option<Holder>,
        answer: impl Fn(Rc<Line>, Request<Incoming>) -> F + 'static,
    ) where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
        F: Future<Output = Result<Answer, Infallible>> + 'static,
    {
        while self.tasks.try_join_next().is_some() {}
        self.lines.retain(|line| line.strong_count() > 0);
        if self.free.available_permits() == 0 {
            hang_up_on_idle(self.lines.iter().filter_map(Weak::upgrade));
        }
        let permit = self.free.clone().acquire_owned().await.expect("it is never closed");
        let line = Line::new(holder);
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
}

/// Ends the connection that has been idle for longest. Returns `false` if all are busy.
fn hang_up_on_idle(lines: impl Iterator<Item = Rc<Line>>) -> bool {
    let idle = lines.filter_map(|line| Some((line.idle_since()?, line)));
    let Some((_, line)) = idle.min_by_key(|(since, _)| *since) else { return false };
    line.hang_up();
    true
}
