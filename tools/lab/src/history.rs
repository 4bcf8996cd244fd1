//! When a guest ran, as its VMM wrote it down: the file outlives the VMM, however that ends.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// A time, in nanoseconds since 1970-01-01T00:00:00Z.
pub type Time = u64;

/// Returns the time now.
pub fn time_now() -> Time {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as Time
}

/// The history of a guest, as a VMM wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestHistory(Vec<(Time, NotedState)>);

/// The state of a guest in a VMM, as the VMM wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotedState {
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
    pub fn read(path: &Path) -> Self {
        Self::parse(&std::fs::read_to_string(path).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let entry: Value = serde_json::from_str(line).ok()?;
            Some((entry["at_ns"].as_u64()?, NotedState::of(entry["standing"].as_str()?)?))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    /// Makes a history of these entries.
    pub fn of(entries: &[(Time, NotedState)]) -> Self {
        Self(entries.to_vec())
    }

    /// Returns the guest's last state.
    pub fn last(&self) -> Option<NotedState> {
        self.0.last().map(|(_, standing)| *standing)
    }

    /// Returns when the guest was in this state for the first time.
    pub fn since(&self, standing: NotedState) -> Option<Time> {
        self.0.iter().find(|(_, found)| *found == standing).map(|(time, _)| *time)
    }

    /// Returns when the guest ran. An end is `None` if the VMM wrote none. A start that failed does not count.
    pub fn ran(&self) -> Vec<(Time, Option<Time>)> {
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
}
