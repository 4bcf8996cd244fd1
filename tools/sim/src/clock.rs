//! The clock, and what is to happen in the future.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use crate::event::Event;

/// Virtual time, which goes from one event to the next. Events of one moment happen in the order in which they were
/// planned.
#[derive(Default)]
pub(crate) struct Clock {
    now: Duration,
    planned: u64,
    future: BinaryHeap<Reverse<Planned>>,
}

struct Planned {
    at: Duration,
    order: u64,
    event: Event,
}

impl Clock {
    /// Returns the time since the run began.
    pub(crate) fn now(&self) -> Duration {
        self.now
    }

    /// Plans an event for a moment, which is now if it is past.
    pub(crate) fn at(&mut self, at: Duration, event: Event) {
        self.planned += 1;
        self.future.push(Reverse(Planned { at: at.max(self.now), order: self.planned, event }));
    }

    /// Plans an event.
    pub(crate) fn after(&mut self, wait: Duration, event: Event) {
        self.at(self.now + wait, event);
    }

    /// Goes on to the next event.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let Reverse(Planned { at, event, .. }) = self.future.pop()?;
        self.now = at;
        Some(event)
    }
}

impl Planned {
    fn key(&self) -> (Duration, u64) {
        (self.at, self.order)
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Planned {}
