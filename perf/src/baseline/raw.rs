//! The raw limit: what sockets carry from shared memory to shared memory when nothing else is done.
//!
//! One connection is what a lane is, a thread and a ring at either end and the same congestion control, without pages
//! to track, frames to write or acknowledgements to wait for. What Memlane loses against this, it loses by its own
//! doing.

mod remote;

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Barrier;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memlane_lab::{HostId, Lab};
use memlane_net::port::congestion::Congestion;
use rustix::time::{ClockId, clock_gettime};
use socket2::{Domain, Socket, Type};

use crate::baseline::memory::{MemoryState, SharedMemory, warm_up};
use crate::baseline::report::RawReport;
use crate::baseline::ring::SocketRing;
use crate::baseline::rpc;
use crate::cpu::Meter;
use crate::report::Figures;
pub use remote::Receiver;

/// What one send or receive moves, about what a lane submits at once.
const CHUNK_BYTES: usize = 1 << 20;
/// How long it is watched what the kernel does while nothing moves.
const IDLE: Duration = Duration::from_secs(1);

/// What to move.
#[derive(Debug, Clone, Copy)]
pub struct RawOptions {
    /// Bytes to move in all, at least 1 MiB for each connection.
    pub bytes: usize,
    /// Connections over each port of the lab, above 0.
    pub connections_per_port: usize,
    /// The memory received into. The memory sent from is always prepared, as that of a guest which has run.
    pub destination: MemoryState,
}

/// What it took to move some bytes.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// From the first send, with all connections made, until the last acknowledgement was back: one byte for each
    /// connection when all of its share was in memory.
    pub elapsed: Duration,
    /// User and system time of the sending threads. What the kernel does for the network on their behalf counts, what
    /// it does elsewhere (an idle core, ksoftirqd) does not.
    pub send_cpu: Duration,
    /// The same of the receiving threads.
    pub receive_cpu: Duration,
    /// What the kernel's own threads used meanwhile, beyond what they used before, in seconds.
    pub kernel_cpu: f64,
}

/// Moves `options.bytes` from host A to host B of `lab` over all its ports, and compares what arrived. Before that, with
/// nothing under way, single pages are asked for.
///
/// # Errors
///
/// If the lab has no ports, a connection fails, or the bytes received differ from those sent.
pub fn measure(lab: &Lab, options: &RawOptions) -> Result<RawReport> {
    let ports = lab.host(HostId::B).ports().len();
    ensure!(ports > 0, "the raw limit needs a port");
    let rpc = rpc::measure(lab).context("asking for single pages")?;
    let source = SharedMemory::with_pattern(options.bytes)?;
    let took = transfer(lab, &source, options.connections_per_port, options.destination)?;
    Ok(RawReport::new(ports, options, &took, rpc))
}

/// Moves all of `source` from host A to host B of `lab` over all its ports, into memory in the state `destination`, and
/// compares what arrived. Hosts that are reached over ssh move as many bytes of their own.
///
/// # Errors
///
/// As [`measure`].
pub fn transfer(
    lab: &Lab,
    source: &SharedMemory,
    connections_per_port: usize,
    destination: MemoryState,
) -> Result<Transfer> {
    let ports = lab.host(HostId::B).ports();
    let connections = ports.len() * connections_per_port;
    ensure!(connections > 0, "the raw limit needs a port and a connection over it");
    ensure!(
        source.len() / connections >= CHUNK_BYTES,
        "{} bytes are too few for {connections} connections: each takes 1 MiB or more",
        source.len()
    );
    if lab.is_remote() {
        return remote::transfer(lab, source.len(), connections_per_port, destination);
    }
    if destination == MemoryState::Fresh {
        warm_up(source.len() as u64)?;
    }
    let mut destination = SharedMemory::new(source.len(), destination)?;
    let sockets: Vec<(TcpStream, TcpStream)> = ports
        .iter()
        .cycle()
        .take(connections)
        .map(|port| connect(lab, port.address).with_context(|| format!("connecting over {}", port.interface)))
        .collect::<Result<_>>()?;

    let mut kernel = Meter::new([])?;
    let idle = kernel.idle(IDLE);
    let share = source.len().div_ceil(connections);
    let start = Barrier::new(2 * connections + 1);
    let before = kernel.read();
    let (started, senders, receivers) = std::thread::scope(|scope| {
        let start = &start;
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        let shares = source.chunks(share).zip(destination.chunks_mut(share));
        for ((client, server), (from, to)) in sockets.into_iter().zip(shares) {
            senders.push(scope.spawn(move || run(client, start, |ring| send_all(ring, from))));
            receivers.push(scope.spawn(move || run(server, start, |ring| receive_all(ring, to))));
        }
        start.wait();
        (Instant::now(), collect(senders), collect(receivers))
    });
    let kernel_used = kernel.read().since(&before);
    let (senders, receivers) = (senders.context("sending")?, receivers.context("receiving")?);
    ensure!(**source == *destination, "the bytes received differ from those sent");

    let ended = senders.iter().map(|end| end.ended).max().expect("there is a connection");
    Ok(Transfer {
        elapsed: ended - started,
        send_cpu: senders.iter().map(|end| end.cpu).sum(),
        receive_cpu: receivers.iter().map(|end| end.cpu).sum(),
        kernel_cpu: kernel_used.beyond(&idle),
    })
}

impl Transfer {
    /// As a scenario wants it, of so many bytes moved.
    pub fn figures(&self, bytes: usize) -> Figures {
        let (gigabytes, seconds) = (bytes as f64 / 1e9, self.elapsed.as_secs_f64());
        let cpu = (self.send_cpu + self.receive_cpu).as_secs_f64() + self.kernel_cpu;
        Figures::from([
            ("total_seconds", seconds),
            ("gbit_per_second", gigabytes * 8.0 / seconds),
            ("cpu_seconds", cpu),
            ("cpu_seconds_per_gb", cpu / gigabytes),
        ])
    }
}

/// What one end of a connection took.
struct End {
    ended: Instant,
    /// User and system time of its thread.
    cpu: Duration,
}

fn connect(lab: &Lab, address: Ipv4Addr) -> Result<(TcpStream, TcpStream)> {
    let listener = lab.host(HostId::B).run_in(|| TcpListener::bind((address, 0)))??;
    let address = listener.local_addr()?;
    let client = lab.host(HostId::A).run_in(|| connect_to(address))??;
    let (server, _) = listener.accept()?;
    Ok((client, server))
}

/// Connects with the congestion control that lanes have: it decides on half of what a connection carries.
fn connect_to(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    let congestion = Congestion::choose(&socket, None)?;
    socket.connect(&address.into())?;
    congestion.settle(&socket);
    Ok(socket.into())
}

/// Makes the ring on its own thread, waits for all others, and does `work`. The socket goes with the ring, so that
/// the other end learns of an error.
fn run(
    socket: TcpStream,
    start: &Barrier,
    work: impl FnOnce(&mut SocketRing) -> std::io::Result<()>,
) -> Result<End> {
    let ring = SocketRing::new(socket);
    // Before the error is looked at: the others wait for everyone.
    start.wait();
    let mut ring = ring.context("making an io_uring")?;
    let before = thread_cpu();
    work(&mut ring)?;
    Ok(End { ended: Instant::now(), cpu: thread_cpu() - before })
}

fn send_all(ring: &mut SocketRing, share: &[u8]) -> std::io::Result<()> {
    for chunk in share.chunks(CHUNK_BYTES) {
        ring.send(chunk)?;
    }
    ring.receive(&mut [0])
}

fn receive_all(ring: &mut SocketRing, share: &mut [u8]) -> std::io::Result<()> {
    for chunk in share.chunks_mut(CHUNK_BYTES) {
        ring.receive(chunk)?;
    }
    ring.send(&[1])
}

fn collect(threads: Vec<ScopedJoinHandle<'_, Result<End>>>) -> Result<Vec<End>> {
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        .collect()
}

fn thread_cpu() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().expect("a thread has not run for a negative time")
}
