//! The control port, where other daemons connect to offer guests and to ask about handovers in doubt.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use memlane_net::link::{Greeted, Link, LinkError, answer_greeting};
use memlane_net::port::{ConnectionLimiter, ConnectionSlot};
use memlane_net::task;
use memlane_protocol::wire::control::Control;
use memlane_protocol::wire::hello::{Hello, Purpose};
use tokio_uring::net::{TcpListener, TcpStream};
use tracing::warn;

use crate::host::Host;

/// A daemon that connects must send its first message within this time.
const PATIENCE: Duration = Duration::from_secs(5);

/// Accepts connections of other daemons for as long as this one runs.
pub(crate) async fn serve(listener: TcpListener, host: Rc<Host>) {
    let limiter = Rc::<ConnectionLimiter>::default();
    let is_peer = |address: IpAddr| host.config.peers.iter().any(|peer| same(peer.control.ip(), address));
    loop {
        match listener.accept().await {
            Ok((_, remote)) if !is_peer(remote.ip()) => limiter.turned_away(remote.ip(), "the control port"),
            Ok((stream, remote)) => {
                let (host, limiter, stream) = (host.clone(), limiter.clone(), Rc::new(stream));
                let slot = limiter.enter(remote.ip(), &stream);
                task::spawn("control connection", async move {
                    if let Err(error) = serve_connection(stream, remote, &host, slot).await {
                        limiter.came_to_nothing(remote.ip(), &error);
                    }
                });
            }
            Err(error) => {
                let error = memlane_kvm::descriptors::explain(error);
                warn!(%error, "cannot accept a control connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn same(one: IpAddr, other: IpAddr) -> bool {
    one.to_canonical() == other.to_canonical()
}

async fn serve_connection(
    stream: Rc<TcpStream>,
    remote: SocketAddr,
    host: &Rc<Host>,
    mut slot: ConnectionSlot,
) -> Result<(), LinkError> {
    stream.set_nodelay(true)?;
    let judge = |hello: &Hello| admit(host, hello, remote);
    let Greeted { hello, version, channel } = answer_greeting(&stream, &host.protection, judge).await?;
    if hello.purpose == Purpose::Probe {
        return Ok(());
    }
    let mut link = Link::over(channel, version, host.config.limits.silence);
    let first = async {
        let mut first = link.receive().await?;
        if let Control::LanesFrom(addresses) = first {
            host.context().rendezvous.note_addresses(hello.host.clone(), addresses);
            first = link.receive().await?;
        }
        Ok(first)
    };
    let first = tokio::time::timeout(PATIENCE, first).await;
    let first = first.unwrap_or(Err(LinkError::Silent(PATIENCE)))?;
    // Questions about a handover are short, and must be answered no matter how many guests are on their way. A link that
    // serves a migration is bounded by that migration's queue.
    if matches!(first, Control::Offer(_) | Control::Resume { .. }) && !slot.stay() {
        return Err(LinkError::Crowd);
    }
    match first {
        Control::Offer(offer) => host.migrate.take_offer(hello.host, link, offer).await,
        Control::Handover { migration, message, reason, .. } => {
            let word = (message, reason);
            if let Some((message, reason)) = host.migrate.answer(&hello.host, migration, word).await {
                link.send(&Control::Handover { migration, message, nanoseconds: 0, reason }).await?;
                link.until_closed().await;
            }
        }
        Control::Resume { migration, received } => {
            host.migrate.resume(&hello.host, &migration, link, received);
        }
        Control::Fetch(migration) => host.migrate.serve(&hello.host, &migration, link),
        other => return Err(LinkError::Unexpected { expected: "an offer", found: other.name() }),
    }
    Ok(())
}

/// Decides whether the daemon that sends this hello is a peer.
///
/// # Errors
///
/// Fails with the reason, for the other daemon's log.
fn admit(host: &Host, hello: &Hello, remote: SocketAddr) -> Result<(), String> {
    if matches!(hello.purpose, Purpose::Lane { .. } | Purpose::Faults { .. } | Purpose::State { .. }) {
        return Err("this is the control port; lanes go to the addresses that were offered".into());
    }
    let Some(peer) = host.context().peer(&hello.host) else {
        return Err(format!("{} is no peer of {}; add it there as [[peer]]", hello.host, host.config.host));
    };
    if !same(peer.control.ip(), remote.ip()) {
        let (found, expected) = (remote.ip(), peer.control.ip());
        return Err(format!(
            "{} connects from {found}, but {} knows it at {expected}; check the control address of its [[peer]] there",
            hello.host, host.config.host
        ));
    }
    Ok(())
}
