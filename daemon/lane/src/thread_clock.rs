//! How long a thread runs, and how long it waits for a processor.

use std::fs::File;
use std::time::Duration;

/// The scheduler's statistics of the calling thread: `schedstat` of proc(5).
pub(crate) struct ThreadClock(File);

impl ThreadClock {
    /// Returns the clock of the calling thread, or `None` where the kernel keeps none.
    pub(crate) fn open() -> Option<Self> {
        let clock = Self(File::open("/proc/thread-self/schedstat").ok()?);
        clock.read().is_some().then_some(clock)
    }

    /// Reads for how long the thread has run, and for how long it has waited for a processor.
    pub(crate) fn read(&self) -> Option<(Duration, Duration)> {
        let mut bytes = [0; 128];
        let count = rustix::io::pread(&self.0, &mut bytes, 0).ok()?;
        let text = std::str::from_utf8(&bytes[..count]).ok()?;
        let mut times = text.split_whitespace().map_while(|field| field.parse().ok());
        Some((Duration::from_nanos(times.next()?), Duration::from_nanos(times.next()?)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_thread_has_run() {
        let Some(clock) = ThreadClock::open() else { return };
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(20) {}
        assert!(clock.read().unwrap().0 > Duration::ZERO);
    }
}
