//! A connection to the API: whether it is busy, and how long it may stay open.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};

use super::shares::{Holder, Share};

/// The API serves at most this many connections at once. Another one replaces the connection that has been idle for
/// longest, or waits if all are busy.
pub(super) const MAX_CONNECTIONS: usize = 128;
/// A client must read what is written to it within this time, or its connection is closed.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// The state of a connection.
pub(super) struct Line {
    /// The caller at the other end; `None` where everybody may connect.
    holder: Option<Holder>,
    /// The connection has been asked to end.
    leaving: Cell<bool>,
    /// The connection has been idle since this time; `None` while a request is being worked on or followed.
    idle: Cell<Option<Instant>>,
    hang_up: Notify,
}

/// A request over a connection, which is busy until this is dropped.
pub(super) struct Busy(Rc<Line>);

impl Line {
    /// Makes the state of a new connection, which is idle.
    pub(super) fn new(holder: Option<Holder>) -> Rc<Self> {
        let idle = Cell::new(Some(Instant::now()));
        Rc::new(Self { holder, leaving: Cell::new(false), idle, hang_up: Notify::new() })
    }

    /// Returns whether the connection counts towards a share. One that is about to end does not.
    pub(super) fn counts_towards(&self, share: Share) -> bool {
        !self.leaving.get() && self.holder.is_some_and(|holder| share.counts(holder))
    }

    /// Makes the connection busy. HTTP/1.1 has one request at a time.
    pub(super) fn busy(self: &Rc<Self>) -> Busy {
        self.idle.set(None);
        Busy(self.clone())
    }

    /// Returns since when the connection has been idle; `None` while it is busy, or about to end.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        self.idle.get().filter(|_| !self.leaving.get())
    }

    /// Asks the connection to end, to make room for another.
    pub(super) fn hang_up(&self) {
        self.leaving.set(true);
        self.hang_up.notify_one();
    }

    /// Waits until the connection is asked to end.
    pub(super) async fn hung_up(&self) {
        self.hang_up.notified().await;
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.idle.set(Some(Instant::now()));
    }
}

/// A stream with a time limit on writes: the other side must read all that is written within that time. To read a few
/// bytes now and then is not enough.
pub(super) struct Impatient<S> {
    stream: S,
    patience: Duration,
    /// This timer runs from the first write that had to wait until all is written.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> Impatient<S> {
    /// Wraps a stream with this time limit.
    pub(super) fn new(stream: S, patience: Duration) -> Self {
        Self { stream, patience, waiting: None }
    }

    fn wait<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        let patience = self.patience;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(waiting.as_mut().poll(context));
        let what = format!("what was written was not taken within {patience:.0?}");
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, what)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(context, bytes) {
            Poll::Pending => self.wait(context),
            Poll::Ready(Ok(_)) if self.waiting.is_some() && self.wait::<()>(context).is_ready() => {
                self.wait(context)
            }
            done => done,
        }
    }

    /// Stops the timer: the HTTP server flushes when all is written.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        match flushed {
            Poll::Pending => self.wait(context),
            done => {
                self.waiting = None;
                done
            }
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(300);

    #[tokio::test]
    async fn a_reader_that_does_not_read_is_given_up() {
        for trickle in [false, true] {
            let (here, mut there) = UnixStream::pair().unwrap();
            let mut here = Impatient::new(here, PATIENCE);
            let reading = tokio::spawn(async move {
                let mut bytes = vec![0; 100];
                while trickle && there.read(&mut bytes).await.is_ok_and(|count| count > 0) {
                    sleep(PATIENCE / 10).await;
                }
                there
            });
            let (began, bytes) = (Instant::now(), vec![0; 8 << 20]);
            let error = here.write_all(&bytes).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(error.to_string().contains("not taken within"), "{error}");
            assert!(began.elapsed() >= PATIENCE && began.elapsed() < 10 * PATIENCE);
            drop(here);
            reading.abort();
        }
    }

    #[tokio::test]
    async fn a_reader_that_keeps_up_may_take_as_long_as_it_likes() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut here = Impatient::new(here, PATIENCE);
        let reading = tokio::spawn(async move {
            let mut total = 0;
            let mut bytes = vec![0; 1 << 20];
            while let Ok(count @ 1..) = there.read(&mut bytes).await {
                total += count;
            }
            total
        });
        for _ in 0..8 {
            here.write_all(&vec![0; 1 << 20]).await.unwrap();
            here.flush().await.unwrap();
            sleep(PATIENCE / 4).await;
        }
        drop(here);
        assert_eq!(reading.await.unwrap(), 8 << 20);
    }
}
