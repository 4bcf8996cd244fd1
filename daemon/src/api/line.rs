//! One connection to the API: what it may be kept open by, and for how long.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};

/// Connections served at once. One more takes the place of the one over which nothing was asked for
/// longest; where all are busy, it waits to be accepted.
pub const MAX_CONNECTIONS: usize = 128;
/// Whoever does not take what is written within this time is hung up on.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a connection is doing.
pub struct Line {
    /// Since when nothing that was asked for over it is being worked on or followed.
    idle: Cell<Option<Instant>>,
    hang_up: Notify,
}

/// Something that was asked for over a connection, until this is dropped.
pub struct Busy(Rc<Line>);

impl Line {
    /// A connection over which nothing was asked for yet.
    pub fn new() -> Rc<Self> {
        Rc::new(Self { idle: Cell::new(Some(Instant::now())), hang_up: Notify::new() })
    }

    /// Something is being worked on or followed from now on. HTTP/1.1 asks for one thing at a time.
    pub fn busy(self: &Rc<Self>) -> Busy {
        self.idle.set(None);
        Busy(self.clone())
    }

    /// Since when nothing is.
    pub fn idle_since(&self) -> Option<Instant> {
        self.idle.get()
    }

    /// Has it end, for others to come.
    pub fn hang_up(&self) {
        // Not once more while it is about to end.
        self.idle.set(None);
        self.hang_up.notify_one();
    }

    /// Returns when it is to end.
    pub async fn hung_up(&self) {
        self.hang_up.notified().await;
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.idle.set(Some(Instant::now()));
    }
}

/// A stream whose other side must take what is written within a time, all of it: a few bytes now and then
/// do not count.
pub struct Impatient<S> {
    stream: S,
    patience: Duration,
    /// Runs since the first write that had to wait, until nothing waits any more.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> Impatient<S> {
    /// Waits so long at the most.
    pub fn new(stream: S, patience: Duration) -> Self {
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

    /// Whoever writes flushes when everything is written.
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
