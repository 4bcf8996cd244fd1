//! Gauges that several add to at once.

use metrics::Gauge;

/// What one of several adds to a gauge that tells the sum. It adds nothing any more once it is dropped.
pub struct Part {
    gauge: Gauge,
    /// Whole numbers, which are added up and taken away again without a rest.
    value: u64,
}

impl Part {
    /// Adds nothing yet.
    pub(super) fn of(gauge: Gauge) -> Self {
        Self { gauge, value: 0 }
    }

    /// Adds this from now on, in place of what it added before.
    pub fn set(&mut self, value: u64) {
        let before = std::mem::replace(&mut self.value, value);
        match value >= before {
            true => self.gauge.increment((value - before) as f64),
            false => self.gauge.decrement((before - value) as f64),
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.set(0);
    }
}
