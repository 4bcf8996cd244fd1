//! The options of the raw limit, and its results as text and as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::baseline::memory::MemoryState;
use crate::baseline::rpc::RpcFigures;
use crate::report::NamedFigures;

/// The options of a measurement of the raw limit.
#[derive(Debug, Clone, Copy)]
pub struct RawOptions {
    /// The number of bytes to move in all, at least 1 MiB for each connection.
    pub bytes: usize,
    /// The number of connections over each port of the lab, above 0.
    pub connections_per_port: usize,
    /// The state of the memory received into. The memory sent from is always prepared, like that of a guest which has
    /// run.
    pub destination: MemoryState,
}

/// The time and the processor time that it took to move some bytes.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// The time from the first send, with all connections made, until the last acknowledgement was back. Each
    /// connection sends back one byte when all of its share is in memory.
    pub elapsed: Duration,
    /// The user and system time of the sending threads. It includes what the kernel does for the network on their
    /// behalf, but not what it does elsewhere (an idle core, ksoftirqd).
    pub send_cpu: Duration,
    /// The user and system time of the receiving threads.
    pub receive_cpu: Duration,
    /// The processor time of the kernel's own threads meanwhile, beyond what they used before, in seconds.
    pub kernel_cpu: f64,
}

/// The result of [`raw::measure`](super::measure). GB and Gbit are powers of ten.
#[derive(Debug, Clone, Serialize)]
pub struct RawReport {
    /// The number of ports used.
    pub ports: usize,
    /// The number of connections over each port.
    pub connections_per_port: usize,
    /// The state of the memory received into.
    pub memory: MemoryState,
    /// The number of bytes moved over all connections together.
    pub bytes: usize,
    /// The seconds from the first send to the last acknowledgement.
    pub seconds: f64,
    /// The Gbit moved in a second; headers of TCP, IP and Ethernet do not count.
    pub gbit_per_second: f64,
    /// CPU time of the sending threads, for each GB moved.
    pub send_cpu_seconds_per_gb: f64,
    /// CPU time of the receiving threads, for each GB moved.
    pub receive_cpu_seconds_per_gb: f64,
    /// CPU time of the sending and the receiving threads together, for each GB moved.
    pub cpu_seconds_per_gb: f64,
    /// The times of single pages that were asked for over the first port when nothing else was sent.
    #[serde(flatten)]
    pub rpc: RpcFigures,
}

impl Transfer {
    /// Returns the figures that a scenario needs, of so many bytes moved.
    pub fn figures(&self, bytes: usize) -> NamedFigures {
        let (gigabytes, seconds) = (bytes as f64 / 1e9, self.elapsed.as_secs_f64());
        let cpu = (self.send_cpu + self.receive_cpu).as_secs_f64() + self.kernel_cpu;
        NamedFigures::from([
            ("total_seconds", seconds),
            ("gbit_per_second", gigabytes * 8.0 / seconds),
            ("cpu_seconds", cpu),
            ("cpu_seconds_per_gb", cpu / gigabytes),
        ])
    }
}

impl RawReport {
    pub(crate) fn new(ports: usize, options: &RawOptions, took: &Transfer, rpc: RpcFigures) -> Self {
        let gigabytes = options.bytes as f64 / 1e9;
        let seconds = took.elapsed.as_secs_f64();
        let per_gb = |cpu: Duration| cpu.as_secs_f64() / gigabytes;
        Self {
            ports,
            connections_per_port: options.connections_per_port,
            memory: options.destination,
            bytes: options.bytes,
            seconds,
            gbit_per_second: gigabytes * 8.0 / seconds,
            send_cpu_seconds_per_gb: per_gb(took.send_cpu),
            receive_cpu_seconds_per_gb: per_gb(took.receive_cpu),
            cpu_seconds_per_gb: per_gb(took.send_cpu + took.receive_cpu),
            rpc,
        }
    }
}

impl fmt::Display for RawReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.memory.as_str();
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
        writeln!(
            f,
            "  {:.2} CPU s per GB: {:.2} sending, {:.2} receiving",
            self.cpu_seconds_per_gb, self.send_cpu_seconds_per_gb, self.receive_cpu_seconds_per_gb
        )?;
        write!(f, "  {}", self.rpc)
    }
}
