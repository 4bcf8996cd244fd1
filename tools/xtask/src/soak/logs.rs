//! Watching over the logs of daemons and VMMs while they grow.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::fleet::Fleet;
use crate::common::record::{DaemonLog, panics};

/// What a daemon logs whose control thread was kept from its work.
const STOOD_STILL: &str = "the control thread stood still";
/// Kinds of errors that are told apart; more of them are only counted.
const KINDS: usize = 100;

/// The logs of a fleet, and how far they were read.
#[derive(Debug, Default)]
pub(crate) struct LogWatch {
    read: BTreeMap<PathBuf, DaemonLog>,
    /// The errors that daemons and VMMs logged, without their times, and how often.
    errors: BTreeMap<String, u32>,
}

impl LogWatch {
    /// Reads what has been written since the last look, and returns what nobody should ever write.
    ///
    /// # Errors
    ///
    /// If a log cannot be read.
    pub(crate) fn look(&mut self, fleet: &Fleet) -> Result<Vec<String>> {
        let mut faults = Vec::new();
        for path in fleet.rig.lab().hosts().iter().flat_map(|host| logs(host.directory())) {
            let log = self.read.entry(path.clone()).or_insert_with(|| DaemonLog::from_start(path.clone()));
            let text = log.read_on()?;
            let bad = panics(&text).into_iter();
            let still = text.lines().filter(|line| line.contains(STOOD_STILL)).map(str::to_owned);
            faults.extend(bad.chain(still).map(|line| format!("in {}: {line}", path.display())));
            for line in text.lines().filter_map(error_of) {
                if self.errors.len() < KINDS || self.errors.contains_key(line) {
                    *self.errors.entry(line.to_owned()).or_default() += 1;
                }
            }
        }
        Ok(faults)
    }

    /// Returns the errors that were logged, and how often.
    pub(crate) fn errors(&self) -> &BTreeMap<String, u32> {
        &self.errors
    }
}

/// Returns a line's error without its time and its fields, which differ each time; `None` if it tells of none.
fn error_of(line: &str) -> Option<&str> {
    let rest = line.split_once(" ERROR ").filter(|(time, _)| time.trim_end().ends_with('Z'))?.1;
    Some(rest.find('=').map_or(rest, |field| {
        let end = rest[..field].rfind(' ').unwrap_or(field);
        &rest[..end]
    }))
}

/// Returns the logs in a host's directory, those of its QEMUs too.
fn logs(directory: &Path) -> Vec<PathBuf> {
    let entries = |path: &Path| -> Vec<PathBuf> {
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let is_log = |path: &PathBuf| path.extension().is_some_and(|kind| kind == "log") && path.is_file();
    let of_qemus = entries(&directory.join("guests")).into_iter().map(|guest| guest.join("qemu.log"));
    entries(directory).into_iter().chain(of_qemus).filter(is_log).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_apart_by_what_they_say() {
        let line = "2026-11-29T04:35:21.250000Z ERROR memlane_guest: the guest could not be resumed guest=t1 error=no";
        assert_eq!(error_of(line), Some("memlane_guest: the guest could not be resumed"));
        assert_eq!(error_of("2026-11-29T04:35:21.250000Z  WARN memlane_guest: no ERROR here"), None);
        assert_eq!(error_of("2026-11-29T04:35:21.250000Z ERROR memlaned: plain"), Some("memlaned: plain"));
    }
}
