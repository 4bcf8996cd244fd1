//! [`Bandwidth`] is an estimate of what the lanes deliver. It follows recent measurements, not the best ever seen.

use std::collections::VecDeque;
use std::time::Duration;

/// The number of samples that count.
const WINDOW: usize = 16;

/// The busy time that makes a sample. Shorter times are added up, because acknowledgements come in bursts.
const SAMPLE: Duration = Duration::from_millis(20);

/// The weight of each sample relative to the one after it.
const DECAY: f64 = 0.7;

/// An estimate of what the lanes of one migration deliver together.
///
/// It is the bytes over the busy time of the last 16 samples of at least 20 ms each, the
/// newer counting more. Since bytes and time are summed before they are divided, a slow
/// sample counts by the time it took: when a port dies the estimate follows within a few
/// samples, and one lucky burst does not raise it.
#[derive(Debug, Clone, Default)]
pub struct Bandwidth {
    /// The samples, oldest first.
    window: VecDeque<Sample>,
    /// The measurements that do not make a sample yet.
    pending: Sample,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    bytes: u64,
    busy: Duration,
}

impl Bandwidth {
    /// Returns an estimator without any measurement.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the bytes that were acknowledged during `busy`, the time in which the lanes had something to send.
    ///
    /// Idle time must not be part of it, or an idle guest would look like a slow wire. Time in which nothing was
    /// acknowledged although something was sent must be part of it.
    pub fn record(&mut self, bytes: u64, busy: Duration) {
        self.pending.bytes = self.pending.bytes.saturating_add(bytes);
        self.pending.busy = self.pending.busy.saturating_add(busy);
        if self.pending.busy < SAMPLE {
            return;
        }
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(std::mem::take(&mut self.pending));
    }

    /// Returns the bytes per second of busy time, or `None` while nothing has been measured. Before the first full sample
    /// it uses what was measured until then.
    pub fn bytes_per_second(&self) -> Option<f64> {
        if self.window.is_empty() {
            let seconds = self.pending.busy.as_secs_f64();
            return (seconds > 0.0).then(|| self.pending.bytes as f64 / seconds);
        }
        let (bytes, seconds) = self.window.iter().fold((0.0, 0.0), |(bytes, seconds), sample| {
            (bytes * DECAY + sample.bytes as f64, seconds * DECAY + sample.busy.as_secs_f64())
        });
        Some(bytes / seconds)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// `busy` at `rate` bytes per second, acknowledged each millisecond.
    fn run(bandwidth: &mut Bandwidth, rate: u64, busy: Duration) {
        for _ in 0..busy.as_millis() {
            bandwidth.record(rate / 1000, MS);
        }
    }

    fn estimate(bandwidth: &Bandwidth) -> f64 {
        bandwidth.bytes_per_second().expect("something was measured")
    }

    #[test]
    fn nothing_measured_is_no_estimate() {
        let mut bandwidth = Bandwidth::new();
        assert_eq!(bandwidth.bytes_per_second(), None);
        bandwidth.record(4096, Duration::ZERO);
        assert_eq!(bandwidth.bytes_per_second(), None);
        bandwidth.record(0, MS);
        assert_eq!(estimate(&bandwidth), 4_096_000.0);
    }

    #[test]
    fn it_falls_within_a_few_samples_when_ports_die() {
        let mut bandwidth = Bandwidth::new();
        run(&mut bandwidth, 1_000_000_000, 1000 * MS);
        run(&mut bandwidth, 250_000_000, 4 * SAMPLE);
        assert!(estimate(&bandwidth) < 450_000_000.0, "{}", estimate(&bandwidth));
    }

    #[test]
    fn a_silent_wire_brings_it_down() {
        let mut bandwidth = Bandwidth::new();
        run(&mut bandwidth, 1_000_000_000, 1000 * MS);
        bandwidth.record(0, 500 * MS);
        assert!(estimate(&bandwidth) < 150_000_000.0, "{}", estimate(&bandwidth));
    }

    #[test]
    fn one_lucky_burst_does_not_raise_it_much() {
        let mut bandwidth = Bandwidth::new();
        run(&mut bandwidth, 100_000_000, 1000 * MS);
        bandwidth.record(20_000_000, MS); // 20 GB/s, for a millisecond
        run(&mut bandwidth, 100_000_000, 2 * SAMPLE);
        assert!(estimate(&bandwidth) < 350_000_000.0, "{}", estimate(&bandwidth));
    }

    fn samples() -> impl Strategy<Value = Vec<(u64, u64)>> {
        // Each long enough to be a sample of its own.
        prop::collection::vec((0..1u64 << 40, 20_000_000..10_000_000_000u64), 1..60)
    }

    proptest! {
        #[test]
        fn between_the_slowest_and_the_fastest_of_the_window(samples in samples()) {
            let mut bandwidth = Bandwidth::new();
            for &(bytes, nanos) in &samples {
                bandwidth.record(bytes, Duration::from_nanos(nanos));
            }
            let window = &samples[samples.len().saturating_sub(WINDOW)..];
            let rates = window.iter().map(|&(bytes, nanos)| bytes as f64 / (nanos as f64 / 1e9));
            let slowest = rates.clone().fold(f64::INFINITY, f64::min);
            let fastest = rates.fold(0.0, f64::max);
            let estimate = estimate(&bandwidth);
            prop_assert!(estimate >= slowest * 0.999_999 && estimate <= fastest * 1.000_001);
        }

        #[test]
        fn a_step_is_followed_within_a_window(before in samples(), rate in 1_000_000u64..100_000_000_000) {
            let mut bandwidth = Bandwidth::new();
            for (bytes, nanos) in before {
                bandwidth.record(bytes, Duration::from_nanos(nanos));
            }
            run(&mut bandwidth, rate, SAMPLE * WINDOW as u32);
            let expected = (rate / 1000 * 1000) as f64;
            prop_assert!((estimate(&bandwidth) / expected - 1.0).abs() < 1e-6);
        }

        #[test]
        fn whatever_is_recorded_it_stays_a_number(records in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..60)) {
            let mut bandwidth = Bandwidth::new();
            for (bytes, nanos, long) in records {
                let busy = if long { Duration::from_secs(nanos) } else { Duration::from_nanos(nanos) };
                bandwidth.record(bytes, busy);
                bandwidth.record(bytes, Duration::ZERO);
                if let Some(estimate) = bandwidth.bytes_per_second() {
                    prop_assert!(estimate.is_finite() && estimate >= 0.0);
                }
            }
        }
    }
}
