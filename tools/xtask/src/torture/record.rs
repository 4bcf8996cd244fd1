//! Records that VMMs and daemons wrote while they lived: histories of guests, and the daemons' logs of the handover.
//!
//! Both are read from files, which outlive the processes that wrote them, and carry the time of one clock.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::Value;

/// A time, in nanoseconds since 1970-01-01T00:00:00Z.
pub(crate) type Time = u64;

/// Returns the time now.
pub(crate) fn now() -> Time {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as Time
}

/// The history of a guest, as a VMM wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GuestHistory(Vec<(Time, NotedState)>);

/// The state of a guest in a VMM, as the VMM wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotedState {
    /// The guest is expected from another host.
    Incoming,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The guest has arrived and is paused.
    Loaded,
    /// The guest was given up.
    Discarded,
}

impl GuestHistory {
    /// Reads the history from the VMM's file; it is empty if there is no file yet.
    pub(crate) fn read(path: &Path) -> Self {
        Self::parse(&std::fs::read_to_string(path).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let entry: Value = serde_json::from_str(line).ok()?;
            Some((entry["at_ns"].as_u64()?, NotedState::of(entry["standing"].as_str()?)?))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    #[cfg(test)]
    pub(crate) fn of(entries: &[(Time, NotedState)]) -> Self {
        Self(entries.to_vec())
    }

    /// Returns the guest's last state.
    pub(crate) fn last(&self) -> Option<NotedState> {
        self.0.last().map(|(_, standing)| *standing)
    }

    /// Returns when the guest was in this state for the first time.
    pub(crate) fn since(&self, standing: NotedState) -> Option<Time> {
        self.0.iter().find(|(_, found)| *found == standing).map(|(time, _)| *time)
    }

    /// Returns when the guest ran. An end is `None` if the VMM wrote none. A start that failed does not count.
    pub(crate) fn ran(&self) -> Vec<(Time, Option<Time>)> {
        let starts = self.0.iter().enumerate().filter(|(_, (_, standing))| *standing == NotedState::Running);
        let next = |at: usize| self.0.get(at + 1);
        starts
            .filter(|(at, _)| !matches!(next(*at), Some((_, NotedState::Loaded | NotedState::Incoming))))
            .map(|(at, (start, _))| (*start, next(at).map(|(end, _)| *end)))
            .collect()
    }
}

impl NotedState {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "incoming" => Self::Incoming,
            "running" => Self::Running,
            "paused" => Self::Paused,
            "loaded" => Self::Loaded,
            "discarded" => Self::Discarded,
            _ => return None,
        })
    }
}

/// A part of a daemon's log, from some place on.
#[derive(Clone, Debug)]
pub(crate) struct DaemonLog {
    path: PathBuf,
    from: u64,
}

impl DaemonLog {
    /// Makes the part that will be written to `path` from now on.
    pub(crate) fn from_now(path: PathBuf) -> Self {
        let from = path.metadata().map_or(0, |file| file.len());
        Self { path, from }
    }

    /// Reads the part.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(crate) fn read(&self) -> Result<String> {
        let mut bytes = Vec::new();
        let mut read = || {
            let mut file = std::fs::File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.from))?;
            file.read_to_end(&mut bytes)
        };
        read().with_context(|| format!("reading the log {}", self.path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Returns when a daemon did `action` for the first time in the handover of guest `name`, according to its log.
pub(crate) fn first_action(log: &str, name: &str, action: &str) -> Option<Time> {
    let (guest, action) = (format!(" guest={name} "), format!(" action={action}"));
    let done = |line: &&str| line.contains(" handover ") && line.contains(&guest) && line.ends_with(&action);
    log.lines().find(done).and_then(time_of)
}

/// Returns when a daemon first saw that the VMM of guest `name` was gone, according to its log.
pub(crate) fn seen_gone(log: &str, name: &str) -> Option<Time> {
    let guest = format!(" a VMM is gone guest={name} ");
    log.lines().find(|line| line.contains(&guest)).and_then(time_of)
}

/// Finds lines that a daemon or a VMM should never write.
pub(crate) fn panics(log: &str) -> Vec<String> {
    log.lines().filter(|line| line.contains("panicked at")).map(str::to_owned).collect()
}

/// Parses the time at the beginning of a line, such as `2026-01-31T23:59:59.123456Z`.
fn time_of(line: &str) -> Option<Time> {
    let (date, time) = line.split_whitespace().next()?.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (clock, fraction) = time.split_once('.')?;
    let mut clock = clock.splitn(3, ':').map(|part| part.parse::<u64>().ok());
    let seconds = clock.next()?? * 3600 + clock.next()?? * 60 + clock.next()??;
    let nanoseconds = format!("{fraction:0<9}").get(..9)?.parse::<u64>().ok()?;
    Some((days(year, month, day)? * 86_400 + seconds) * 1_000_000_000 + nanoseconds)
}

/// Returns the days from 1970-01-01 to a date of the Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    // Years that begin in March end with the day that is there in leap years only.
    let year = if month <= 2 { year.checked_sub(1)? } else { year };
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day.checked_sub(1)?;
    (year * 365 + year / 4 - year / 100 + year / 400 + of_year).checked_sub(719_468)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_tells_when_the_guest_ran() {
        let text = "{\"at_ns\":5,\"standing\":\"paused\"}\n{\"at_ns\":10,\"standing\":\"running\"}\n\
                    {\"at_ns\":20,\"standing\":\"paused\"}\n{\"at_ns\":30,\"standing\":\"running\"}\n{\"at_";
        let history = GuestHistory::parse(text);
        assert_eq!(history.ran(), [(10, Some(20)), (30, None)]);
        assert_eq!(history.last(), Some(NotedState::Running));
        assert_eq!((history.since(NotedState::Running), history.since(NotedState::Loaded)), (Some(10), None));

        let failed = [(1, NotedState::Loaded), (2, NotedState::Running), (3, NotedState::Loaded)];
        assert_eq!(GuestHistory::of(&failed).ran(), []);
    }

    #[test]
    fn actions_are_found_in_a_log() {
        let line = |guest, action| {
            format!(
                "2026-11-29T04:35:21.250000Z DEBUG memlane_migrate::effects: handover guest={guest} action={action}\n"
            )
        };
        let log = [
            line("t10", "Send(Commit)"),
            line("t1", "Resume"),
            line("t1", "Send(Commit)"),
            "2026-11-29T04:35:21.250000Z  INFO memlane_guest::registry: a VMM is gone guest=t1 pid=3\n"
                .to_owned(),
            "thread 'main' panicked at src/main.rs:1:1:\n".to_owned(),
        ];
        let log = log.concat();
        let at = 1_795_926_921_250_000_000;
        assert_eq!(first_action(&log, "t1", "Send(Commit)"), Some(at));
        assert_eq!(first_action(&log, "t1", "Send(Running)"), None);
        assert_eq!((seen_gone(&log, "t1"), seen_gone(&log, "t10")), (Some(at), None));
        assert_eq!(panics(&log).len(), 1);
    }

    #[test]
    fn dates_are_counted_through_leap_years() {
        assert_eq!(days(1970, 1, 1), Some(0));
        assert_eq!(days(2000, 3, 1), Some(11_017));
        assert_eq!(days(2024, 2, 29), Some(19_782));
        assert_eq!(days(2026, 11, 29), Some(20_786));
    }
}
