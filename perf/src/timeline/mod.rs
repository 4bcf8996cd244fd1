//! How a move went from moment to moment: what the guest did, what the ports carried, and what the daemons were at.
//!
//! The guest's progress is what it counts itself, told by the VMM at either end; the ports' bytes are what the kernel of
//! the destination counts; when rounds and the pause were, the migration tells. All of that is put on one clock, which
//! shows 0 at the order: that of the machine, which both hosts share.

mod course;
mod recorder;

pub use course::{Course, RoundSpan, Span};
pub use recorder::Recorder;

/// A move, moment by moment. All times are seconds since the order, and negative before it.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    /// When the order was given.
    pub ordered_at_unix_seconds: f64,
    /// How far the guest was, in the order of time.
    pub progress: Vec<Progress>,
    /// What each port had brought to the destination.
    pub ports: Vec<PortLine>,
    /// What the daemons did when.
    pub course: Course,
    /// What else happened, such as a port that was taken down.
    pub notes: Vec<Note>,
}

/// How far a guest is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// When that was seen.
    pub seconds: f64,
    /// Pages that it had written, each time that it wrote one.
    pub written: u64,
    /// Pages that it had read.
    pub read: u64,
}

/// What a port has carried.
#[derive(Debug, Clone, Default)]
pub struct PortLine {
    /// Its name.
    pub name: String,
    /// When it was looked at, and the bytes that it had carried by then, headers included.
    pub carried: Vec<(f64, u64)>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// When.
    pub seconds: f64,
    /// What.
    pub text: String,
}

impl Timeline {
    /// Notes that something happened.
    pub fn note(&mut self, at_unix_seconds: f64, text: impl Into<String>) {
        self.notes.push(Note { seconds: at_unix_seconds - self.ordered_at_unix_seconds, text: text.into() });
    }

    /// Pages that the guest wrote a second, over spans of at least `span` seconds, which end where the pause begins and
    /// ends: each rate holds from its time until the next, and the last only tells where they end.
    pub fn writing(&self, span: f64) -> Vec<(f64, f64)> {
        self.rates(span, |progress| progress.written)
    }

    /// Pages that it read a second.
    pub fn reading(&self, span: f64) -> Vec<(f64, f64)> {
        self.rates(span, |progress| progress.read)
    }

    fn rates(&self, span: f64, count: fn(&Progress) -> u64) -> Vec<(f64, f64)> {
        let ends = self.course.pause.map(|pause| [pause.from, pause.to]);
        rates(
            self.progress.iter().map(|progress| (progress.seconds, count(progress))),
            span,
            ends.as_ref().map_or(&[], |ends| ends),
        )
    }

    /// From the first moment that is known to the last; `None` if nothing is.
    pub fn span(&self) -> Option<Span> {
        let seconds = self.progress.iter().map(|progress| progress.seconds);
        let carried = self.ports.iter().flat_map(|port| &port.carried).map(|(seconds, _)| *seconds);
        let mut all = seconds.chain(carried);
        let first = all.next()?;
        let (from, to) = all.fold((first, first), |(from, to), seconds| (from.min(seconds), to.max(seconds)));
        (to > from).then_some(Span { from, to })
    }
}

impl Progress {
    /// What was counted from one to the other over the time between them.
    fn rate(from: &Self, to: &Self, count: fn(&Self) -> u64) -> Option<f64> {
        let seconds = to.seconds - from.seconds;
        (seconds > 0.0).then(|| count(to).saturating_sub(count(from)) as f64 / seconds)
    }

    /// What was counted a second within a span, as far as it was watched.
    pub(crate) fn mean(all: &[Self], span: Span, count: fn(&Self) -> u64) -> Option<f64> {
        let mut within = all.iter().filter(|progress| (span.from..=span.to).contains(&progress.seconds));
        let first = within.next()?;
        Self::rate(first, within.next_back()?, count)
    }
}

impl PortLine {
    /// Bytes that it carried a second, over spans of at least `span` seconds, as [`Timeline::writing`] has them.
    pub fn rates(&self, span: f64) -> Vec<(f64, f64)> {
        rates(self.carried.iter().copied(), span, &[])
    }

    /// Bytes that it carried within a span.
    pub fn bytes(&self, span: Span) -> u64 {
        let mut within = self.carried.iter().filter(|(seconds, _)| (span.from..=span.to).contains(seconds));
        let first = within.next().map_or(0, |(_, bytes)| *bytes);
        within.next_back().map_or(0, |(_, last)| last.saturating_sub(first))
    }
}

/// Differences of a count over spans of time, which end soon after `ends` at the latest.
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

    fn progress(seconds: f64, written: u64) -> Progress {
        Progress { seconds, written, read: 0 }
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
        let course = Course { pause: Some(Span { from: 0.05, to: 0.15 }), ..Course::default() };
        let paused = Timeline { course, ..timeline.clone() };
        near(paused.writing(0.3), &[(0.0, 100.0), (0.1, 200.0), (0.2, 0.0), (0.5, 0.0)]);
        assert_eq!(timeline.span(), Some(Span { from: 0.0, to: 0.5 }));
        assert_eq!(Timeline::default().span(), None);
        let mean =
            Progress::mean(&timeline.progress, Span { from: 0.05, to: 0.3 }, |progress| progress.written);
        assert!((mean.expect("two looks") - 200.0).abs() < 1e-9);
        assert_eq!(
            Progress::mean(&timeline.progress, Span { from: 0.3, to: 0.9 }, |progress| progress.read),
            None
        );
    }

    #[test]
    fn a_port_has_carried_what_came_in_a_span() {
        let port = PortLine { name: "port0".into(), carried: vec![(0.0, 5), (1.0, 25), (2.0, 125)] };
        assert_eq!(port.bytes(Span { from: 0.5, to: 2.0 }), 100);
        assert_eq!(port.bytes(Span { from: 1.5, to: 2.0 }), 0);
        assert_eq!(port.rates(1.0), [(0.0, 20.0), (1.0, 100.0), (2.0, 100.0)]);
    }
}
