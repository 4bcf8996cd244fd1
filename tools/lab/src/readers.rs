//! What a move costs the vCPUs that only read.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::rig::{Vmm, VmmSession};
use crate::wait::wait_for;

/// How long readers are watched before the guest is moved.
const BEFORE: Duration = Duration::from_secs(1);
/// Longest search for a thread.
const FINDING: Duration = Duration::from_secs(1);
/// What was watched for a shorter time is no rate: readers count by the thousand.
const LEAST_NS: u64 = 200_000_000;

/// How fast the readers of a guest are: before the move, while pages are sent, and while moreover writes wait.
///
/// What stun costs them is told by the last two. The guest writes as it always does in both, and its pages are tracked
/// and sent, so that the cost of copying is in neither; what copying costs is told by the first two.
///
/// A rate is of the time in which a reader could have read: what it waited for a processor does not count, for writers,
/// lanes and whatever else the host does take processors away in one state and leave them in another, and on a host
/// with few of them that is most of what would be seen. It counts what a reader waits for anything else, such as a page,
/// and what its thread does in the kernel to get at one.
///
/// It is that of all spans between two looks that found the same state of the migration; so the switch from one state
/// to another, with its pause, is in none.
#[derive(Debug)]
pub struct Readers {
    watched: Option<Watched>,
    last: Option<(State, Sample)>,
    before: Tally,
    copying: Tally,
    stunned: Tally,
}

/// A VMM and its readers' threads.
#[derive(Debug)]
struct Watched {
    session: VmmSession,
    /// `/proc/PID/task/TID/schedstat` of each.
    threads: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Copying,
    Stunned,
}

/// Sums over all readers.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    elapsed_ns: u64,
    /// Of which they waited for a processor.
    waited_ns: u64,
    reads: u64,
}

/// What was seen in one state.
#[derive(Clone, Copy, Debug, Default)]
struct Tally(Sample);

impl Readers {
    /// Watches the readers of a guest that is not being moved yet: the vCPUs of these numbers.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer, or has no such vCPUs.
    pub fn before(vmm: &mut Vmm, vcpus: Range<u16>) -> Result<Self> {
        let threads = vcpus.map(|vcpu| thread(vmm.process().pid(), vcpu)).collect::<Result<_>>()?;
        let mut watched = Watched { session: vmm.session()?, threads };
        let mut before = Tally::default();
        let start = watched.look()?;
        sleep(BEFORE);
        before.add(start, watched.look()?);
        Ok(Self::new(Some(watched), before))
    }

    fn new(watched: Option<Watched>, before: Tally) -> Self {
        Self { watched, last: None, before, copying: Tally::default(), stunned: Tally::default() }
    }

    /// Looks at them in this state of the migration, as often as it is told.
    pub fn look(&mut self, migration: &Value) {
        let Some(state) = State::of(migration) else {
            self.last = None;
            return;
        };
        match self.watched.as_mut().map(Watched::look) {
            Some(Ok(sample)) => self.note(state, sample),
            // The VMM ends when its guest has left.
            Some(Err(_)) => self.watched = None,
            None => {}
        }
    }

    fn note(&mut self, state: State, sample: Sample) {
        if let Some((_, from)) = self.last.replace((state, sample)).filter(|(before, _)| *before == state) {
            match state {
                State::Copying => self.copying.add(from, sample),
                State::Stunned => self.stunned.add(from, sample),
            }
        }
    }

    /// By how much stun has made them slower, in percent; `None` if they were not seen for long enough.
    pub fn slowdown_percent(&self) -> Option<f64> {
        Some(100.0 * (1.0 - self.stunned.per_second()? / self.copying.per_second()?))
    }

    /// What was seen in each state.
    pub fn json(&self) -> Value {
        json!({
            "before": self.before.json(),
            "copying": self.copying.json(),
            "stunned": self.stunned.json(),
        })
    }
}

impl Watched {
    fn look(&mut self) -> Result<Sample> {
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
        Ok(Sample { elapsed_ns, waited_ns, reads: reads.iter().sum() })
    }
}

/// What the scheduler tells of a vCPU's thread.
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

/// Nanoseconds that a thread was runnable and did not run: the second number of schedstat (sched-stats.rst).
fn run_delay(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

impl State {
    /// `None` where pages are not (only) sent.
    fn of(migration: &Value) -> Option<Self> {
        let sends = migration["phase"] == "copying" && !migration["rounds"].as_array()?.is_empty();
        let state = if migration["stun"].is_object() { Self::Stunned } else { Self::Copying };
        sends.then_some(state)
    }
}

impl Tally {
    fn add(&mut self, from: Sample, to: Sample) {
        self.0.elapsed_ns += to.elapsed_ns.saturating_sub(from.elapsed_ns);
        self.0.waited_ns += to.waited_ns.saturating_sub(from.waited_ns);
        self.0.reads += to.reads.saturating_sub(from.reads);
    }

    /// Pages that one reader reads in a second in which it does not wait for a processor.
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

    fn sample(tenths: u64, waited_tenths: u64, reads: u64) -> Sample {
        Sample { elapsed_ns: tenths * 100_000_000, waited_ns: waited_tenths * 100_000_000, reads }
    }

    #[test]
    fn only_whole_spans_of_one_state_count_and_no_time_without_a_processor() {
        let mut readers = Readers::new(None, Tally(sample(10, 0, 1000)));
        assert_eq!(readers.slowdown_percent(), None);
        readers.note(State::Copying, sample(0, 0, 0));
        readers.note(State::Copying, sample(10, 5, 500));
        // Nothing was read while writes were made to wait.
        readers.note(State::Stunned, sample(20, 5, 500));
        readers.note(State::Stunned, sample(40, 5, 2400));
        readers.look(&json!({ "phase": "switching_over" }));
        readers.note(State::Stunned, sample(90, 5, 2400));
        let copying = json!({ "reads_per_second": 1000.0, "waited_for_processor_percent": 50.0 });
        assert_eq!(readers.json()["copying"], copying);
        assert_eq!(readers.json()["stunned"]["reads_per_second"], 950.0);
        assert!((readers.slowdown_percent().unwrap() - 5.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_hardly_seen_is_no_rate() {
        let mut readers = Readers::new(None, Tally::default());
        readers.note(State::Stunned, Sample::default());
        readers
            .note(State::Stunned, Sample { elapsed_ns: 2 * LEAST_NS, waited_ns: LEAST_NS + 1, reads: 5000 });
        let nothing = json!({ "reads_per_second": null, "waited_for_processor_percent": null });
        assert_eq!(readers.json()["stunned"], nothing);
    }

    #[test]
    fn the_state_is_that_of_the_migration() {
        let state = |migration| State::of(&migration);
        let rounds = json!([{ "round": 1 }]);
        assert!(state(json!({ "phase": "copying", "rounds": [] })).is_none(), "nothing is sent yet");
        assert!(state(json!({ "phase": "preparing", "rounds": rounds })).is_none());
        assert!(state(json!({ "phase": "copying", "rounds": rounds, "stun": null })) == Some(State::Copying));
        let stun = json!({ "seconds": 0.1 });
        assert!(state(json!({ "phase": "copying", "rounds": rounds, "stun": stun })) == Some(State::Stunned));
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
