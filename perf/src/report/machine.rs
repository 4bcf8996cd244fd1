//! The machine that everything is measured on.

use std::fs;

use serde::Serialize;

/// The properties of the machine that matter to the figures.
#[derive(Debug, Clone, Serialize)]
pub(super) struct MachineInfo {
    /// The number of processors that this process may use.
    cpus: usize,
    /// The name of the processors.
    processor: Option<String>,
    /// The size of the memory, in KiB.
    memory_kib: Option<u64>,
    /// The release of the Linux kernel.
    kernel: Option<String>,
    /// The congestion control of TCP on this host, which namespaces that are made here have too.
    congestion_control: Option<String>,
}

impl MachineInfo {
    /// Describes the machine that this runs on, as far as it can be found out.
    pub(super) fn this() -> Self {
        let line = |file: &str, key: &str| {
            let text = fs::read_to_string(file).ok()?;
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned())
        };
        let memory = line("/proc/meminfo", "MemTotal:");
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            processor: line("/proc/cpuinfo", "model name"),
            memory_kib: memory.and_then(|memory| memory.split_whitespace().next()?.parse().ok()),
            kernel: line("/proc/sys/kernel/osrelease", ""),
            congestion_control: line("/proc/sys/net/ipv4/tcp_congestion_control", ""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_tells_of_itself() {
        let machine = MachineInfo::this();
        assert!(machine.cpus > 0 && machine.memory_kib.is_some_and(|memory| memory > 0));
        assert!(machine.kernel.is_some_and(|kernel| !kernel.is_empty()));
    }
}
