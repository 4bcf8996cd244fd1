//! [`Liveness`]: whether the way to the other end still carries anything.
//!
//! The other end's kernel acknowledges what arrives, however busy its daemon is. So a connection that has
//! something on its way, and hears nothing for several times as long as an answer takes, has lost its way: a
//! port that is down, or one that silently drops everything.

use std::time::Duration;

/// The shortest time after which TCP sends anew what was not acknowledged, beyond the round trip
/// (`TCP_RTO_MIN` of Linux).
const LEAST_VARIATION: Duration = Duration::from_millis(200);

/// As many times as long as TCP waits before it sends anew are silence.
const TIMES: u32 = 3;

/// A connection as the kernel tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vitals {
    /// Since the other end was heard last.
    pub since_heard: Duration,
    /// Something is on its way that the other end has not answered.
    pub unanswered: bool,
    /// The round trip, lately.
    pub round_trip: Duration,
    /// How much the round trip varies.
    pub variation: Duration,
}

/// How a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is amiss.
    Well,
    /// An answer is overdue.
    Doubtful,
    /// No answer came for so long.
    Silent(Duration),
}

/// What was seen of a connection so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Liveness {
    /// Since when an answer is waited for without a sign of life.
    since: Option<Duration>,
}

impl Liveness {
    /// Takes in how the connection is at `now`, a time since any fixed moment.
    pub fn observe(&mut self, now: Duration, vitals: &Vitals) -> Condition {
        if !vitals.unanswered {
            self.since = None;
            return Condition::Well;
        }
        // It may have been idle before, and then it was not heard for a good reason.
        let since = self.since.unwrap_or(now).max(now.saturating_sub(vitals.since_heard));
        self.since = Some(since);
        let silence = now.saturating_sub(since);
        let due = vitals.round_trip + (4 * vitals.variation).max(LEAST_VARIATION);
        match silence {
            _ if silence > TIMES * due => Condition::Silent(silence),
            _ if silence > due => Condition::Doubtful,
            _ => Condition::Well,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn vitals(since_heard: u64, unanswered: bool) -> Vitals {
        Vitals { since_heard: ms(since_heard), unanswered, round_trip: ms(1), variation: ms(1) }
    }

    #[test]
    fn silence_is_told_within_a_second_on_a_short_way() {
        let mut liveness = Liveness::default();
        assert_eq!(liveness.observe(ms(1000), &vitals(10, true)), Condition::Well);
        assert_eq!(liveness.observe(ms(1150), &vitals(160, true)), Condition::Well);
        assert_eq!(liveness.observe(ms(1300), &vitals(310, true)), Condition::Doubtful);
        assert_eq!(liveness.observe(ms(1650), &vitals(660, true)), Condition::Silent(ms(650)));
    }

    #[test]
    fn a_long_way_is_given_longer() {
        let mut liveness = Liveness::default();
        let far = |since_heard| Vitals { round_trip: ms(150), ..vitals(since_heard, true) };
        assert_eq!(liveness.observe(ms(0), &far(0)), Condition::Well);
        assert_eq!(liveness.observe(ms(1000), &far(1000)), Condition::Doubtful);
        assert_eq!(liveness.observe(ms(1100), &far(1100)), Condition::Silent(ms(1100)));
    }

    #[test]
    fn an_idle_connection_owes_nothing() {
        let mut liveness = Liveness::default();
        assert_eq!(liveness.observe(ms(9000), &vitals(8000, false)), Condition::Well);
        // It has just begun to send.
        assert_eq!(liveness.observe(ms(9050), &vitals(8050, true)), Condition::Well);
        assert_eq!(liveness.observe(ms(9200), &vitals(8200, true)), Condition::Well);
        // And was idle again.
        assert_eq!(liveness.observe(ms(9500), &vitals(0, false)), Condition::Well);
        assert_eq!(liveness.observe(ms(20_000), &vitals(10_500, true)), Condition::Well);
    }

    proptest! {
        #[test]
        fn who_is_heard_is_well(
            steps in prop::collection::vec((0u64..500, 0u64..200, any::<bool>()), 1..100),
        ) {
            let (mut liveness, mut now) = (Liveness::default(), 0);
            for (passed, since_heard, unanswered) in steps {
                now += passed;
                prop_assert_eq!(liveness.observe(ms(now), &vitals(since_heard, unanswered)), Condition::Well);
            }
        }

        #[test]
        fn who_is_never_heard_again_is_told_of(
            looks in prop::collection::vec(1u64..300, 20..60), round_trip in 0u64..1000,
        ) {
            let (mut liveness, mut now) = (Liveness::default(), 5000);
            let mut told = None;
            for passed in looks {
                let vitals = Vitals { round_trip: ms(round_trip), ..vitals(now, true) };
                if let Condition::Silent(silence) = liveness.observe(ms(now), &vitals) {
                    told.get_or_insert(silence);
                }
                now += passed;
            }
            let due = 3 * (ms(round_trip) + LEAST_VARIATION);
            match told {
                Some(silence) => prop_assert!(silence > due && silence <= due + ms(300)),
                None => prop_assert!(ms(now - 5000) <= due + ms(300)),
            }
        }
    }
}
