//! The raw limit between two hosts that are reached over ssh: an agent on each does one end of it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memlane_lab::{HostId, Lab, Remote};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ends::{CHUNK_BYTES, ConnectionEnd, IDLE, collect, connect_to, receive_all, run, send_all};
use super::report::Transfer;
use crate::baseline::memory::{MemoryState, SharedMemory};
use crate::cpu::Meter;

const LISTEN: &str = "raw-listen";
const RECEIVE: &str = "raw-receive";
const SEND: &str = "raw-send";
/// The largest number of connections that an agent makes.
const MOST: usize = 1024;
/// The longest wait for a connection: the other end makes memory first.
const PATIENCE: Timespec = Timespec { tv_sec: 120, tv_nsec: 0 };

/// The state that an agent keeps between orders: where it listens, and the memory that it receives into.
#[derive(Debug, Default)]
pub struct RawAgent(Option<(Vec<TcpListener>, SharedMemory)>);

#[derive(Serialize, Deserialize)]
struct Listen {
    /// The addresses to listen at, one for each connection.
    addresses: Vec<Ipv4Addr>,
    bytes: usize,
    memory: MemoryState,
}

#[derive(Serialize, Deserialize)]
struct Send {
    to: Vec<SocketAddr>,
    bytes: usize,
}

/// The figures that one end reports.
#[derive(Serialize, Deserialize)]
struct Told {
    /// The seconds from the first send to the last acknowledgement. Only the sender reports them.
    seconds: f64,
    /// The processor seconds of the end's threads.
    cpu_seconds: f64,
}

/// Moves so many bytes as [`transfer`](super::transfer) does. The sender makes their contents itself.
pub(super) fn transfer(
    lab: &Lab,
    bytes: usize,
    connections_per_port: usize,
    memory: MemoryState,
) -> Result<Transfer> {
    let [source, destination] =
        [HostId::A, HostId::B].map(|id| lab.host(id).remote().context("the host is one of the harness's"));
    let (source, destination): (&Arc<Remote>, &Arc<Remote>) = (source?, destination?);
    let ports = lab.host(HostId::B).ports().iter().map(|port| port.address);
    let count = ports.len() * connections_per_port;
    let listen = Listen { addresses: ports.cycle().take(count).collect(), bytes, memory };
    let to = destination.ask(LISTEN, json!(listen)).context("preparing to receive")?;
    let send = Send { to: serde_json::from_value(to)?, bytes };

    let mut kernel = Meter::on(lab, [])?;
    let idle = kernel.idle(IDLE);
    let before = kernel.read();
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| destination.ask(RECEIVE, json!({})));
        let sent = source.ask(SEND, json!(send));
        (sent, receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let used = kernel.read().since(&before);
    let sent: Told = serde_json::from_value(sent.context("sending")?)?;
    let received: Told = serde_json::from_value(received.context("receiving")?)?;
    let seconds =
        |seconds: f64| Duration::try_from_secs_f64(seconds).context("the agent reports an impossible time");
    Ok(Transfer {
        elapsed: seconds(sent.seconds)?,
        send_cpu: seconds(sent.cpu_seconds)?,
        receive_cpu: seconds(received.cpu_seconds)?,
        kernel_cpu: used.beyond(&idle),
    })
}

impl RawAgent {
    /// Answers the orders of this file for an agent; returns `None` for other orders.
    pub fn carry_out(&mut self, name: &str, order: &Value) -> Option<Result<Value>> {
        Some(match name {
            LISTEN => Listen::deserialize(order).context("an order").and_then(|order| self.listen(&order)),
            RECEIVE => self.receive(),
            SEND => Send::deserialize(order).context("an order").and_then(|order| send_to(&order)),
            _ => return None,
        })
    }

    fn listen(&mut self, order: &Listen) -> Result<Value> {
        check(order.addresses.len(), order.bytes)?;
        let memory = SharedMemory::new(order.bytes, order.memory)?;
        let listener = |address: &Ipv4Addr| {
            TcpListener::bind((*address, 0)).with_context(|| format!("listening at {address}"))
        };
        let listeners: Vec<TcpListener> = order.addresses.iter().map(listener).collect::<Result<_>>()?;
        let at: Vec<SocketAddr> =
            listeners.iter().map(TcpListener::local_addr).collect::<std::io::Result<_>>()?;
        self.0 = Some((listeners, memory));
        Ok(json!(at))
    }

    fn receive(&mut self) -> Result<Value> {
        let (listeners, mut memory) = self.0.take().context("nothing was prepared to receive")?;
        let sockets: Vec<TcpStream> = listeners.iter().map(accept).collect::<Result<_>>()?;
        let share = memory.len().div_ceil(sockets.len());
        let start = Barrier::new(sockets.len() + 1);
        let ends = std::thread::scope(|scope| {
            let (start, shares) = (&start, memory.chunks_mut(share));
            let receiver =
                |(socket, to)| scope.spawn(move || run(socket, start, |ring| receive_all(ring, to)));
            let receivers = sockets.into_iter().zip(shares).map(receiver).collect();
            start.wait();
            collect(receivers)
        })?;
        ensure!(
            *memory == *SharedMemory::with_pattern(memory.len())?,
            "the bytes received differ from those sent"
        );
        Ok(json!(Told { seconds: 0.0, cpu_seconds: cpu_seconds(&ends) }))
    }
}

fn send_to(order: &Send) -> Result<Value> {
    check(order.to.len(), order.bytes)?;
    let source = SharedMemory::with_pattern(order.bytes)?;
    let connect = |to: &SocketAddr| connect_to(*to).with_context(|| format!("connecting to {to}"));
    let sockets: Vec<TcpStream> = order.to.iter().map(connect).collect::<Result<_>>()?;
    let share = source.len().div_ceil(sockets.len());
    let start = Barrier::new(sockets.len() + 1);
    let (started, ends) = std::thread::scope(|scope| {
        let (start, shares) = (&start, source.chunks(share));
        let sender = |(socket, from)| scope.spawn(move || run(socket, start, |ring| send_all(ring, from)));
        let senders = sockets.into_iter().zip(shares).map(sender).collect();
        start.wait();
        (Instant::now(), collect(senders))
    });
    let ends = ends?;
    let ended = ends.iter().map(|end| end.ended).max().context("there is no connection")?;
    Ok(json!(Told { seconds: (ended - started).as_secs_f64(), cpu_seconds: cpu_seconds(&ends) }))
}

fn check(connections: usize, bytes: usize) -> Result<()> {
    ensure!(
        (1..=MOST).contains(&connections),
        "{connections} connections are not possible; ask for 1 to {MOST}"
    );
    ensure!(bytes / connections >= CHUNK_BYTES, "{bytes} bytes are too few for {connections} connections");
    Ok(())
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&PATIENCE))? {
        0 => bail!("no sender has connected for {} s", PATIENCE.tv_sec),
        _ => Ok(listener.accept()?.0),
    }
}

fn cpu_seconds(ends: &[ConnectionEnd]) -> f64 {
    ends.iter().map(|end| end.cpu.as_secs_f64()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_agents_move_bytes() {
        let mut receiver = RawAgent::default();
        let bytes = 4 * CHUNK_BYTES;
        let listen = Listen { addresses: vec![Ipv4Addr::LOCALHOST; 2], bytes, memory: MemoryState::Fresh };
        let at = receiver.carry_out(LISTEN, &json!(listen)).expect("an order").expect("listeners");
        let send = json!({ "to": at, "bytes": bytes });
        let sender = std::thread::spawn(move || RawAgent::default().carry_out(SEND, &send));
        receiver.carry_out(RECEIVE, &Value::Null).expect("an order").expect("all bytes");
        let told = sender.join().expect("no panic").expect("an order").expect("all bytes");
        assert!(told["seconds"].as_f64() > Some(0.0), "{told}");
        assert!(receiver.carry_out("fly", &Value::Null).is_none());
    }

    #[test]
    fn orders_that_cannot_be_carried_out_are_refused() {
        let mut receiver = RawAgent::default();
        for (name, order) in [
            (RECEIVE, json!({})),
            (SEND, json!({ "to": [], "bytes": 1 << 20 })),
            (SEND, json!({ "to": ["127.0.0.1:1"], "bytes": 1 })),
            (LISTEN, json!({ "addresses": ["192.0.2.1"], "bytes": 1 << 20, "memory": "fresh" })),
            (LISTEN, json!({ "addresses": "all" })),
        ] {
            assert!(receiver.carry_out(name, &order).expect("an order").is_err(), "{name} {order}");
        }
    }
}
