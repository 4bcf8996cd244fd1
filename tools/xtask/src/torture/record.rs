//! What VMMs and daemons wrote down while they lived: histories of guests, and the daemons' logs of the handover.
//!
//! Both are read from files, which outlive whoever wrote them, and carry the time of one clock.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::Value;

/// A time, in nanoseconds since 1970-01-01T00:00:00Z.
pub type Time = u64;

/// Now.
pub fn now() -> Time {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as Time
}

/// What a VMM noted of its guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History(Vec<(Time, Standing)>);

/// What a guest does in a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is expected.
    Incoming,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It has arrived and stands still.
    Loaded,
    /// It was given up.
    Discarded,
}

impl History {
    /// Out of the VMM's file; nothing, if there is none yet.
    pub fn read(path: &Path) -> Self {
        Self::parse(&std::fs::read_to_string(path).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let entry: Value = serde_json::from_str(line).ok()?;
            Some((entry["at_ns"].as_u64()?, Standing::of(entry["standing"].as_str()?)?))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    #[cfg(test)]
    pub fn of(entries: &[(Time, Standing)]) -> Self {
        Self(entries.to_vec())
    }

    /// What the guest did last.
    pub fn last(&self) -> Option<Standing> {
        self.0.last().map(|(_, standing)| *standing)
    }

    /// Since when it has been so for the first time.
    pub fn since(&self, standing: Standing) -> Option<Time> {
        self.0.iter().find(|(_, found)| *found == standing).map(|(time, _)| *time)
    }

    /// When the guest ran, the end being `None` where none was noted. A start that failed is none.
    pub fn ran(&self) -> Vec<(Time, Option<Time>)> {
        let starts = self.0.iter().enumerate().filter(|(_, (_, standing))| *standing == Standing::Running);
        let next = |at: usize| self.0.get(at + 1);
        starts
            .filter(|(at, _)| !matches!(next(*at), Some((_, Standing::Loaded | Standing::Incoming))))
            .map(|(at, (start, _))| (*start, next(at).map(|(end, _)| *end)))
            .collect()
    }
}

impl Standing {
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

/// A daemon's log from somewhere on.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    from: u64,
}

impl Log {
    /// What will be written to `path` from now on.
    pub fn from_now(path: PathBuf) -> Self {
        let from = path.metadata().map_or(0, |file| file.len());
        Self { path, from }
    }

    /// What was.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn read(&self) -> Result<String> {
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

/// When a daemon did `action` first in the handover of guest `name`, as its log of that says.
pub fn first_action(log: &str, name: &str, action: &str) -> Option<Time> {
    let (guest, action) = (format!(" guest={name} "), format!(" action={action}"));
    let done = |line: &&str| line.contains(" handover ") && line.contains(&guest) && line.ends_with(&action);
    log.lines().find(done).and_then(time_of)
}

/// When a daemon first saw that the VMM of guest `name` was gone, as its log of that says.
pub fn seen_gone(log: &str, name: &str) -> Option<Time> {
    let guest = format!(" a VMM is gone guest={name} ");
    log.lines().find(|line| line.contains(&guest)).and_then(time_of)
}

/// Lines that no daemon or VMM should ever write.
pub fn panics(log: &str) -> Vec<String> {
    log.lines().filter(|line| line.contains("panicked at")).map(str::to_owned).collect()
}

/// The time at the beginning of a line, such as `2026-01-31T23:59:59.123456Z`.
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

/// Days from 1970-01-01 to a date of the Gregorian calendar.
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
        let history = History::parse(text);
        assert_eq!(history.ran(), [(10, Some(20)), (30, None)]);
        assert_eq!(history.last(), Some(Standing::Running));
        assert_eq!((history.since(Standing::Running), history.since(Standing::Loaded)), (Some(10), None));

        let failed = [(1, Standing::Loaded), (2, Standing::Running), (3, Standing::Loaded)];
        assert_eq!(History::of(&failed).ran(), []);
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
