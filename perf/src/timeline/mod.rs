//! The course of a move from moment to moment: the guest's progress, the ports' traffic, and the daemons' phases.
//!
//! The guest's progress is what it counts itself, told by the VMM at either end; the ports' bytes are what the kernel of
//! the destination counts; when rounds and the pause were, the migration tells. All of that is put on one clock, which
//! shows 0 at the order: that of the machine, which both hosts share.

mod course;
mod recorder;

pub use course::{Course, RoundSpan, TimeSpan};
pub use recorder::Recorder;

/// A move, moment by moment. All times are seconds since the order, and negative before it.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    /// The time when the order was given, in seconds since 1970-01-01T00:00:00Z.
    pub ordered_at_unix_seconds: f64,
    /// The progress of the guest, in the order of time.
    pub progress: Vec<ProgressSample>,
    /// The traffic that each port had brought to the destination.
    pub ports: Vec<PortLine>,
    /// The daemons' phases.
    pub course: Course,
    /// Other events, such as a port that was taken down.
    pub notes: Vec<Note>,
}

/// The progress of a guest at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProgressSample {
    /// The time of the sample, in seconds.
    pub seconds: f64,
    /// The number of writes of pages by then.
    pub written: u64,
    /// The number of pages that the guest had read by then.
    pub read: u64,
}

/// The traffic of a port.
#[derive(Debug, Clone, Default)]
pub struct PortLine {
    /// The name of the port.
    pub name: String,
    /// The times when the port was looked at, and the bytes that it had carried by then, headers included.
    pub carried: Vec<(f64, u64)>,
}

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// The time of the event, in seconds.
    pub seconds: f64,
    /// The text that describes it.
    pub text: String,
}

impl Timeline {
    /// Notes an event.
    pub fn note(&mut self, at_unix_seconds: f64, text: impl Into<String>) {
        self.notes.push(Note { seconds: at_unix_seconds - self.ordered_at_unix_seconds, text: text.into() });
    }

    /// Returns the number of pages that the guest wrote in a second, over spans of at least `span` seconds, which end
    /// where the pause begins and ends. Each rate holds from its time until the next, and the last entry only says
    /// where they end.
    pub fn writing(&self, span: f64) -> Vec<(f64, f64)> {
        self.rates(span, |progress| progress.written)
    }

    /// Returns the number of pages that the guest read in a second, in the form of [`Timeline::writing`].
    pub fn reading(&self, span: f64) -> Vec<(f64, f64)> {
        self.rates(span, |progress| progress.read)
    }

    fn rates(&self, span: f64, count: fn(&ProgressSample) -> u64) -> Vec<(f64, f64)> {
        let ends = self.course.pause.map(|pause| [pause.from, pause.to]);
        rates(
            self.progress.iter().map(|progress| (progress.seconds, count(progress))),
            span,
            ends.as_ref().map_or(&[], |ends| ends),
        )
    }

    /// Returns the time from the first moment that is known to the last; `None` if nothing is known.
    pub fn span(&self) -> Option<TimeSpan> {
        let seconds = self.progress.iter().map(|progress| progress.seconds);
        let carried = self.ports.iter().flat_map(|port| &port.carried).map(|(seconds, _)| *seconds);
        let mut all = seconds.chain(carried);
        let first = all.next()?;
        let (from, to) = all.fold((first, first), |(from, to), seconds| (from.min(seconds), to.max(seconds)));
        (to > from).then_some(TimeSpan { from, to })
    }
}

impl ProgressSample {
    /// Returns how many of `count` came in a second between two samples.
    fn rate(from: &Self, to: &Self, count: fn(&Self) -> u64) -> Option<f64> {
        let seconds = to.seconds - from.seconds;
        (seconds > 0.0).then(|| count(to).saturating_sub(count(from)) as f64 / seconds)
    }

    /// Returns how many of `count` came in a second within a span, as far as it was watched.
    pub(crate) fn mean(all: &[Self], span: TimeSpan, count: fn(&Self) -> u64) -> Option<f64> {
        let mut within = all.iter().filter(|progress| (span.from..=span.to).contains(&progress.seconds));
        let first = within.next()?;
        Self::rate(first, within.next_back()?, count)
    }
}

impl PortLine {
    /// Returns the number of bytes that the port carried in a second, over spans of at least `span` seconds, in the
    /// form of [`Timeline::writing`].
    pub fn rates(&self, span: f64) -> Vec<(f64, f64)> {
        rates(self.carried.iter().copied(), span, &[])
    }

    /// Returns the number of bytes that the port carried within a span.
    pub fn bytes(&self, span: TimeSpan) -> u64 {
        let mut within = self.carried.iter().filter(|(seconds, _)| (span.from..=span.to).contains(seconds));
        let first = within.next().map_or(0, |(_, bytes)| *bytes);
        within.next_back().map_or(0, |(_, last)| last.saturating_sub(first))
    }
}

/// Returns differences of a count over spans of time, which end soon after `ends` at the latest.
fn rates(counts: impl Iterator<Item = (f64, u64)>, span: f64, ends: &[f64]) -> Vec<(f64, f64)> {
    let mut rates: Vec<(f64, f64)> = Vec::new();
    let mut from: Option<(f64, u64)> = None;
    for (seconds, count) in counts {
        let Some((began, before)) = from else {
            from = Some((seconds, count));
            continue;
        };
        // A little less will do: the next one might come much too late.
        let ended = ends.iter().any(|end| began < *end && *end <= seconds);
        if seconds > began && (ended || seconds - began >= span * 0.9) {
            rates.push((began, count.saturating_sub(before) as f64 / (seconds - began)));
            from = Some((seconds, count));
        }
    }
    if let (Some((end, _)), Some((_, last))) = (from, rates.last().copied()) {
        rates.push((end, last));
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(seconds: f64, written: u64) -> ProgressSample {
        ProgressSample { seconds, written, read: 0 }
    }

    #[test]
    fn rates_are_over_what_was_seen() {
        let progress = vec![progress(0.0, 100), progress(0.1, 110), progress(0.2, 130), progress(0.5, 130)];
        let timeline = Timeline { progress, ..Timeline::default() };
        let near = |rates: Vec<(f64, f64)>, expected: &[(f64, f64)]| {
            let near =
                |one: &(f64, f64), two: &(f64, f64)| (one.0 - two.0).abs() + (one.1 - two.1).abs() < 1e-9;
            assert!(
                rates.len() == expected.len() && rates.iter().zip(expected).all(|(one, two)| near(one, two)),
                "{rates:?}"
            );
        };
        near(timeline.writing(0.1), &[(0.0, 100.0), (0.1, 200.0), (0.2, 0.0), (0.5, 0.0)]);
        near(timeline.writing(0.2), &[(0.0, 150.0), (0.2, 0.0), (0.5, 0.0)]);
        near(timeline.writing(9.0), &[]);
        near(timeline.reading(0.2), &[(0.0, 0.0), (0.2, 0.0), (0.5, 0.0)]);
        let course = Course { pause: Some(TimeSpan { from: 0.05, to: 0.15 }), ..Course::default() };
        let paused = Timeline { course, ..timeline.clone() };
        near(paused.writing(0.3), &[(0.0, 100.0), (0.1, 200.0), (0.2, 0.0), (0.5, 0.0)]);
        assert_eq!(timeline.span(), Some(TimeSpan { from: 0.0, to: 0.5 }));
        assert_eq!(Timeline::default().span(), None);
        let mean = ProgressSample::mean(&timeline.progress, TimeSpan { from: 0.05, to: 0.3 }, |progress| {
            progress.written
        });
        assert!((mean.expect("two looks") - 200.0).abs() < 1e-9);
        assert_eq!(
            ProgressSample::mean(&timeline.progress, TimeSpan { from: 0.3, to: 0.9 }, |progress| progress
                .read),
            None
        );
    }

    #[test]
    fn a_port_has_carried_what_came_in_a_span() {
        let port = PortLine { name: "port0".into(), carried: vec![(0.0, 5), (1.0, 25), (2.0, 125)] };
        assert_eq!(port.bytes(TimeSpan { from: 0.5, to: 2.0 }), 100);
        assert_eq!(port.bytes(TimeSpan { from: 1.5, to: 2.0 }), 0);
        assert_eq!(port.rates(1.0), [(0.0, 20.0), (1.0, 100.0), (2.0, 100.0)]);
    }
}
