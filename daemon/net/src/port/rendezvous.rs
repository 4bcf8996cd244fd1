//! Lanes of other hosts arrive here and are handed to the migration that they belong to.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use memlane_protocol::wire::Label;
use memlane_protocol::wire::hello::{Hello, Purpose, Token};
use memlane_tls::Records;
use tokio::sync::mpsc;
use tokio_uring::net::{TcpListener, TcpStream};
use tracing::warn;

use super::connection_limiter::ConnectionLimiter;
use crate::channel::Protection;
use crate::config::PeerConfig;
use crate::link::{Greeted, LinkError, answer_greeting};
use crate::task;

/// A lane that a source has opened to this host.
pub struct ArrivedLane {
    /// The lane arrived at this port.
    pub port: Label,
    /// This is what it carries.
    pub kind: LaneKind,
    /// This is the connected socket.
    pub socket: OwnedFd,
    /// This seals and opens the bytes of the lane. It is `None` if the lane is not encrypted.
    pub records: Option<Box<Records>>,
    /// This is the source's address.
    pub remote: SocketAddr,
}

/// The purpose of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneKind {
    /// The lane of this number carries pages.
    Pages(u16),
    /// The lane carries pages that a guest waits for, and nothing else.
    Faults,
    /// The lane of this number carries the state of the VMM.
    State(u16),
}

/// Knows which migrations await lanes, and from which addresses lanes may come.
pub struct Rendezvous {
    limiter: Rc<ConnectionLimiter>,
    protection: Protection,
    /// These are the addresses of the peers' daemons.
    daemons: Vec<IpAddr>,
    /// Each peer has said that its lanes come from these addresses.
    lanes: RefCell<HashMap<Label, Vec<IpAddr>>>,
    awaited: RefCell<HashMap<Token, Awaited>>,
}

/// A migration that awaits lanes.
struct Awaited {
    /// The migration is with this host.
    peer: Label,
    /// Lanes of these numbers have come. No number comes twice.
    come: BTreeSet<u16>,
    sender: mpsc::Sender<ArrivedLane>,
}

/// A connection to a port was refused. The other host is told the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum LaneRefusal {
    /// The token belongs to no migration that awaits lanes.
    #[error("no migration here awaits this lane")]
    NotAwaited,
    /// The lane comes from a host or an address that the migration does not involve.
    #[error("this lane comes from {host} at {address}, and the migration is with another")]
    OtherHost {
        /// This is the host that the lane says it is from.
        host: Label,
        /// This is the address that the lane comes from.
        address: IpAddr,
    },
    /// The migration already has a lane of this number.
    #[error("lane {0} of this migration has come already")]
    SecondTime(u16),
    /// The connection is a control connection, and this port takes lanes only.
    #[error("this is a port for lanes; the control port is another")]
    Control,
}

impl Rendezvous {
    /// Makes a rendezvous for lanes of these peers, which are protected so.
    pub fn with(peers: &[PeerConfig], protection: Protection) -> Self {
        let daemons = peers.iter().map(|peer| peer.control.ip().to_canonical()).collect();
        let (limiter, lanes, awaited) = Default::default();
        Self { limiter, protection, daemons, lanes, awaited }
    }

    /// Notes the addresses that a peer says its lanes come from, in place of those that it said before.
    pub fn note_addresses(&self, peer: Label, addresses: Vec<IpAddr>) {
        self.lanes.borrow_mut().insert(peer, addresses);
    }

    /// Returns a receiver that gets the lanes of `peer` that say `token`, until it is dropped. It holds `most` lanes.
    pub fn await_lanes(&self, token: Token, peer: Label, most: usize) -> mpsc::Receiver<ArrivedLane> {
        let (sender, receiver) = mpsc::channel(most.max(1));
        let mut awaited = self.awaited.borrow_mut();
        awaited.retain(|_, awaited| !awaited.sender.is_closed());
        awaited.insert(token, Awaited { peer, come: BTreeSet::new(), sender });
        receiver
    }

    /// Tells whether this is an address of a known host.
    fn knows(&self, address: IpAddr) -> bool {
        self.daemons.contains(&address)
            || self.lanes.borrow().values().any(|addresses| addresses.contains(&address))
    }

    /// Decides whether a lane may come in: it must belong to the host that the migration is with, and be the first of
    /// its number.
    fn admit(
        &self,
        hello: &Hello,
        token: &Token,
        number: Option<u16>,
        from: IpAddr,
    ) -> Result<(), LaneRefusal> {
        let mut awaited = self.awaited.borrow_mut();
        let found = awaited.get_mut(token).filter(|awaited| !awaited.sender.is_closed());
        let awaited = found.ok_or(LaneRefusal::NotAwaited)?;
        let lanes = self.lanes.borrow();
        let is_of_peer = lanes.get(&awaited.peer).is_some_and(|addresses| addresses.contains(&from));
        if awaited.peer != hello.host || !is_of_peer {
            let found = format!("{} at {from}", hello.host);
            warn!(peer = %awaited.peer, found, "refused a lane that knows the token of another's migration");
            return Err(LaneRefusal::OtherHost { host: hello.host.clone(), address: from });
        }
        match number {
            Some(number) if !awaited.come.insert(number) => Err(LaneRefusal::SecondTime(number)),
            _ => Ok(()),
        }
    }

    fn sender(&self, token: &Token) -> Option<mpsc::Sender<ArrivedLane>> {
        self.awaited.borrow().get(token).map(|awaited| awaited.sender.clone())
    }
}

/// Accepts lanes and answers probes on one port, for as long as the daemon runs.
pub async fn serve(listener: TcpListener, port: Label, rendezvous: Rc<Rendezvous>) {
    loop {
        match listener.accept().await {
            Ok((_, remote)) if !rendezvous.knows(remote.ip().to_canonical()) => {
                rendezvous.limiter.turned_away(remote.ip().to_canonical(), port.as_str());
            }
            Ok((stream, remote)) => {
                let (port, rendezvous, stream) = (port.clone(), rendezvous.clone(), Rc::new(stream));
                let slot = rendezvous.limiter.enter(remote.ip().to_canonical(), &stream);
                task::spawn("lane connection", async move {
                    if let Err(error) = take_in(&stream, remote, port, &rendezvous).await {
                        rendezvous.limiter.came_to_nothing(remote.ip().to_canonical(), &error);
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                let error = memlane_kvm::descriptors::explain(error);
                warn!(%port, %error, "cannot accept a connection on this port");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn take_in(
    stream: &Rc<TcpStream>,
    remote: SocketAddr,
    port: Label,
    rendezvous: &Rendezvous,
) -> Result<(), LinkError> {
    stream.set_nodelay(true)?;
    let from = remote.ip().to_canonical();
    let greeted = answer_greeting(stream, &rendezvous.protection, |hello| match hello.purpose {
        Purpose::Probe => Ok(()),
        Purpose::Lane { token, lane } => rendezvous.admit(hello, &token, Some(lane), from),
        Purpose::Faults { token } | Purpose::State { token, .. } => {
            rendezvous.admit(hello, &token, None, from)
        }
        Purpose::Control => Err(LaneRefusal::Control),
    });
    let Greeted { hello, channel, .. } = greeted.await?;
    let (token, kind) = match hello.purpose {
        Purpose::Lane { token, lane } => (token, LaneKind::Pages(lane)),
        Purpose::Faults { token } => (token, LaneKind::Faults),
        Purpose::State { token, lane } => (token, LaneKind::State(lane)),
        Purpose::Probe | Purpose::Control => return Ok(()),
    };
    if let Some(migration) = rendezvous.sender(&token) {
        // SAFETY: the stream is open here, and its descriptor is duplicated before it closes.
        let fd = unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) };
        let socket = fd.try_clone_to_owned()?;
        // More lanes than were agreed upon are dropped, and so closed.
        let records = channel.into_records()?;
        let _ = migration.try_send(ArrivedLane { port, kind, socket, records, remote });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(host: &str) -> Hello {
        Hello { oldest: 1, newest: 1, host: host.parse().unwrap(), purpose: Purpose::Probe }
    }

    #[test]
    fn a_lane_comes_once_and_from_the_host_that_the_migration_is_with() {
        let [a, b, daemon, stranger]: [IpAddr; 4] = [1, 2, 3, 4].map(|last| IpAddr::from([10, 0, 0, last]));
        let peer = PeerConfig {
            name: "host-a".parse().unwrap(),
            control: (daemon, 7410).into(),
            may_start_guests: false,
            ca: None,
        };
        let rendezvous = Rendezvous::with(&[peer], Protection::default());
        assert!(rendezvous.knows(daemon) && !rendezvous.knows(a));
        rendezvous.note_addresses("host-a".parse().unwrap(), vec![a]);
        rendezvous.note_addresses("host-b".parse().unwrap(), vec![b]);
        assert!(rendezvous.knows(a) && rendezvous.knows(b) && !rendezvous.knows(stranger));

        let token = [7; 16];
        let lanes = rendezvous.await_lanes(token, "host-a".parse().unwrap(), 8);
        let admit = |host: &str, token, number, from| rendezvous.admit(&hello(host), &token, number, from);
        assert_eq!(admit("host-a", [8; 16], Some(0), a), Err(LaneRefusal::NotAwaited));
        for (host, from) in [("host-b", b), ("host-a", b), ("host-b", a), ("host-a", daemon)] {
            for number in [Some(0), None] {
                let error = admit(host, token, number, from).unwrap_err();
                assert!(matches!(error, LaneRefusal::OtherHost { .. }), "{error}");
            }
        }
        assert_eq!(admit("host-a", token, Some(0), a), Ok(()));
        assert_eq!(admit("host-a", token, Some(0), a), Err(LaneRefusal::SecondTime(0)));
        assert_eq!(admit("host-a", token, Some(u16::MAX), a), Ok(()));
        assert_eq!(admit("host-a", token, None, a), Ok(()));
        // Somewhere else from now on.
        rendezvous.note_addresses("host-a".parse().unwrap(), vec![daemon]);
        assert!(!rendezvous.knows(a) && admit("host-a", token, Some(1), a).is_err());
        assert_eq!(admit("host-a", token, Some(1), daemon), Ok(()));
        drop(lanes);
        assert_eq!(admit("host-a", token, Some(2), daemon), Err(LaneRefusal::NotAwaited));
    }
}
