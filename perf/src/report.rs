//! What is measured, as text and as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::memory::MemoryState;
use crate::raw::RawOptions;

/// What [`raw::measure`](crate::raw::measure) found. GB and Gbit are powers of ten.
#[derive(Debug, Clone, Serialize)]
pub struct RawReport {
    /// Ports used.
    pub ports: usize,
    /// Connections over each.
    pub connections_per_port: usize,
    /// The state of the memory received into.
    pub memory: MemoryState,
    /// Bytes moved over all connections together.
    pub bytes: usize,
    /// From the first send to the last acknowledgement.
    pub seconds: f64,
    /// `bytes` over `seconds`; headers of TCP, IP and Ethernet do not count.
    pub gbit_per_second: f64,
    /// CPU time of the sending threads, for each GB moved.
    pub send_cpu_seconds_per_gb: f64,
    /// CPU time of the receiving threads, for each GB moved.
    pub receive_cpu_seconds_per_gb: f64,
    /// Both together.
    pub cpu_seconds_per_gb: f64,
}

impl RawReport {
    pub(crate) fn new(
        ports: usize,
        options: &RawOptions,
        elapsed: Duration,
        send_cpu: Duration,
        receive_cpu: Duration,
    ) -> Self {
        let gigabytes = options.bytes as f64 / 1e9;
        let seconds = elapsed.as_secs_f64();
        Self {
            ports,
            connections_per_port: options.connections_per_port,
            memory: options.destination,
            bytes: options.bytes,
            seconds,
            gbit_per_second: gigabytes * 8.0 / seconds,
            send_cpu_seconds_per_gb: send_cpu.as_secs_f64() / gigabytes,
            receive_cpu_seconds_per_gb: receive_cpu.as_secs_f64() / gigabytes,
            cpu_seconds_per_gb: (send_cpu + receive_cpu).as_secs_f64() / gigabytes,
        }
    }
}

impl fmt::Display for RawReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.memory {
            MemoryState::Prepared => "prepared",
            MemoryState::Fresh => "fresh",
        };
        writeln!(
            f,
            "raw, {} port(s) with {} connection(s) each, {state} memory",
            self.ports, self.connections_per_port
        )?;
        writeln!(
            f,
            "  {:.2} Gbit/s: {:.2} GB in {:.3} s",
            self.gbit_per_second,
            self.bytes as f64 / 1e9,
            self.seconds
        )?;
        write!(
            f,
            "  {:.2} CPU s per GB: {:.2} sending, {:.2} receiving",
            self.cpu_seconds_per_gb, self.send_cpu_seconds_per_gb, self.receive_cpu_seconds_per_gb
        )
    }
}

/// What [`measure_memcpy`](crate::memory::measure_memcpy) found.
#[derive(Debug, Clone, Serialize)]
pub struct MemcpyReport {
    /// Bytes copied each time.
    pub bytes: usize,
    /// Into memory whose pages had to be allocated.
    pub fresh: CopyFigures,
    /// Into memory whose pages were there.
    pub prepared: CopyFigures,
}

/// One copy. GB are powers of ten.
#[derive(Debug, Clone, Serialize)]
pub struct CopyFigures {
    /// How long it took.
    pub seconds: f64,
    /// Bytes over seconds.
    pub gb_per_second: f64,
}

impl CopyFigures {
    pub(crate) fn new(bytes: usize, elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        Self { seconds, gb_per_second: bytes as f64 / 1e9 / seconds }
    }
}

impl fmt::Display for MemcpyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "memcpy of {:.2} GB on one core", self.bytes as f64 / 1e9)?;
        writeln!(f, "  fresh    {:5.2} GB/s: {:.3} s", self.fresh.gb_per_second, self.fresh.seconds)?;
        write!(f, "  prepared {:5.2} GB/s: {:.3} s", self.prepared.gb_per_second, self.prepared.seconds)
    }
}
