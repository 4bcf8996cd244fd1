//! Processor time of processes and of the kernel's own threads.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memlane_lab::{HostId, Lab, LabHost, Remote};
use serde::Deserialize as _;
use serde_json::{Value, json};

/// The names of the kernel's threads that carry packets, or do other delayed work for any process.
const KERNEL_THREADS: [&str; 3] = ["ksoftirqd/", "kworker/", "napi/"];
/// The parent of all of the kernel's threads.
const KTHREADD: u32 = 2;

/// A meter of the processor time of some processes, and of the kernel's threads that work for them. Nothing tells for
/// whom each of these works, so all of their time counts, less what they used when nothing was moved.
#[derive(Debug, Clone)]
pub struct Meter {
    machines: Vec<MeasuredMachine>,
}

/// A machine, and the processes that are measured there.
#[derive(Debug, Clone)]
struct MeasuredMachine {
    /// The connection to the machine; `None` for this machine.
    remote: Option<Arc<Remote>>,
    /// The processor seconds that each process had used at the last look.
    processes: BTreeMap<u32, f64>,
}

/// The processor time that was used until some moment.
#[derive(Debug, Clone)]
pub struct CpuReading {
    at: Instant,
    processes: f64,
    /// The processor seconds of each of the kernel's threads on each machine. Threads come and go.
    kernel: BTreeMap<(usize, u32), f64>,
}

/// The processor time that was used between two readings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Used {
    /// The time between the readings, in seconds.
    pub elapsed: f64,
    /// Processor seconds of the processes.
    pub processes: f64,
    /// Processor seconds of the kernel's threads.
    pub kernel: f64,
}

impl Meter {
    /// Makes a meter of these processes of this machine, with all their threads.
    ///
    /// # Errors
    ///
    /// If one of them is gone.
    pub fn new(processes: impl IntoIterator<Item = u32>) -> Result<Self> {
        Self::of_machines([(None, processes.into_iter().collect())])
    }

    /// Makes a meter of processes on the hosts of `lab`, which may be one machine.
    ///
    /// # Errors
    ///
    /// If one of them is gone.
    pub fn on(lab: &Lab, processes: impl IntoIterator<Item = (HostId, u32)>) -> Result<Self> {
        let processes: Vec<_> = processes.into_iter().collect();
        if !lab.is_remote() {
            return Self::new(processes.into_iter().map(|(_, pid)| pid));
        }
        Self::of_machines([HostId::A, HostId::B].map(|id| {
            let here = processes.iter().filter(|(on, _)| *on == id).map(|(_, pid)| *pid);
            (lab.host(id).remote().cloned(), here.collect())
        }))
    }

    fn of_machines(machines: impl IntoIterator<Item = (Option<Arc<Remote>>, Vec<u32>)>) -> Result<Self> {
        let machine = |(remote, processes): (Option<Arc<Remote>>, Vec<u32>)| {
            let mut machine = MeasuredMachine { remote, processes: BTreeMap::new() };
            let (used, _) = machine.ask(&processes, false)?;
            for pid in processes {
                let used = used.get(&pid);
                let used = used.with_context(|| format!("asking for the processor time of process {pid}"))?;
                machine.processes.insert(pid, *used);
            }
            Ok(machine)
        };
        Ok(Self { machines: machines.into_iter().map(machine).collect::<Result<_>>()? })
    }

    /// Looks at the processes only, which takes little time. Of a process that ends by itself, the meter knows only
    /// what the last look has found.
    pub fn look(&mut self) {
        for machine in &mut self.machines {
            machine.look(false);
        }
    }

    /// Returns the processor time that was used until now.
    pub fn read(&mut self) -> CpuReading {
        let mut kernel = BTreeMap::new();
        for (index, machine) in self.machines.iter_mut().enumerate() {
            let threads = machine.look(true);
            kernel.extend(threads.into_iter().map(|(pid, used)| ((index, pid), used)));
        }
        let processes = self.machines.iter().flat_map(|machine| machine.processes.values()).sum();
        CpuReading { processes, kernel, at: Instant::now() }
    }

    /// Measures for a while how much is used when nothing is moved.
    pub fn idle(&mut self, time: Duration) -> Used {
        let start = self.read();
        std::thread::sleep(time);
        self.read().since(&start)
    }
}

impl MeasuredMachine {
    /// Looks at the processes and, if `kernel`, at the kernel's threads, which it returns.
    fn look(&mut self, kernel: bool) -> BTreeMap<u32, f64> {
        let processes: Vec<u32> = self.processes.keys().copied().collect();
        let (used, threads) = self.ask(&processes, kernel).unwrap_or_default();
        // Of one that has ended the last remains.
        self.processes.extend(used);
        threads
    }

    /// Asks what these processes have used, and the kernel's threads if `kernel`. Processes that have ended are missing
    /// from the answer.
    fn ask(&self, processes: &[u32], kernel: bool) -> Result<(BTreeMap<u32, f64>, BTreeMap<u32, f64>)> {
        let Some(remote) = &self.remote else { return Ok(used_here(processes, kernel)) };
        let told = remote.ask(ORDER, json!({ "processes": processes, "kernel": kernel }))?;
        serde_json::from_value(told).context("what an agent tells of processor time")
    }
}

/// The order to an agent to report processor time.
pub const ORDER: &str = "cpu";

/// Answers [`ORDER`] for an agent.
///
/// # Errors
///
/// If it is asked for something else.
pub fn tell(order: &Value) -> Result<Value> {
    let processes = Vec::<u32>::deserialize(&order["processes"]).context("an order without processes")?;
    Ok(json!(used_here(&processes, order["kernel"] == true)))
}

fn used_here(processes: &[u32], kernel: bool) -> (BTreeMap<u32, f64>, BTreeMap<u32, f64>) {
    let used = processes.iter().filter_map(|pid| Some((*pid, of_process(*pid).ok()?)));
    (used.collect(), if kernel { of_kernel() } else { BTreeMap::new() })
}

impl CpuReading {
    /// Returns what was used since `start`, an earlier reading of the same meter.
    pub fn since(&self, start: &Self) -> Used {
        let kernel = self.kernel.iter().map(|(thread, now)| {
            // One that is new has used all of it since.
            (now - start.kernel.get(thread).copied().unwrap_or(0.0)).max(0.0)
        });
        Used {
            elapsed: (self.at - start.at).as_secs_f64(),
            processes: self.processes - start.processes,
            kernel: kernel.sum(),
        }
    }
}

impl Used {
    /// Returns the processor seconds of all together, without what is used in the same time anyway.
    pub fn beyond(&self, idle: &Self) -> f64 {
        let anyway = |of: f64| if idle.elapsed > 0.0 { of / idle.elapsed * self.elapsed } else { 0.0 };
        // What the kernel does anyway comes and goes: it must not make what was seen less than nothing.
        self.processes - anyway(idle.processes) + (self.kernel - anyway(idle.kernel)).max(0.0)
    }
}

/// Returns the processor seconds of a process on a host, as [`of_process`] does.
///
/// # Errors
///
/// If there is no such process (any more).
pub fn on(host: &LabHost, pid: u32) -> Result<f64> {
    let machine = MeasuredMachine { remote: host.remote().cloned(), processes: BTreeMap::new() };
    let (used, _) = machine.ask(&[pid], false)?;
    used.get(&pid).copied().with_context(|| format!("asking for the processor time of process {pid}"))
}

/// Returns the processor seconds, user and system, that a process has used with all its threads, including those that
/// have ended.
///
/// # Errors
///
/// If there is no such process (any more).
pub fn of_process(pid: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let stat =
        Stat::parse(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat says {stat:?}")))?;
    Ok(stat.seconds())
}

fn of_kernel() -> BTreeMap<u32, f64> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let used = pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let stat = Stat::parse(&stat)?;
        let counts = stat.parent == KTHREADD && KERNEL_THREADS.iter().any(|name| stat.name.starts_with(name));
        counts.then(|| (pid, stat.seconds()))
    });
    used.collect()
}

/// The fields of proc_pid_stat(5) that are needed.
#[derive(Debug, PartialEq)]
struct Stat<'a> {
    name: &'a str,
    parent: u32,
    /// The sum of `utime` and `stime`.
    ticks: u64,
}

impl<'a> Stat<'a> {
    fn parse(stat: &'a str) -> Option<Self> {
        // The name, in parentheses, may itself have spaces and parentheses.
        let (start, rest) = stat.rsplit_once(')')?;
        let (_, name) = start.split_once('(')?;
        let mut fields = rest.split_whitespace().skip(1);
        let parent = fields.next()?.parse().ok()?;
        let mut fields = fields.skip(9);
        let (user, system) = (fields.next()?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
        Some(Self { name, parent, ticks: user + system })
    }

    fn seconds(&self) -> f64 {
        self.ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stand_behind_the_name() {
        let stat = "42 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 120 34 999 999 20 0 1 0 5 6 7\n";
        assert_eq!(Stat::parse(stat), Some(Stat { name: "a (b) c", parent: 1, ticks: 154 }));
        assert_eq!(Stat::parse("42 (cut off) S 1 2"), None);
    }

    #[test]
    fn this_process_has_used_some() {
        let mut meter = Meter::new([std::process::id()]).expect("this process");
        let start = meter.read();
        let used = loop {
            std::hint::black_box(vec![1; 1 << 20]);
            let used = meter.read().since(&start);
            if used.processes > 0.0 {
                break used;
            }
        };
        assert!(used.elapsed > 0.0 && used.kernel >= 0.0);
        assert!(Meter::new([u32::MAX]).is_err());
    }

    #[test]
    fn a_process_that_has_ended_keeps_what_it_was_seen_to_use() {
        let mut child = std::process::Command::new("true").spawn().expect("true");
        let mut meter = Meter::new([child.id()]).expect("a process");
        let seen = meter.read().processes;
        child.wait().expect("an end");
        assert_eq!(meter.read().processes, seen);
    }

    #[test]
    fn what_is_used_anyway_does_not_count() {
        let idle = Used { elapsed: 2.0, processes: 0.5, kernel: 1.0 };
        let busy = Used { elapsed: 4.0, processes: 3.0, kernel: 2.5 };
        assert_eq!(busy.beyond(&idle), 2.0 + 0.5);
        let quiet = Used { kernel: 0.0, ..busy };
        assert_eq!(quiet.beyond(&idle), 2.0, "the kernel has done less than nothing");
        let none = Used { elapsed: 0.0, processes: 0.0, kernel: 0.0 };
        assert_eq!(busy.beyond(&none), 5.5);
    }
}
