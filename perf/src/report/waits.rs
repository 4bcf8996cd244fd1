//! [`Waits`]: the times that pages took that a guest or a client waited for.

use std::time::Duration;

/// A histogram of times.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Waits {
    /// The number of times that were longer than the bound before, in seconds, and no longer than this one. The last
    /// bound may be infinite.
    counts: Vec<(f64, u64)>,
}

/// Bounds between one decade and the next, of about equal ratios: the series E6 of IEC 60063, which the daemon's
/// histograms have too.
const BOUNDS: [f64; 6] = [1.0, 1.5, 2.2, 3.3, 4.7, 6.8];
/// The first decade and the last, as powers of ten.
const DECADES: std::ops::Range<i32> = -6..2;

impl Waits {
    /// Makes the histogram of single times.
    pub fn of(times: &[Duration]) -> Self {
        let bounds = DECADES.flat_map(|decade| BOUNDS.map(|bound| bound * 10f64.powi(decade)));
        let mut counts: Vec<(f64, u64)> = bounds.chain([f64::INFINITY]).map(|bound| (bound, 0)).collect();
        for time in times {
            let index = counts.partition_point(|(bound, _)| *bound < time.as_secs_f64());
            counts[index].1 += 1;
        }
        Self { counts }
    }

    /// Reads the histogram of this name from metrics in Prometheus' text format; it is empty if there is none.
    pub fn of_metrics(text: &str, name: &str) -> Self {
        let buckets = text.lines().filter_map(|line| {
            let (bound, count) =
                line.strip_prefix(name)?.strip_prefix("_bucket{le=\"")?.split_once("\"} ")?;
            Some((
                if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? },
                count.parse::<u64>().ok()?,
            ))
        });
        let mut before = 0;
        let counts = buckets.map(|(bound, up_to)| {
            let count = up_to.saturating_sub(before);
            before = up_to;
            (bound, count)
        });
        Self { counts: counts.collect() }
    }

    /// Returns what has come since `before`, which has the same bounds.
    pub fn since(mut self, before: &Self) -> Self {
        for ((_, count), (_, earlier)) in self.counts.iter_mut().zip(&before.counts) {
            *count = count.saturating_sub(*earlier);
        }
        self
    }

    /// Adds two histograms, which must have the same bounds if neither is empty.
    pub fn and(mut self, other: &Self) -> Self {
        if self.counts.is_empty() {
            return other.clone();
        }
        for ((_, count), (_, more)) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self
    }

    /// Returns the number of times.
    pub fn total(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }

    /// Returns the time in seconds that this share of all times did not exceed, as exactly as the bounds allow.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut left = self.total() as f64 * share;
        for (from, to, count) in self.buckets().filter(|(.., count)| *count > 0) {
            if left <= count as f64 {
                return from * (to / from).powf(left / count as f64);
            }
            left -= count as f64;
        }
        self.ends().map_or(0.0, |(_, last)| last)
    }

    /// Returns the bound before the first time and the one after the last; `None` if there are no times.
    pub fn ends(&self) -> Option<(f64, f64)> {
        let mut seen = self.buckets().filter(|(.., count)| *count > 0);
        let (from, to, _) = seen.next()?;
        Some((from, seen.last().map_or(to, |(_, to, _)| to)))
    }

    /// Returns the share of all times in a doubling of time, from each place until the next. The last entry only says
    /// where they end.
    pub(crate) fn densities(&self) -> Vec<(f64, f64)> {
        let total = self.total().max(1) as f64;
        let density = |(from, to, count): (f64, f64, u64)| (from, count as f64 / total / (to / from).log2());
        let end = self.buckets().last().map(|(_, to, _)| (to, 0.0));
        self.buckets().map(density).chain(end).collect()
    }

    /// Returns each bucket with both of its bounds. The first one begins, and the last one ends, as if its bounds were
    /// a doubling apart.
    fn buckets(&self) -> impl Iterator<Item = (f64, f64, u64)> {
        let mut before = None;
        self.counts.iter().map(move |(bound, count)| {
            let from = before.replace(*bound).unwrap_or(bound / 2.0);
            (from, if bound.is_finite() { *bound } else { from * 2.0 }, *count)
        })
    }
}

/// Returns the smallest of these sorted times that so many percent of all do not exceed, in microseconds.
///
/// # Panics
///
/// If there are none.
pub(crate) fn microseconds_within(times: &[Duration], percent: usize) -> f64 {
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times[rank - 1].as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "\
# TYPE fault_seconds histogram
fault_seconds_bucket{le=\"0.0001\"} 2
fault_seconds_bucket{le=\"0.0002\"} 8
fault_seconds_bucket{le=\"0.0004\"} 8
fault_seconds_bucket{le=\"+Inf\"} 10
fault_seconds_sum 1
fault_seconds_count 10
fault_seconds_more_bucket{le=\"1\"} 99
";

    #[test]
    fn histograms_are_read_and_told_apart() {
        let waits = Waits::of_metrics(METRICS, "fault_seconds");
        assert_eq!(waits.counts, [(0.0001, 2), (0.0002, 6), (0.0004, 0), (f64::INFINITY, 2)]);
        assert_eq!((waits.total(), waits.ends()), (10, Some((0.000_05, 0.000_8))));
        let more = METRICS.replace(" 8\n", " 9\n");
        let since = Waits::of_metrics(&more, "fault_seconds").since(&waits);
        assert_eq!(since.counts, [(0.0001, 0), (0.0002, 1), (0.0004, 0), (f64::INFINITY, 0)]);
        assert_eq!(Waits::of_metrics(METRICS, "none").total(), 0);
        assert_eq!(Waits::default().and(&since).and(&waits).total(), 11);
    }

    #[test]
    fn quantiles_lie_within_their_buckets() {
        let times: Vec<Duration> = (1..=1000).map(Duration::from_micros).collect();
        let waits = Waits::of(&times);
        assert_eq!(waits.total(), 1000);
        for (share, bounds) in [(0.5, 0.000_47..0.000_68), (0.99, 0.000_68..0.001_001)] {
            assert!(bounds.contains(&waits.quantile(share)), "{share}: {}", waits.quantile(share));
        }
        let (first, last) = waits.ends().expect("there are some");
        assert!(first < 1e-6 && (last - 0.001).abs() < 1e-9, "{first} {last}");
        assert_eq!((Waits::default().quantile(0.5), Waits::default().ends()), (0.0, None));
    }

    #[test]
    fn densities_are_of_doublings() {
        let waits = Waits { counts: vec![(1.0, 1), (2.0, 2), (8.0, 1)] };
        assert_eq!(waits.densities(), [(0.5, 0.25), (1.0, 0.5), (2.0, 0.125), (8.0, 0.0)]);
        assert!(Waits::default().densities().is_empty());
    }
}
