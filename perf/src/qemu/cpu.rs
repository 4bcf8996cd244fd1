//! Processor time of processes and of the kernel's own threads.

use std::fs;
use std::io;

use anyhow::{Context, Result};

/// Processor seconds, user and system, that a process has used with all its threads, those that have ended included.
///
/// # Errors
///
/// If there is no such process (any more).
pub(super) fn of_process(pid: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = ticks(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat says {stat:?}")))?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The same of several processes together.
pub(super) fn of_processes(pids: &[u32]) -> Result<f64> {
    pids.iter()
        .map(|pid| {
            of_process(*pid).with_context(|| format!("asking for the processor time of process {pid}"))
        })
        .sum()
}

/// The kernel's threads that carry packets when those who sent them do not.
pub(super) fn network_threads() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_one = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.starts_with("ksoftirqd/")
    };
    pids.filter(is_one).collect()
}

/// `utime` and `stime` of proc_pid_stat(5) together.
fn ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may itself have spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system) = (fields.next()?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stand_behind_the_name() {
        let stat = "42 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 120 34 999 999 20 0 1 0 5 6 7\n";
        assert_eq!(ticks(stat), Some(154));
        assert_eq!(ticks("42 (cut off) S 1 2"), None);
    }

    #[test]
    fn this_process_has_used_some() {
        let own = std::process::id();
        let before = of_process(own).expect("this process");
        while of_process(own).expect("this process") <= before {
            std::hint::black_box(vec![1; 1 << 20]);
        }
        assert!(of_processes(&[own, own]).expect("this process") > 2.0 * before);
        assert!(of_process(u32::MAX).is_err());
    }
}
