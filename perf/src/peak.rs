//! The largest memory that a process holds.

use std::fs;

use anyhow::{Context, Result};

/// A watch on the largest memory that a process holds (`VmHWM`, proc_pid_status(5)). The guest's own memory counts
/// where it is mapped and touched.
#[derive(Debug, Clone, Copy)]
pub struct PeakMemory {
    pid: u32,
}

impl PeakMemory {
    /// Begins to watch. What the process held before is forgotten (`clear_refs`, proc_pid_clear_refs(5)).
    ///
    /// # Errors
    ///
    /// If there is no such process, or it belongs to another user.
    pub fn begin(pid: u32) -> Result<Self> {
        const RESET_PEAK: &str = "5";
        let path = format!("/proc/{pid}/clear_refs");
        fs::write(&path, RESET_PEAK).with_context(|| format!("writing {path}"))?;
        Ok(Self { pid })
    }

    /// Returns the largest memory up to now, in bytes.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(kilobytes.with_context(|| format!("{path} tells no VmHWM"))? << 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_what_was_held_since() {
        let peak = PeakMemory::begin(std::process::id()).expect("this process");
        let before = peak.bytes().expect("its peak");
        drop(std::hint::black_box(vec![1u8; 64 << 20]));
        assert!(peak.bytes().expect("its peak") >= before + (48 << 20));
        let peak = PeakMemory::begin(std::process::id()).expect("this process");
        assert!(peak.bytes().expect("its peak") < before + (48 << 20));
        assert!(PeakMemory::begin(u32::MAX).is_err());
    }
}
