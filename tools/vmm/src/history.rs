//! A file that says when the guest ran: what is written there outlives the VMM, however that ends.
//!
//! ```text
//! {"at_ns":1764390723123456789,"standing":"running"}
//! ```
//!
//! One line for each change of the guest's standing, with `CLOCK_REALTIME` in nanoseconds. A guest is noted as running
//! before it runs and as paused when it stands still, so what the file tells of its running is never too short. A
//! start that fails is followed by a line with the standing that is left.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::run_state::RunState;

/// The history file of a guest.
#[derive(Debug)]
pub struct HistoryFile(File);

impl HistoryFile {
    /// Makes the file at `path`, or appends to it.
    ///
    /// # Errors
    ///
    /// If that cannot be done.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().create(true).append(true).open(path)?))
    }

    /// Writes that the guest is in `state` from now on. A guest that is about to run is noted before it runs.
    pub fn note(&self, state: RunState) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let line = format!("{{\"at_ns\":{now},\"standing\":\"{}\"}}\n", state.name());
        if let Err(error) = (&self.0).write_all(line.as_bytes()) {
            tracing::error!(%error, "cannot write the guest's history");
        }
    }
}
