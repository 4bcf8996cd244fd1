//! [`Recorder`]: looks at a guest and at ports while something else moves the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use memlane_api::types::Migration;
use memlane_lab::{InterfaceCounters, LabHost, LabVmm, ProgressStream};
use serde_json::Value;

use super::{Course, PortLine, ProgressSample, Timeline};

/// The time between two reports of a VMM about its guest. A report takes it some microseconds.
const GUEST: Duration = Duration::from_millis(2);
/// The time between two looks at the ports, when the VMMs' reports are read too.
const PORTS: Duration = Duration::from_millis(20);
/// The time for which the recorder goes on after the end.
const AFTER: Duration = Duration::from_millis(300);

/// A recorder, which looks at a guest and at ports on a thread of its own until it is told to stop.
#[derive(Debug)]
pub struct Recorder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<SeenMove>>>,
}

/// The records of a move, in seconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Default)]
struct SeenMove {
    progress: Vec<ProgressSample>,
    ports: Vec<PortLine>,
}

impl Recorder {
    /// Starts to look at the guest in the VMMs at either end, and at the traffic that `host` receives over its ports.
    ///
    /// # Errors
    ///
    /// If a VMM has ended, or the ports' counters cannot be read.
    pub fn start(vmms: &[&LabVmm], host: &LabHost) -> Result<Self> {
        let following: Vec<ProgressStream> =
            vmms.iter().map(|vmm| vmm.session()?.follow(GUEST)).collect::<Result<_>>()?;
        let counters = host.interface_counters()?;
        let ports =
            host.ports().iter().map(|port| PortLine { name: port.interface.clone(), carried: Vec::new() });
        let seen = SeenMove { progress: Vec::new(), ports: ports.collect() };
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || seen.record(following, counters, &told))
            .context("starting a thread that watches the move")?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Goes on for a moment, stops, and puts together the records of a migration that has ended.
    ///
    /// # Errors
    ///
    /// If looking at the guest or the ports has failed.
    pub fn finish(mut self, migration: &Migration) -> Result<Timeline> {
        std::thread::sleep(AFTER);
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("only this and dropping take it");
        let mut seen = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let order = migration.started_at_unix_seconds;
        // Two VMMs told of one guest.
        seen.progress.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
        // The source's goes on telling how far the guest was when it left, for a moment, while it runs on there.
        let mut furthest = 0;
        seen.progress.retain(|progress| {
            let ahead = progress.written >= furthest;
            furthest = furthest.max(progress.written);
            ahead
        });
        for progress in &mut seen.progress {
            progress.seconds -= order;
        }
        for (seconds, _) in seen.ports.iter_mut().flat_map(|port| &mut port.carried) {
            *seconds -= order;
        }
        let (progress, ports, course) = (seen.progress, seen.ports, Course::of(migration));
        Ok(Timeline { ordered_at_unix_seconds: order, progress, ports, course, notes: Vec::new() })
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Whoever drops it does not want to know.
            let _ = thread.join();
        }
    }
}

impl SeenMove {
    fn record(
        mut self,
        mut following: Vec<ProgressStream>,
        mut counters: InterfaceCounters,
        stop: &AtomicBool,
    ) -> Result<Self> {
        loop {
            // Once more after it was told to stop, for what has come since the last time.
            let last = stop.load(Ordering::Relaxed);
            let began = Instant::now();
            let mut index = 0;
            while let Some(vmm) = following.get_mut(index) {
                match vmm.told()? {
                    Some(told) => {
                        self.progress.extend(told.iter().filter_map(progress));
                        index += 1;
                    }
                    // Its guest has left.
                    None => drop(following.swap_remove(index)),
                }
            }
            let seconds = unix_seconds();
            for (name, carried) in counters.read()? {
                if let Some(port) = self.ports.iter_mut().find(|port| port.name == name) {
                    port.carried.push((seconds, carried.received_bytes));
                }
            }
            if last {
                return Ok(self);
            }
            std::thread::sleep(PORTS.saturating_sub(began.elapsed()));
        }
    }
}

fn progress(told: &Value) -> Option<ProgressSample> {
    let number = |key: &str| told[key].as_u64();
    let seconds = number("realtime_ns")? as f64 / 1e9;
    Some(ProgressSample { seconds, written: number("steps")?, read: number("reads")? })
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
