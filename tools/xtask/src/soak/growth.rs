//! What daemons take of the machine over time: descriptors, threads and memory. None of it may grow without bound.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The looks at a daemon that do not count, because it gets caches and pools meanwhile.
const WARM_UP: usize = 5;
/// The looks between the first and the last that are compared, at least.
const APART: usize = 8;
/// More descriptors or threads than this at the end of a life than after the warm-up are a leak.
const MORE: u64 = 12;
/// More memory of its own than this, and than half of what it had, is a leak. In KiB.
const MORE_KIB: u64 = 32 << 10;

/// The lives of all daemons.
#[derive(Debug, Default)]
pub(crate) struct DaemonLives(BTreeMap<(String, u32), Vec<Use>>);

/// What a daemon takes of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Use {
    /// The number of guests that are attached to it: each has descriptors.
    guests: usize,
    descriptors: u64,
    threads: u64,
    /// The memory that is its own (RssAnon), in KiB. Guests' memory is not.
    own_kib: u64,
    /// All memory that it has mapped and touched (VmRSS), in KiB.
    resident_kib: u64,
}

/// What a daemon took after its warm-up and at its end, with as many guests.
#[derive(Clone, Copy, Debug)]
struct Growth {
    looks: usize,
    first: Use,
    last: Use,
}

impl DaemonLives {
    /// Looks at a daemon to which so many guests are attached, while nothing is under way.
    ///
    /// # Errors
    ///
    /// If the system does not tell.
    pub(crate) fn look(&mut self, host: &str, pid: u32, guests: usize) -> Result<()> {
        let now =
            Use::of(pid, guests).with_context(|| format!("looking at memlaned of {host}, process {pid}"))?;
        self.0.entry((host.to_owned(), pid)).or_default().push(now);
        Ok(())
    }

    /// Says which daemons have taken more and more.
    pub(crate) fn faults(&self) -> Vec<String> {
        let grown = |((host, pid), uses): (&(String, u32), &Vec<Use>)| {
            let growth = Growth::of(uses)?;
            let what = growth.leak()?;
            Some(format!("memlaned at {host}, process {pid}, takes more and more {what}: {}", growth.text()))
        };
        self.0.iter().filter_map(grown).collect()
    }

    /// Returns a line for each daemon that lived for long enough.
    pub(crate) fn text(&self) -> Vec<String> {
        let line = |((host, pid), uses): (&(String, u32), &Vec<Use>)| {
            Some(format!("memlaned at {host}, process {pid}: {}", Growth::of(uses)?.text()))
        };
        self.0.iter().filter_map(line).collect()
    }

    /// Returns the number of daemons, however long they lived.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Returns the same as [`DaemonLives::text`] for programs.
    pub(crate) fn json(&self) -> Value {
        let line = |((host, pid), uses): (&(String, u32), &Vec<Use>)| {
            let Growth { looks, first, last } = Growth::of(uses)?;
            let of = |one: Use| {
                json!({
                    "guests": one.guests, "descriptors": one.descriptors, "threads": one.threads,
                    "own_kib": one.own_kib, "resident_kib": one.resident_kib,
                })
            };
            Some(json!({ "host": host, "pid": pid, "looks": looks, "warm": of(first), "end": of(last) }))
        };
        self.0.iter().filter_map(line).collect()
    }
}

impl Use {
    fn of(pid: u32, guests: usize) -> Result<Self> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field =
            |name: &str| Self::field(&status, name).with_context(|| format!("no {name} in its status"));
        Ok(Self {
            guests,
            descriptors,
            threads: field("Threads:")?,
            own_kib: field("RssAnon:")?,
            resident_kib: field("VmRSS:")?,
        })
    }

    /// Parses a number of `/proc/PID/status`.
    fn field(status: &str, name: &str) -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    }
}

impl Growth {
    /// Compares two looks that are as far apart as possible and saw as many guests.
    fn of(uses: &[Use]) -> Option<Self> {
        let mut best: Option<(usize, usize)> = None;
        for (first, one) in uses.iter().enumerate().skip(WARM_UP) {
            let last = uses.iter().rposition(|other| other.guests == one.guests)?;
            if best.is_none_or(|(from, to)| last - first > to - from) {
                best = Some((first, last));
            }
        }
        let (first, last) = best.filter(|(first, last)| last - first >= APART)?;
        Some(Self { looks: uses.len(), first: uses[first], last: uses[last] })
    }

    fn leak(&self) -> Option<&'static str> {
        let Self { first, last, .. } = self;
        if last.descriptors > first.descriptors + MORE {
            Some("descriptors")
        } else if last.threads > first.threads + MORE {
            Some("threads")
        } else if last.own_kib > first.own_kib + (first.own_kib / 2).max(MORE_KIB) {
            Some("memory")
        } else {
            None
        }
    }

    fn text(&self) -> String {
        let Self { looks, first, last } = self;
        format!(
            "{looks} looks; with {} guests {} descriptors then {}, {} threads then {}, {} MiB of its own then {}, {} MiB \
             resident then {}",
            first.guests,
            first.descriptors,
            last.descriptors,
            first.threads,
            last.threads,
            first.own_kib >> 10,
            last.own_kib >> 10,
            first.resident_kib >> 10,
            last.resident_kib >> 10,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(descriptors: impl Fn(usize) -> u64) -> Vec<Use> {
        (0..30)
            .map(|look| Use { guests: look % 3, descriptors: descriptors(look), ..Use::default() })
            .collect()
    }

    #[test]
    fn a_leak_is_told_from_a_warm_up() {
        let leak = |uses: &[Use]| Growth::of(uses).and_then(|growth| growth.leak());
        assert_eq!(leak(&uses(|look| 20 + look as u64)), Some("descriptors"));
        assert_eq!(leak(&uses(|look| if look < 4 { 10 } else { 60 })), None);
        // Guests have descriptors, and come and go.
        assert_eq!(leak(&uses(|look| 20 + 20 * (look % 3) as u64)), None);
    }

    #[test]
    fn a_short_life_tells_nothing() {
        assert!(Growth::of(&uses(|_| 9)[..WARM_UP + 3]).is_none());
    }

    #[test]
    fn the_status_of_a_process_is_read() {
        let own = Use::of(std::process::id(), 0).expect("this process");
        assert!(own.descriptors > 2 && own.threads > 0 && own.resident_kib >= own.own_kib, "{own:?}");
    }
}
