//! The trace: what happened, one line for each event that matters.

use std::time::Duration;

/// Lines that say what happened and when. Nothing is kept unless somebody asks for it.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    kept: bool,
    lines: Vec<String>,
}

impl Trace {
    pub(crate) fn new(kept: bool) -> Self {
        Self { kept, lines: Vec::new() }
    }

    /// Adds a line, which is made only if it is kept.
    pub(crate) fn note(&mut self, now: Duration, line: impl FnOnce() -> String) {
        if self.kept {
            self.lines.push(format!("{:>14.6} s  {}", now.as_secs_f64(), line()));
        }
    }

    pub(crate) fn into_lines(self) -> Vec<String> {
        self.lines
    }
}
