//! This module logs that a host does not answer, ever more rarely, since that may take days.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use memlane_net::journal::Entry;
use memlane_protocol::handover::Message;
use tracing::info;

/// These are the shortest and the longest time between two lines of the log.
const BETWEEN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));

/// The answers, so far, of a host that was asked.
#[derive(Default)]
pub(crate) struct Silence {
    /// This is when the next line is due, and how long after it the one after that.
    next: Cell<Option<(Instant, Duration)>>,
    why: RefCell<String>,
}

impl Silence {
    /// Notes that the other host did not answer, and logs it if a line is due.
    pub(crate) fn goes_on(&self, entry: &Entry, why: impl ToString) {
        let why = why.to_string();
        if self.due(Instant::now()) {
            info!(guest = %entry.guest, peer = %entry.peer, why, "cannot reach the other host about a guest; trying on");
        }
        self.why.replace(why);
    }

    /// Notes that the other host answered.
    pub(crate) fn broken(&self, entry: &Entry, message: Message) {
        if message == Message::Unknown {
            return self.goes_on(entry, "it knows nothing of this migration: memlanectl resolve");
        }
        self.next.set(None);
        self.why.take();
    }

    /// Returns what is waited for, in words for operators.
    pub(crate) fn words(&self, entry: &Entry) -> String {
        let why = self.why.borrow();
        let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
        format!("{} to say what has become of the guest{why}", entry.peer)
    }

    fn due(&self, now: Instant) -> bool {
        let (at, wait) = self.next.get().unwrap_or((now, BETWEEN.0));
        let due = now >= at;
        if due {
            self.next.set(Some((now + wait, (wait * 2).min(BETWEEN.1))));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_silence_is_told_ever_more_seldom() {
        let silence = Silence::default();
        let start = Instant::now();
        let told: Vec<u64> =
            (0..4000).filter(|second| silence.due(start + Duration::from_secs(*second))).collect();
        assert_eq!(told, [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 1623, 2223, 2823, 3423]);
    }
}
