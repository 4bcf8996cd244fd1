//! The cost of a move for the vCPUs that only read.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::vmm::{LabVmm, VmmSession};
use crate::wait::wait_for;

/// The time for which readers are watched before the guest is moved.
const BEFORE: Duration = Duration::from_secs(1);
/// Longest search for a thread.
const FINDING: Duration = Duration::from_secs(1);
/// The shortest time for which a rate is computed, in nanoseconds: readers count their reads by the thousand.
const LEAST_NS: u64 = 200_000_000;

/// The speed of a guest's readers: before the move, while pages are sent, and while writes wait as well.
///
/// The last two show the cost of stun: in both the guest writes as it always does, and its pages are tracked and sent,
/// so that the cost of copying is in neither. The first two show the cost of copying.
///
/// A rate counts the time in which a reader could have read. The time that it waited for a processor does not count:
/// writers, lanes and the rest of the host take more processors in one state than in another, and on a host with few
/// processors that would be most of the difference. The time that a reader waits for anything else, such as a page,
/// counts, and so does the work of its thread in the kernel to get a page.
///
/// A rate is taken over all spans between two looks that found the same state of the migration. So the switch from one
/// state to another, with its pause, is in none.
#[derive(Debug)]
pub struct Readers {
    watched: Option<WatchedReaders>,
    last: Option<(ReaderState, ReaderSample)>,
    before: ReaderTally,
    copying: ReaderTally,
    stunned: ReaderTally,
}

/// A VMM and its readers' threads.
#[derive(Debug)]
struct WatchedReaders {
    session: VmmSession,
    /// The files `/proc/PID/task/TID/schedstat` of all threads.
    threads: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReaderState {
    Copying,
    Stunned,
}

/// Sums over all readers.
#[derive(Clone, Copy, Debug, Default)]
struct ReaderSample {
    elapsed_ns: u64,
    /// The part of the time in which they waited for a processor, in nanoseconds.
    waited_ns: u64,
    reads: u64,
}

/// The sums that were seen in one state of the migration.
#[derive(Clone, Copy, Debug, Default)]
struct ReaderTally(ReaderSample);

impl Readers {
    /// Starts to watch the readers of a guest that is not being moved yet: the vCPUs of these numbers.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer, or has no such vCPUs.
    pub fn before(vmm: &mut LabVmm, vcpus: Range<u16>) -> Result<Self> {
        let threads = vcpus.map(|vcpu| thread(vmm.process().pid(), vcpu)).collect::<Result<_>>()?;
        let mut watched = WatchedReaders { session: vmm.session()?, threads };
        let mut before = ReaderTally::default();
        let start = watched.look()?;
        sleep(BEFORE);
        before.add(start, watched.look()?);
        Ok(Self::new(Some(watched), before))
    }

    fn new(watched: Option<WatchedReaders>, before: ReaderTally) -> Self {
        Self { watched, last: None, before, copying: ReaderTally::default(), stunned: ReaderTally::default() }
    }

    /// Looks at the readers in this state of the migration. It should be called for each state that the daemon reports.
    pub fn look(&mut self, migration: &Value) {
        let Some(state) = ReaderState::of(migration) else {
            self.last = None;
            return;
        };
        match self.watched.as_mut().map(WatchedReaders::look) {
            Some(Ok(sample)) => self.note(state, sample),
            // The VMM ends when its guest has left.
            Some(Err(_)) => self.watched = None,
            None => {}
        }
    }

    fn note(&mut self, state: ReaderState, sample: ReaderSample) {
        if let Some((_, from)) = self.last.replace((state, sample)).filter(|(before, _)| *before == state) {
            match state {
                ReaderState::Copying => self.copying.add(from, sample),
                ReaderState::Stunned => self.stunned.add(from, sample),
            }
        }
    }

    /// Returns by how much stun has made the readers slower, in percent; `None` if they were not seen for long enough.
    pub fn slowdown_percent(&self) -> Option<f64> {
        Some(100.0 * (1.0 - self.stunned.per_second()? / self.copying.per_second()?))
    }

    /// Returns what was seen in each state, as JSON.
    pub fn json(&self) -> Value {
        json!({
            "before": self.before.json(),
            "copying": self.copying.json(),
            "stunned": self.stunned.json(),
        })
    }
}

impl WatchedReaders {
    fn look(&mut self) -> Result<ReaderSample> {
        let stats = self.session.stats()?;
        let waited = self.threads.iter().map(|thread| {
            let text = fs::read_to_string(thread).with_context(|| format!("reading {}", thread.display()))?;
            run_delay(&text).with_context(|| format!("{} says {text:?}", thread.display()))
        });
        let waited_ns = waited.sum::<Result<u64>>()?;
        let reads = stats["reads"].as_array().into_iter().flatten();
        let reads: Vec<u64> = reads.filter_map(Value::as_u64).collect();
        ensure!(reads.len() == self.threads.len(), "{} readers say {reads:?}", self.threads.len());
        let elapsed_ns = stats["monotonic_ns"].as_u64().context("the VMM tells no time")?;
        let elapsed_ns = elapsed_ns.saturating_mul(reads.len() as u64);
        Ok(ReaderSample { elapsed_ns, waited_ns, reads: reads.iter().sum() })
    }
}

/// Finds the scheduler's file about a vCPU's thread.
fn thread(pid: u32, vcpu: u16) -> Result<PathBuf> {
    let name = format!("vcpu{vcpu}\n");
    let find = || {
        let mut tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten().map(|entry| entry.path());
        tasks.find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm == name))
    };
    // A list that is read while a thread ends may lack others too.
    let task = wait_for(&format!("the thread of vCPU {vcpu} in process {pid}"), FINDING, find)?;
    Ok(task.join("schedstat"))
}

/// Reads how long a thread was runnable and did not run, in nanoseconds: the second number of schedstat
/// (sched-stats.rst).
fn run_delay(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

impl ReaderState {
    /// Returns the readers' state in this state of the migration; `None` if pages are not, or not only, sent.
    fn of(migration: &Value) -> Option<Self> {
        let sends = migration["phase"] == "copying" && !migration["rounds"].as_array()?.is_empty();
        let state = if migration["stun"].is_object() { Self::Stunned } else { Self::Copying };
        sends.then_some(state)
    }
}

impl ReaderTally {
    fn add(&mut self, from: ReaderSample, to: ReaderSample) {
        self.0.elapsed_ns += to.elapsed_ns.saturating_sub(from.elapsed_ns);
        self.0.waited_ns += to.waited_ns.saturating_sub(from.waited_ns);
        self.0.reads += to.reads.saturating_sub(from.reads);
    }

    /// Returns how many pages one reader reads in a second in which it does not wait for a processor.
    fn per_second(&self) -> Option<f64> {
        let able_ns = self.0.elapsed_ns.saturating_sub(self.0.waited_ns);
        (able_ns >= LEAST_NS).then(|| self.0.reads as f64 * 1e9 / able_ns as f64)
    }

    fn json(&self) -> Value {
        let waited = self.per_second().map(|_| 100.0 * self.0.waited_ns as f64 / self.0.elapsed_ns as f64);
        json!({ "reads_per_second": self.per_second(), "waited_for_processor_percent": waited })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(tenths: u64, waited_tenths: u64, reads: u64) -> ReaderSample {
        ReaderSample { elapsed_ns: tenths * 100_000_000, waited_ns: waited_tenths * 100_000_000, reads }
    }

    #[test]
    fn only_whole_spans_of_one_state_count_and_no_time_without_a_processor() {
        let mut readers = Readers::new(None, ReaderTally(sample(10, 0, 1000)));
        assert_eq!(readers.slowdown_percent(), None);
        readers.note(ReaderState::Copying, sample(0, 0, 0));
        readers.note(ReaderState::Copying, sample(10, 5, 500));
        // Nothing was read while writes were made to wait.
        readers.note(ReaderState::Stunned, sample(20, 5, 500));
        readers.note(ReaderState::Stunned, sample(40, 5, 2400));
        readers.look(&json!({ "phase": "switching_over" }));
        readers.note(ReaderState::Stunned, sample(90, 5, 2400));
        let copying = json!({ "reads_per_second": 1000.0, "waited_for_processor_percent": 50.0 });
        assert_eq!(readers.json()["copying"], copying);
        assert_eq!(readers.json()["stunned"]["reads_per_second"], 950.0);
        assert!((readers.slowdown_percent().unwrap() - 5.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_hardly_seen_is_no_rate() {
        let mut readers = Readers::new(None, ReaderTally::default());
        readers.note(ReaderState::Stunned, ReaderSample::default());
        readers.note(
            ReaderState::Stunned,
            ReaderSample { elapsed_ns: 2 * LEAST_NS, waited_ns: LEAST_NS + 1, reads: 5000 },
        );
        let nothing = json!({ "reads_per_second": null, "waited_for_processor_percent": null });
        assert_eq!(readers.json()["stunned"], nothing);
    }

    #[test]
    fn the_state_is_that_of_the_migration() {
        let state = |migration| ReaderState::of(&migration);
        let rounds = json!([{ "round": 1 }]);
        assert!(state(json!({ "phase": "copying", "rounds": [] })).is_none(), "nothing is sent yet");
        assert!(state(json!({ "phase": "preparing", "rounds": rounds })).is_none());
        assert!(
            state(json!({ "phase": "copying", "rounds": rounds, "stun": null }))
                == Some(ReaderState::Copying)
        );
        let stun = json!({ "seconds": 0.1 });
        assert!(
            state(json!({ "phase": "copying", "rounds": rounds, "stun": stun }))
                == Some(ReaderState::Stunned)
        );
    }

    #[test]
    fn threads_are_found_and_tell_how_long_they_waited() {
        let found = std::thread::Builder::new().name("vcpu12".into()).spawn(|| {
            let path = thread(std::process::id(), 12).expect("this thread");
            run_delay(&fs::read_to_string(path).expect("schedstat"))
        });
        assert!(found.unwrap().join().unwrap().is_some());
        assert!(thread(std::process::id(), 13).is_err());
        assert_eq!(run_delay("123 456 7\n"), Some(456));
        assert_eq!(run_delay(""), None);
    }
}
