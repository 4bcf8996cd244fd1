//! [`LaneCount`] decides how many lanes an encrypted port has.
//!
//! To seal what a lane sends, and to open it at the other end, costs a core more than to send it. Where one core at either
//! end is the limit, and not the wire, a further lane brings a further core into play. Whether it does is found out by
//! trying: a port gets one more lane, and a next one only if the one before has made it faster.

use std::ops::Add;
use std::time::Duration;

/// A port is measured over this time.
const PERIOD: Duration = Duration::from_millis(500);
/// A lane that is new is left alone for this long, until its window has grown.
const SETTLE: Duration = Duration::from_millis(500);
/// One core is the limit of a lane whose thread ran for this share of the time.
const BUSY: f64 = 0.85;
/// One core there is the limit of a lane that waited for the receiver to read for this share of the time.
const WAITED: f64 = 0.5;
/// No core is free for a further lane where threads waited for a processor for this share of the time.
const CROWDED: f64 = 0.1;
/// A further lane was worth it if the port carries this many times as much.
const WORTH: f64 = 1.1;
/// A port has no more lanes than this unless it is configured to.
const MOST: u16 = 8;

/// What the running lanes of a port have done since they began, added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// The number of lanes that run.
    pub lanes: u16,
    /// The number of bytes that they have sent.
    pub wire_bytes: u64,
    /// The time for which their threads ran.
    pub ran: Duration,
    /// The time for which their threads waited for a processor.
    pub crowded: Duration,
    /// The time for which they could not send because the receiver did not read (`tcpi_rwnd_limited` of tcp(7)).
    pub receiver_limited: Duration,
}

impl Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            lanes: self.lanes + other.lanes,
            wire_bytes: self.wire_bytes + other.wire_bytes,
            ran: self.ran + other.ran,
            crowded: self.crowded + other.crowded,
            receiver_limited: self.receiver_limited + other.receiver_limited,
        }
    }
}

/// The number of lanes of one port in one migration.
#[derive(Clone, Debug)]
pub struct LaneCount {
    wanted: u16,
    measured: Option<(Duration, Load)>,
    /// The lanes have run for a while from this moment on.
    settles: Duration,
    /// What the port carried, in bytes per second, before it got its newest lane. That lane is still on trial.
    before: Option<f64>,
    /// No further lane is worth it.
    settled: bool,
}

impl LaneCount {
    /// Returns the decisions for a port that begins with so many lanes.
    pub fn new(configured: u16) -> Self {
        Self { wanted: configured, measured: None, settles: Duration::ZERO, before: None, settled: false }
    }

    /// Returns how many lanes the port should have.
    pub fn wanted(&self) -> u16 {
        self.wanted
    }

    /// Notes that the port has nothing to send, so that the measurement begins anew.
    pub fn idle(&mut self) {
        self.measured = None;
    }

    /// Takes what the port has done until `now`, a time since any fixed moment. Tells whether it is to get one more lane
    /// from now on.
    pub fn observe(&mut self, now: Duration, load: Load) -> bool {
        if load.lanes != self.wanted {
            // A lane is being opened, or was lost.
            (self.measured, self.settles) = (None, now + SETTLE);
        }
        if now < self.settles {
            return false;
        }
        let &mut (since, past) = self.measured.get_or_insert((now, load));
        if now - since < PERIOD {
            return false;
        }
        self.measured = Some((now, load));
        let seconds = (now - since).as_secs_f64();
        let rate = load.wire_bytes.saturating_sub(past.wire_bytes) as f64 / seconds;
        if let Some(before) = self.before.take() {
            self.settled = rate < WORTH * before;
        }
        if self.settled || self.wanted >= MOST {
            return false;
        }
        let each = seconds * f64::from(load.lanes);
        let share = |now: Duration, past: Duration| now.saturating_sub(past).as_secs_f64() / each;
        let ran = share(load.ran, past.ran);
        let waited = share(load.receiver_limited, past.receiver_limited);
        if (ran < BUSY && waited < WAITED) || share(load.crowded, past.crowded) > CROWDED {
            return false;
        }
        self.before = Some(rate);
        self.wanted += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port, its wire, and the cores of its host.
    struct Port {
        count: LaneCount,
        now: Duration,
        load: Load,
        /// The wire carries no more bytes in a second than this.
        wire: u64,
        /// A core seals so many.
        core: u64,
        cores: u16,
        /// For this share of the time each lane waits for a processor, and for the receiver.
        crowded: f64,
        receiver_limited: f64,
    }

    impl Port {
        fn new(wire: u64, core: u64, cores: u16) -> Self {
            let (ran, crowded, receiver_limited) = Default::default();
            let load = Load { lanes: 1, wire_bytes: 0, ran, crowded, receiver_limited };
            let (count, now) = (LaneCount::new(1), Duration::ZERO);
            Self { count, now, load, wire, core, cores, crowded: 0.0, receiver_limited: 0.0 }
        }

        /// Lets time pass, and returns how many lanes the port has then.
        fn after(&mut self, seconds: u32) -> u16 {
            const STEP: Duration = Duration::from_millis(100);
            for _ in 0..seconds * 10 {
                self.count.observe(self.now, self.load);
                // It takes a step until a lane is there.
                let lanes = self.load.lanes;
                self.load.lanes = self.count.wanted();
                self.now += STEP;
                let sealed = self.core * u64::from(lanes.min(self.cores)) / 10;
                let carried = sealed.min(self.wire / 10);
                self.load.wire_bytes += carried;
                self.load.ran += Duration::from_secs_f64(carried as f64 / self.core as f64);
                self.load.crowded += STEP * u32::from(lanes.saturating_sub(self.cores));
                self.load.crowded += (STEP * lanes.into()).mul_f64(self.crowded);
                self.load.receiver_limited += (STEP * lanes.into()).mul_f64(self.receiver_limited);
            }
            self.load.lanes
        }
    }

    #[test]
    fn a_port_that_cores_limit_gets_as_many_lanes_as_fill_the_wire() {
        assert_eq!(Port::new(10_000, 3_000, 64).after(20), 4);
    }

    #[test]
    fn a_wire_that_is_the_limit_gets_no_further_lane() {
        assert_eq!(Port::new(1_000, 3_000, 64).after(20), 1);
    }

    #[test]
    fn there_are_no_more_lanes_than_cores_and_no_more_than_the_most() {
        assert_eq!(Port::new(100_000, 3_000, 1).after(20), 2, "one is tried");
        assert_eq!(Port::new(100_000, 3_000, 64).after(60), MOST);
    }

    #[test]
    fn a_crowded_host_gets_no_further_lane() {
        let mut port = Port { crowded: 0.2, ..Port::new(10_000, 3_000, 64) };
        assert_eq!(port.after(20), 1);
    }

    #[test]
    fn a_receiver_that_is_the_limit_counts_like_a_sender() {
        let mut port = Port { receiver_limited: 0.9, ..Port::new(1_000, 3_000, 64) };
        assert_eq!(port.after(20), 2, "one is tried, and does not help");
    }

    #[test]
    fn a_lost_lane_is_no_measure() {
        let mut port = Port::new(10_000, 3_000, 64);
        let lanes = port.after(3);
        for _ in 0..20 {
            port.now += PERIOD;
            assert!(!port.count.observe(port.now, Load { lanes: lanes - 1, ..port.load }));
        }
        assert_eq!(port.count.wanted(), lanes);
    }

    #[test]
    fn a_port_keeps_the_lanes_that_it_is_configured_to_have() {
        assert_eq!(LaneCount::new(20).wanted(), 20);
    }
}
