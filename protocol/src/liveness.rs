//! [`Liveness`] tells whether a connection still carries anything.
//!
//! The other end's kernel acknowledges what arrives, however busy its daemon is. So if something is in flight and no
//! acknowledgement comes for several times as long as an answer takes, the path is broken: a port is down, or drops
//! everything silently.

use std::time::Duration;

/// The shortest time, beyond the round trip, after which TCP retransmits what was not acknowledged (`TCP_RTO_MIN` of
/// Linux).
const LEAST_VARIATION: Duration = Duration::from_millis(200);

/// A connection is silent after this many times the time that TCP waits before it retransmits.
const TIMES: u32 = 3;

/// What the kernel says about a connection (`struct tcp_info` of Linux).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// The time since the last acknowledgement arrived (`tcpi_last_ack_recv`).
    pub since_heard: Duration,
    /// Whether something is in flight that the other end has not acknowledged (`tcpi_unacked`).
    pub unanswered: bool,
    /// The round-trip time (`tcpi_rtt`).
    pub round_trip: Duration,
    /// The variation of the round-trip time (`tcpi_rttvar`).
    pub variation: Duration,
}

/// The condition of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is wrong.
    Well,
    /// An answer is overdue.
    Doubtful,
    /// No answer has come for this time.
    Silent(Duration),
}

/// The observer of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Liveness {
    /// The time since which an answer has been due without a sign of life.
    since: Option<Duration>,
}

impl Liveness {
    /// Takes what the kernel says at `now`, a time since any fixed moment, and returns the condition of the connection.
    pub fn observe(&mut self, now: Duration, info: &TcpInfo) -> Condition {
        if !info.unanswered {
            self.since = None;
            return Condition::Well;
        }
        // It may have been idle before, and then it was not heard for a good reason.
        let since = self.since.unwrap_or(now).max(now.saturating_sub(info.since_heard));
        self.since = Some(since);
        let silence = now.saturating_sub(since);
        let due = info.round_trip + (4 * info.variation).max(LEAST_VARIATION);
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

    fn info(since_heard: u64, unanswered: bool) -> TcpInfo {
        TcpInfo { since_heard: ms(since_heard), unanswered, round_trip: ms(1), variation: ms(1) }
    }

    #[test]
    fn silence_is_told_within_a_second_on_a_short_way() {
        let mut liveness = Liveness::default();
        assert_eq!(liveness.observe(ms(1000), &info(10, true)), Condition::Well);
        assert_eq!(liveness.observe(ms(1150), &info(160, true)), Condition::Well);
        assert_eq!(liveness.observe(ms(1300), &info(310, true)), Condition::Doubtful);
        assert_eq!(liveness.observe(ms(1650), &info(660, true)), Condition::Silent(ms(650)));
    }

    #[test]
    fn a_long_way_is_given_longer() {
        let mut liveness = Liveness::default();
        let far = |since_heard| TcpInfo { round_trip: ms(150), ..info(since_heard, true) };
        assert_eq!(liveness.observe(ms(0), &far(0)), Condition::Well);
        assert_eq!(liveness.observe(ms(1000), &far(1000)), Condition::Doubtful);
        assert_eq!(liveness.observe(ms(1100), &far(1100)), Condition::Silent(ms(1100)));
    }

    #[test]
    fn an_idle_connection_owes_nothing() {
        let mut liveness = Liveness::default();
        assert_eq!(liveness.observe(ms(9000), &info(8000, false)), Condition::Well);
        // It has just begun to send.
        assert_eq!(liveness.observe(ms(9050), &info(8050, true)), Condition::Well);
        assert_eq!(liveness.observe(ms(9200), &info(8200, true)), Condition::Well);
        // And was idle again.
        assert_eq!(liveness.observe(ms(9500), &info(0, false)), Condition::Well);
        assert_eq!(liveness.observe(ms(20_000), &info(10_500, true)), Condition::Well);
    }

    proptest! {
        #[test]
        fn who_is_heard_is_well(
            steps in prop::collection::vec((0u64..500, 0u64..200, any::<bool>()), 1..100),
        ) {
            let (mut liveness, mut now) = (Liveness::default(), 0);
            for (passed, since_heard, unanswered) in steps {
                now += passed;
                prop_assert_eq!(liveness.observe(ms(now), &info(since_heard, unanswered)), Condition::Well);
            }
        }

        #[test]
        fn who_is_never_heard_again_is_told_of(
            looks in prop::collection::vec(1u64..300, 20..60), round_trip in 0u64..1000,
        ) {
            let (mut liveness, mut now) = (Liveness::default(), 5000);
            let mut told = None;
            for passed in looks {
                let info = TcpInfo { round_trip: ms(round_trip), ..info(now, true) };
                if let Condition::Silent(silence) = liveness.observe(ms(now), &info) {
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
