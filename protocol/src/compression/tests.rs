use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// A lane on a wire that takes `wire` bytes a second, whose thread runs and waits for a processor for these
/// shares of the time.
struct Lane {
    compression: Compression,
    now: Duration,
    load: Load,
    /// What travels is so many times as long when it has arrived.
    contents: f64,
}

impl Lane {
    fn new() -> Self {
        let load = Load { wire_bytes: 0, contents_bytes: 0, ran: Duration::ZERO, crowded: Duration::ZERO };
        Self { compression: Compression::default(), now: Duration::ZERO, load, contents: 3.0 }
    }

    fn goes_on(&mut self, seconds: f64, wire: f64, ran: f64, crowded: f64) -> &mut Self {
        let step = PERIOD.as_secs_f64();
        for _ in 0..(seconds / step).round() as u32 {
            self.now += PERIOD;
            self.load.wire_bytes += (wire * step) as u64;
            self.load.contents_bytes += (self.contents * wire * step) as u64;
            self.load.ran += Duration::from_secs_f64(ran * step);
            self.load.crowded += Duration::from_secs_f64(crowded * step);
            assert!(self.compression.is_due(self.now));
            self.compression.observe(self.now, self.load);
        }
        self
    }

    fn compresses(&self) -> bool {
        self.compression.clone().wants_sample(MIB)
    }
}

#[test]
fn a_lane_that_its_wire_holds_up_compresses() {
    let mut lane = Lane::new();
    assert!(!lane.compresses());
    assert!(lane.goes_on(0.3, 125e6, 0.1, 0.0).compresses());
    assert!(lane.goes_on(9.0, 125e6, 0.8, 0.0).compresses(), "it runs because it compresses");
}

#[test]
fn it_looks_now_and_then_whether_the_wire_has_become_faster() {
    let mut lane = Lane::new();
    assert!(lane.goes_on(0.3, 125e6, 0.1, 0.0).compresses());
    // Without compressing for a moment the wire holds it up as before.
    let mut looks = 0;
    for _ in 0..300 {
        let asleep = lane.compression.looking;
        looks += u32::from(asleep);
        assert_eq!(lane.compresses(), !asleep);
        lane.goes_on(0.1, 125e6, if asleep { 0.1 } else { 0.8 }, 0.0);
    }
    assert_eq!(looks, 2);
    while !lane.compression.looking {
        lane.goes_on(0.1, 125e6, 0.8, 0.0);
    }
    assert!(!lane.goes_on(0.1, 1.2e9, 0.8, 0.0).compresses());
    assert!(!lane.goes_on(60.0, 1.2e9, 0.8, 0.0).compresses());
}

#[test]
fn it_goes_back_where_less_gets_across_than_without() {
    let mut lane = Lane { contents: 2.5, ..Lane::new() };
    assert!(lane.goes_on(0.3, 125e6, 0.1, 0.0).compresses());
    assert!(lane.goes_on(5.0, 60e6, 0.9, 0.0).compresses(), "150 MB/s, where the wire took 125");
    assert!(!lane.goes_on(1.2, 40e6, 0.9, 0.0).compresses());
}

#[test]
fn a_lane_on_a_fast_wire_does_not() {
    assert!(!Lane::new().goes_on(10.0, 1.75e9, 0.1, 0.0).compresses(), "whatever time the card leaves it");
    assert!(!Lane::new().goes_on(10.0, 300e6, 0.7, 0.0).compresses(), "its thread is what holds it up");
    assert!(!Lane::new().goes_on(10.0, 125e6, 0.1, 0.4).compresses(), "there is no processor free");
}

#[test]
fn what_is_idle_is_no_measure() {
    let mut lane = Lane::new();
    for _ in 0..100 {
        lane.goes_on(0.1, 1e6, 0.1, 0.0).compression.idle();
    }
    assert!(!lane.compresses());
}

#[test]
fn it_goes_back_where_processors_are_the_limit_and_tries_again_ever_more_rarely() {
    let mut lane = Lane::new();
    let mut rests = Vec::new();
    for _ in 0..8 {
        while !lane.compresses() {
            lane.goes_on(0.1, 125e6, 0.1, 0.0);
        }
        let left = lane.goes_on(0.1, 60e6, 0.4, 0.6).now;
        assert!(!lane.compresses());
        while !lane.compresses() {
            lane.goes_on(0.1, 125e6, 0.1, 0.0);
        }
        rests.push((lane.now - left).as_millis());
    }
    assert_eq!(rests, [300, 500, 1000, 2000, 4000, 8000, 16_000, 30_000]);
    // A long time without trouble, and it is as before.
    let left = lane.goes_on(40.0, 125e6, 0.5, 0.0).goes_on(0.1, 125e6, 0.4, 0.6).now;
    while !lane.compresses() {
        lane.goes_on(0.1, 125e6, 0.1, 0.0);
    }
    assert_eq!((lane.now - left).as_millis(), 300);
}

#[test]
fn it_goes_back_where_compressing_is_slower_than_the_wire() {
    let mut lane = Lane::new();
    assert!(lane.goes_on(0.3, 125e6, 0.1, 0.0).compresses());
    for _ in 0..10 {
        assert!(lane.compression.judge_frame(MIB, MIB / 3, Duration::from_millis(6)));
    }
    assert!(lane.goes_on(0.1, 100e6, 0.9, 0.0).compresses(), "175 MB/s will do");
    for took in [1, 1, 1, 37] {
        assert!(lane.compression.judge_frame(MIB, MIB / 3, Duration::from_millis(took)));
    }
    assert!(!lane.goes_on(0.1, 60e6, 0.9, 0.0).compresses());
    assert!(lane.goes_on(1.1, 125e6, 0.1, 0.0).compresses(), "it asks anew");
}

#[test]
fn what_does_not_become_smaller_is_passed_over_and_looked_at_now_and_then() {
    let mut lane = Lane::new();
    let compression = &mut lane.goes_on(0.3, 125e6, 0.1, 0.0).compression;
    let mut looked_at = Vec::new();
    for frame in 0..300 {
        if compression.wants_sample(MIB) {
            looked_at.push(frame);
            assert!(!compression.judge_sample(MIB / 16, MIB / 16));
        }
    }
    assert_eq!(looked_at, [0, 2, 6, 14, 30, 62, 126, 190, 254]);
    while !compression.wants_sample(MIB) {}
    assert!(compression.judge_sample(100, 80) && compression.wants_sample(MIB));
    assert!(!compression.judge_frame(100, 81, PERIOD) && !compression.wants_sample(MIB));
    assert!(compression.wants_sample(MIB) && !compression.wants_sample(LEAST_BYTES - 1));
}

#[test]
fn modes_are_words() {
    for mode in [Mode::Auto, Mode::Off] {
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    let error = "lz4".parse::<Mode>().unwrap_err().to_string();
    assert!(error.contains("`lz4`") && error.contains("`auto` or `off`"), "{error}");
}

proptest! {
    /// Whatever it is told, it looks at a frame again before long, or its rest has an end.
    #[test]
    fn it_never_stops_trying(
        loads in prop::collection::vec(any::<(u16, u32, u16, u16, Option<(u32, u32, u16)>)>(), 0..100),
    ) {
        let mut lane = Lane::new();
        for (passed, wire, ran, crowded, frame) in loads {
            lane.now += Duration::from_millis(passed.into());
            lane.load.wire_bytes += u64::from(wire);
            lane.load.ran += Duration::from_millis(ran.into());
            lane.load.crowded += Duration::from_millis(crowded.into());
            lane.compression.observe(lane.now, lane.load);
            if let Some((bytes, compressed, took)) = frame {
                let took = Duration::from_micros(took.into());
                let worth = lane.compression.judge_frame(bytes.into(), compressed.into(), took);
                prop_assert_eq!(worth, f64::from(bytes) >= WORTH * f64::from(compressed));
            }
        }
        lane.goes_on(LONGEST_REST.as_secs_f64() + 1.0, 1e6, 0.0, 0.0);
        let looks = (0..=MOST_PASSED_OVER).filter(|_| lane.compression.wants_sample(MIB));
        prop_assert!(looks.count() > 0);
    }
}
