//! The log as systemd's journal takes it: what an event is about is in fields of its own, by which it can be found
//! (`journalctl MEMLANE_GUEST=web1`).
//!
//! The crate `tracing-journald` would do the same on the thread that logs, and so have the control thread wait for a journal that
//! stands still. Here a thread of its own sends, as for every other log.

use std::fmt::{self, Debug, Write as _};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};

use memlane_protocol::wire::plain;
use rustix::fs::fstat;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Where the journal takes entries: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>.
const SOCKET: &str = "/run/systemd/journal/socket";
/// The beginning of the names of all fields but the journal's own.
const PREFIX: &str = "MEMLANE_";

/// The number of entries that the journal did not take.
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// Returns how many entries the journal did not take.
pub(super) fn refused() -> u64 {
    REFUSED.load(Ordering::Relaxed)
}

/// Returns whether the standard error stream leads to the journal, as the service manager says in `JOURNAL_STREAM`.
pub(super) fn is_stderr() -> bool {
    let said = std::env::var("JOURNAL_STREAM").ok();
    let found = fstat(io::stderr().as_fd()).map(|found| format!("{}:{}", found.st_dev, found.st_ino));
    said.is_some() && said == found.ok()
}

/// A writer that turns each write into one entry of the journal.
pub(super) struct JournalSocket(UnixDatagram);

impl JournalSocket {
    /// Makes a socket that belongs to nobody yet.
    ///
    /// # Errors
    ///
    /// If the process has no file descriptor left.
    pub(super) fn new() -> io::Result<Self> {
        UnixDatagram::unbound().map(Self)
    }
}

impl Write for JournalSocket {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        // By its path each time: a journal that was started anew has another socket there. Where it cannot be reached, nobody can be
        // told, and guests go on.
        if self.0.send_to(entry, SOCKET).is_err() {
            REFUSED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes each event as an entry of the journal, with the fields of the spans that it is in.
pub(super) struct JournalLayer<W>(pub(super) W);

impl<S, W> Layer<S> for JournalLayer<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut entry = Entry { span: Some(attributes.metadata().name()), ..Entry::default() };
        attributes.record(&mut entry);
        span.extensions_mut().insert(entry);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(entry) = span.extensions_mut().get_mut::<Entry>() {
            values.record(entry);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut own = Entry::default();
        event.record(&mut own);
        let metadata = event.metadata();
        let (mut text, mut within) = (String::new(), String::new());
        // What is said twice is said by the event itself, and the journal takes both.
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(of_span) = span.extensions().get::<Entry>() {
                text += &of_span.fields;
                let _ = write!(within, "{}{{{}}}: ", span.name(), of_span.said.trim_start());
            }
        }
        text += &own.fields;
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "MESSAGE={within}{}{}\nPRIORITY={}\nSYSLOG_IDENTIFIER=memlaned\n{PREFIX}TARGET={}\n",
            own.message,
            own.said,
            priority(*metadata.level()),
            metadata.target(),
        );
        let _ = self.0.make_writer_for(metadata).write_all(text.as_bytes());
    }
}

/// The fields of an event or a span.
#[derive(Default)]
struct Entry {
    /// The name of the span that they are of.
    span: Option<&'static str>,
    message: String,
    /// The other fields, as they are read after the message.
    said: String,
    /// The same, as fields of the journal.
    fields: String,
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.take(field.name(), &format!("{value:?}"));
    }
}

impl Entry {
    fn take(&mut self, name: &str, value: &str) {
        // Names, paths and reasons come from others. An end of line would begin another field.
        let value = plain(value).to_string();
        if name == "message" {
            self.message = value;
            return;
        }
        let _ = write!(self.said, " {name}={value}");
        // The id of a span is that of the thing that the span is named after.
        let name = match self.span {
            Some(span) if name == "id" => span,
            _ => name,
        };
        let name: String = name.chars().filter_map(journal_character).collect();
        let _ = writeln!(self.fields, "{PREFIX}{name}={value}");
    }
}

impl fmt::Debug for JournalSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SOCKET)
    }
}

/// Turns a character of a field's name into one that the journal permits.
fn journal_character(c: char) -> Option<char> {
    match c {
        '.' | '_' => Some('_'),
        c if c.is_ascii_alphanumeric() => Some(c.to_ascii_uppercase()),
        _ => None,
    }
}

/// Returns the priority of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{info, info_span, warn};
    use tracing_subscriber::prelude::*;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_entry_has_the_fields_of_its_event_and_of_its_spans() {
        let kept = Kept::default();
        let writer = kept.clone();
        let log = tracing_subscriber::registry().with(JournalLayer(move || writer.clone()));
        tracing::subscriber::with_default(log, || {
            let span = info_span!("migration", id = %"4711", guest = %"web1");
            span.in_scope(|| warn!(pages = 7, reason = "gone\nMEMLANE_GUEST=web2", "it failed"));
            info!(guest = %"web3", "and on");
        });
        let entries = kept.0.lock().unwrap().clone();
        let text = |entry: &[u8]| String::from_utf8(entry.to_vec()).unwrap();
        assert_eq!(entries.len(), 2);
        let first = text(&entries[0]);
        let lines: Vec<&str> = first.lines().collect();
        for wanted in ["MEMLANE_MIGRATION=4711", "MEMLANE_GUEST=web1", "MEMLANE_PAGES=7", "PRIORITY=4"] {
            assert!(lines.contains(&wanted), "{first}");
        }
        assert!(!lines.contains(&"MEMLANE_GUEST=web2"), "{first}");
        assert!(
            first.contains("MESSAGE=migration{id=4711 guest=web1}: it failed pages=7 reason="),
            "{first}"
        );
        let second = text(&entries[1]);
        assert!(second.contains("MEMLANE_GUEST=web3\n") && !second.contains("4711"), "{second}");
    }
}
