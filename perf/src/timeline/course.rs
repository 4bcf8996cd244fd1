//! [`Course`]: the phases of a migration, as it reports them at its end.

use memlane_api::types::Migration;

/// The phases of a migration. All times are seconds since the order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Course {
    /// The time when the migration had ended.
    pub ended: f64,
    /// The rounds of pre-copy.
    pub rounds: Vec<RoundSpan>,
    /// The time during which the guest's writes were held up.
    pub stun: Option<TimeSpan>,
    /// The time from the guest's last instruction at the source to its first at the destination.
    pub pause: Option<TimeSpan>,
    /// The predicted length of the pause.
    pub predicted_pause: Option<f64>,
    /// The time during which the guest ran without all of its memory.
    pub postcopy: Option<TimeSpan>,
}

/// A span of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimeSpan {
    /// The beginning of the span.
    pub from: f64,
    /// The end of the span.
    pub to: f64,
}

/// A round of pre-copy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundSpan {
    /// The number of the round, from 1.
    pub number: u32,
    /// The span of time that the round took.
    pub span: TimeSpan,
    /// The number of bytes that the round put on the wire.
    pub sent: f64,
    /// The number of bytes of the pages that the guest wrote during the round, which are still to be sent.
    pub dirtied: f64,
}

impl TimeSpan {
    /// Returns the length of the span in seconds.
    pub fn seconds(self) -> f64 {
        self.to - self.from
    }
}

impl Course {
    /// Reads the phases of a migration that has ended.
    ///
    /// It tells how long each round took and when the guest stopped, and one round follows the other; so when they were
    /// is known to a few milliseconds. Without a pause they are put behind the time of preparing.
    pub fn of(migration: &Migration) -> Self {
        const PAGE: f64 = 4096.0;
        let since_order = |unix_seconds: f64| unix_seconds - migration.started_at_unix_seconds;
        let pause =
            migration.stopped_at_seconds.zip(migration.downtime_seconds).map(|(stopped, downtime)| {
                let from = since_order(stopped);
                TimeSpan { from, to: from + downtime }
            });
        let done: Vec<_> = migration.rounds.iter().filter(|round| round.seconds > 0.0).collect();
        let copying: f64 = done.iter().map(|round| round.seconds).sum();
        let copied = pause.map_or(migration.total_seconds, |pause| pause.from);
        let mut from = (copied - copying).max(0.0);
        let rounds = done.iter().map(|round| {
            let span = TimeSpan { from, to: from + round.seconds };
            from = span.to;
            RoundSpan {
                number: round.round,
                span,
                sent: round.bytes as f64,
                dirtied: round.dirtied_pages as f64 * PAGE,
            }
        });
        let rounds = rounds.collect();
        let postcopy = migration
            .postcopy
            .as_ref()
            .zip(pause)
            .map(|(postcopy, pause)| TimeSpan { from: pause.to, to: pause.to + postcopy.seconds });
        let stun = migration
            .stun
            .as_ref()
            .map(|stun| TimeSpan { from: (copied - stun.seconds).max(0.0), to: copied });
        Self {
            ended: migration.total_seconds,
            rounds,
            stun,
            pause,
            predicted_pause: migration.downtime_predicted_seconds,
            postcopy,
        }
    }
}

#[cfg(test)]
mod tests {
    use memlane_api::types::{Postcopy, Round};

    use super::*;

    fn round(round: u32, seconds: f64) -> Round {
        Round { round, pages: 100, bytes: 500_000, seconds, dirtied_pages: 10, harvest_seconds: 0.01 }
    }

    #[test]
    fn rounds_end_when_the_guest_stops() {
        let mut migration = Migration::new("0", "web1", "host-b");
        migration.started_at_unix_seconds = 1000.0;
        migration.total_seconds = 9.0;
        // The last one was cut short by the switchover.
        migration.rounds = vec![round(1, 4.0), round(2, 1.0), round(3, 0.0)];
        migration.stopped_at_seconds = Some(1006.0);
        migration.downtime_seconds = Some(0.25);
        migration.postcopy = Some(Postcopy { seconds: 2.0, ..Postcopy::default() });
        let course = Course::of(&migration);
        let spans: Vec<_> = course.rounds.iter().map(|round| (round.span.from, round.span.to)).collect();
        assert_eq!(spans, [(1.0, 5.0), (5.0, 6.0)]);
        assert_eq!(course.pause.map(TimeSpan::seconds), Some(0.25));
        assert_eq!(course.postcopy, Some(TimeSpan { from: 6.25, to: 8.25 }));
        assert_eq!((course.rounds[0].sent, course.rounds[0].dirtied), (500_000.0, 40_960.0));
    }

    #[test]
    fn a_migration_that_came_to_nothing_has_no_pause() {
        let mut migration = Migration::new("0", "web1", "host-b");
        migration.total_seconds = 3.0;
        migration.rounds = vec![round(1, 2.0)];
        let course = Course::of(&migration);
        assert_eq!((course.pause, course.rounds[0].span), (None, TimeSpan { from: 1.0, to: 3.0 }));
    }
}
