//! What is measured, as text and as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::baseline::memory::MemoryState;
use crate::baseline::raw::{RawOptions, Transfer};
use crate::report::Waits;

/// What [`raw::measure`](super::raw::measure) found. GB and Gbit are powers of ten.
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
    /// What a page took that was asked for over the first port, when nothing else was sent.
    #[serde(flatten)]
    pub rpc: RpcFigures,
}

/// What [`rpc::measure`](super::rpc::measure) found, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct RpcFigures {
    /// Pages asked for.
    pub rpc_requests: usize,
    /// Half of them came within this time.
    pub rpc_p50_us: f64,
    /// 99 of 100 came within this time.
    pub rpc_p99_us: f64,
    /// All came within this time.
    pub rpc_max_us: f64,
    /// The same of half of them, if both ends shared a processor.
    pub rpc_one_cpu_p50_us: f64,
    /// And of 99 of 100.
    pub rpc_one_cpu_p99_us: f64,
    /// How long each took, between two processors.
    #[serde(skip)]
    pub waits: Waits,
}

impl RpcFigures {
    /// The figures of the times between two processors and on one, of which there are some each.
    pub(crate) fn new(mut two: Vec<Duration>, mut one: Vec<Duration>) -> Self {
        two.sort_unstable();
        one.sort_unstable();
        let within = microseconds_within;
        Self {
            rpc_requests: two.len(),
            rpc_p50_us: within(&two, 50),
            rpc_p99_us: within(&two, 99),
            rpc_max_us: within(&two, 100),
            rpc_one_cpu_p50_us: within(&one, 50),
            rpc_one_cpu_p99_us: within(&one, 99),
            waits: Waits::of(&two),
        }
    }
}

/// The smallest of these sorted times that so many percent of all do not exceed.
///
/// # Panics
///
/// If there are none.
pub(crate) fn microseconds_within(times: &[Duration], percent: usize) -> f64 {
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times[rank - 1].as_secs_f64() * 1e6
}

impl fmt::Display for RpcFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rpc_requests, rpc_p50_us, rpc_p99_us, rpc_max_us, .. } = self;
        let Self { rpc_one_cpu_p50_us, rpc_one_cpu_p99_us, .. } = self;
        write!(
            f,
            "a page of 4 KiB, asked for alone: {rpc_p50_us:.0} µs in the median, {rpc_p99_us:.0} µs in 99 of 100, \
             {rpc_max_us:.0} µs at most, of {rpc_requests}; with both ends on one processor {rpc_one_cpu_p50_us:.0} µs \
             and {rpc_one_cpu_p99_us:.0} µs"
        )
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

/// What [`measure_memcpy`](crate::baseline::memory::measure_memcpy) found.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let times = |times: &[u64]| times.iter().copied().map(Duration::from_micros).collect();
        let thousand: Vec<u64> = (1..=1000).rev().collect();
        let many = RpcFigures::new(times(&thousand), times(&[7]));
        assert_eq!((many.rpc_one_cpu_p50_us, many.rpc_one_cpu_p99_us), (7.0, 7.0));
        let found = [many.rpc_p50_us, many.rpc_p99_us, many.rpc_max_us].map(f64::round);
        assert_eq!((found, many.rpc_requests), ([500.0, 990.0, 1000.0], 1000));
    }
}
