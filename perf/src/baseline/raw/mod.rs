//! The raw limit: how fast sockets carry data from shared memory to shared memory when nothing else is done.
//!
//! One connection is what a lane is, a thread and a ring at either end and the same congestion control, without pages
//! to track, frames to write or acknowledgements to wait for. What Memlane loses against this, it loses by its own
//! doing.

mod ends;
mod remote;
mod report;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Barrier;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use memlane_lab::{HostId, Lab};

use crate::baseline::memory::{MemoryState, SharedMemory, warm_up};
use crate::baseline::rpc;
use crate::cpu::Meter;
use ends::{CHUNK_BYTES, IDLE, collect, connect_to, receive_all, run, send_all};

pub use remote::RawAgent;
pub use report::{RawOptions, RawReport, Transfer};

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

fn connect(lab: &Lab, address: Ipv4Addr) -> Result<(TcpStream, TcpStream)> {
    let listener = lab.host(HostId::B).run_in(|| TcpListener::bind((address, 0)))??;
    let address = listener.local_addr()?;
    let client = lab.host(HostId::A).run_in(|| connect_to(address))??;
    let (server, _) = listener.accept()?;
    Ok((client, server))
}
