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

use crate::vmm::Standing;

/// The file.
#[derive(Debug)]
pub struct History(File);

impl History {
    /// Makes the file at `path`, or appends to it.
    ///
    /// # Errors
    ///
    /// If that cannot be done.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().create(true).append(true).open(path)?))
    }

    /// The guest is about to run, or does something else from now on.
    pub fn note(&self, standing: Standing) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let line = format!("{{\"at_ns\":{now},\"standing\":\"{}\"}}\n", standing.name());
        if let Err(error) = (&self.0).write_all(line.as_bytes()) {
            tracing::error!(%error, "cannot write the guest's history");
        }
    }
}
