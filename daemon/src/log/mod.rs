//! The log of the daemon: a thread of its own writes it, and untrusted text in it is made harmless (see
//! [`memlane_protocol::wire::plain`]).

mod journal;

use std::io::{self, Write};
use std::sync::OnceLock;

use memlane_protocol::wire::plain;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

use journal::{JournalLayer, JournalSocket};

/// So many lines wait to be written. More are lost: what reads the log (a journal, a full disk) stands still, and guests
/// must not.
const LINES: usize = 10_000;

static LOST: OnceLock<ErrorCounter> = OnceLock::new();

/// Begins to log what `filter` lets pass: to the journal if systemd has started this process, else to the standard error
/// stream. Nobody who logs ever waits. What waits to be written when the guard is dropped is written then, if that takes
/// no longer than a second.
pub fn begin(filter: EnvFilter) -> WorkerGuard {
    let registry = tracing_subscriber::registry().with(filter);
    if journal::is_stderr()
        && let Ok(socket) = JournalSocket::new()
    {
        let (writer, guard) = aside(socket);
        registry.with(JournalLayer(writer)).init();
        return guard;
    }
    let (writer, guard) = aside(PlainLog(io::stderr()));
    registry.with(fmt::layer().with_writer(writer).with_ansi(false)).init();
    guard
}

/// Returns how many lines of the log were lost, because what reads it was too slow, or took none.
pub fn lost_lines() -> u64 {
    LOST.get().map_or(0, |lost| lost.dropped_lines() as u64) + journal::refused()
}

/// Returns a writer that has a thread of its own write, and never waits.
fn aside(writer: impl Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    let builder = NonBlockingBuilder::default().buffered_lines_limit(LINES).thread_name("log");
    let (writer, guard) = builder.finish(writer);
    let _ = LOST.set(writer.error_counter());
    (writer, guard)
}

/// A writer of log lines that turns each write into one line of plain text. Names, paths and reasons come from peers,
/// VMMs and QEMU. One of them with an end of line in it would look like another line of the daemon's log.
pub struct PlainLog<W>(pub W);

impl<W: Write> Write for PlainLog<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let end = if line.len() < text.len() { "\n" } else { "" };
        // Where the log cannot be written, nobody can be told, and guests go on. An error here would make the logger panic.
        let _ = self.0.write_all(format!("{}{end}", plain(line)).as_bytes());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What the log is written to is full.
    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_that_is_full_ends_nothing() {
        assert_eq!(PlainLog(Full).write(b"a line\n").unwrap(), 7);
    }

    #[test]
    fn an_event_is_one_line_whatever_its_fields_say() {
        let kept = Kept::default();
        let writer = kept.clone();
        let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || PlainLog(writer.clone()));
        tracing::subscriber::with_default(log.finish(), || {
            let reason = "gone\u{1b}[2J\n2026-11-29T00:00:00Z  INFO all is well\u{9b}\u{202e}";
            tracing::warn!(reason, name = %reason, "it failed: {reason}");
            tracing::info!("and on");
        });
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text:?}");
        assert!(lines[0].contains("all is well") && lines[1].ends_with("and on"), "{text:?}");
        assert!(lines.iter().all(|line| !line.contains(memlane_protocol::wire::is_obeyed)), "{text:?}");
    }
}
