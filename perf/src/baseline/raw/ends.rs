//! The two ends of a connection: a thread with a ring at each, which only sends or receives.

use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memlane_net::port::congestion::Congestion;
use rustix::time::{ClockId, clock_gettime};
use socket2::{Domain, Socket, Type};

use crate::baseline::ring::SocketRing;

/// The number of bytes that one send or receive moves, about as many as a lane submits at once.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// The time for which the kernel's threads are measured while nothing moves.
pub(super) const IDLE: Duration = Duration::from_secs(1);

/// The time that one end of a connection took.
pub(super) struct ConnectionEnd {
    /// The moment when its last byte had been moved.
    pub(super) ended: Instant,
    /// The user and system time of its thread.
    pub(super) cpu: Duration,
}

/// Connects with the congestion control that lanes have, because it largely decides what a connection carries.
pub(super) fn connect_to(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    let congestion = Congestion::choose(&socket, None)?;
    socket.connect(&address.into())?;
    congestion.settle(&socket);
    Ok(socket.into())
}

/// Makes the ring on its own thread, waits for all others, and does `work`. The socket goes with the ring, so that
/// the other end learns of an error.
pub(super) fn run(
    socket: TcpStream,
    start: &Barrier,
    work: impl FnOnce(&mut SocketRing) -> std::io::Result<()>,
) -> Result<ConnectionEnd> {
    let ring = SocketRing::new(socket);
    // Before the error is looked at: the others wait for everyone.
    start.wait();
    let mut ring = ring.context("making an io_uring")?;
    let before = thread_cpu();
    work(&mut ring)?;
    Ok(ConnectionEnd { ended: Instant::now(), cpu: thread_cpu() - before })
}

pub(super) fn send_all(ring: &mut SocketRing, share: &[u8]) -> std::io::Result<()> {
    for chunk in share.chunks(CHUNK_BYTES) {
        ring.send(chunk)?;
    }
    ring.receive(&mut [0])
}

pub(super) fn receive_all(ring: &mut SocketRing, share: &mut [u8]) -> std::io::Result<()> {
    for chunk in share.chunks_mut(CHUNK_BYTES) {
        ring.receive(chunk)?;
    }
    ring.send(&[1])
}

pub(super) fn collect(
    threads: Vec<ScopedJoinHandle<'_, Result<ConnectionEnd>>>,
) -> Result<Vec<ConnectionEnd>> {
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        .collect()
}

fn thread_cpu() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().expect("a thread has not run for a negative time")
}
