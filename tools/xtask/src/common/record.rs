//! The daemons' logs of the handover, which outlive them. They carry the time of the same clock as the histories of guests.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context, Result};
use memlane_lab::Time;

/// A part of the log of a daemon or a VMM, from some place on.
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

    /// Makes the whole log of a file.
    pub(crate) fn from_start(path: PathBuf) -> Self {
        Self { path, from: 0 }
    }

    /// Reads the whole lines of the part, and moves its beginning behind them.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(crate) fn read_on(&mut self) -> Result<String> {
        let mut text = self.read_bytes()?;
        text.truncate(text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1));
        self.from += text.len() as u64;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Reads the part.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(crate) fn read(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.read_bytes()?).into_owned())
    }

    fn read_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut read = || {
            let mut file = std::fs::File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.from))?;
            file.read_to_end(&mut bytes)
        };
        read().with_context(|| format!("reading the log {}", self.path.display()))?;
        Ok(bytes)
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
