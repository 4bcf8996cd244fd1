//! The preflight finds out on both hosts what can be known before anything moves.

mod findings;
mod launch;
mod receive;
mod room;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::rc::Rc;
use std::time::Duration;

use memlane_api::units::Rate;
use memlane_guest::Guest;
use memlane_net::config::{PeerConfig, PortConfig};
use memlane_net::link::{Link, LinkError};
use memlane_net::port::{self, OpenError};
use memlane_net::task;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::{MAX_STATE_BYTES, MigrationId};
use memlane_protocol::wire::control::{Control, Offer, Port, Refusal, RefusalKind};
use memlane_protocol::wire::hello::{NAMES_PARTS, Purpose, Token};

use crate::context::Context;
use crate::lanes::LaneEnd;
use crate::routes::{Route, Routes};

pub use findings::{Estimate, Finding, PortCheck, Severity};
pub(crate) use receive::{receive, release};
pub use room::available_memory;

/// The destination's answer to an offer may take this long: it may have to start a VMM first.
const ANSWER: Duration = Duration::from_secs(90);

/// A plan is what a migration needs to begin.
pub(crate) struct Plan {
    /// This link goes to the destination, which has accepted.
    pub link: Link,
    /// These lanes are connected.
    pub lanes: Vec<LaneEnd>,
    /// More lanes can be opened on these routes.
    pub routes: Routes,
    /// This is the round trip between the ports.
    pub round_trip: Duration,
}

/// The findings of a preflight.
#[derive(Debug, Default)]
pub struct Findings {
    /// These are the findings, in the order in which they were looked at.
    pub findings: Vec<Finding>,
    /// These are the pairs of ports.
    pub ports: Vec<PortCheck>,
    /// This is what the move would take.
    pub estimate: Estimate,
}

/// The part of an order that the preflight needs.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    /// This identifies the migration.
    pub migration: MigrationId,
    /// If this is true, nothing is prepared for a move.
    pub check_only: bool,
    /// The ports must promise this many bits per second.
    pub min_bandwidth: u64,
}

/// A pair of ports that lanes can use.
pub(crate) struct Pair {
    /// This has the ports of this host and of the destination.
    pub route: Route,
    /// This is the round trip between them.
    pub round_trip: Duration,
}

/// Asks the destination, tries the ports, and opens the lanes unless this is only a check. Returns `None` if something
/// in `findings` forbids the move.
pub(crate) async fn send(
    context: &Rc<Context>,
    guest: &Guest,
    peer: &memlane_protocol::wire::Label,
    request: Request,
    findings: &mut Findings,
) -> Option<Plan> {
    findings.estimate = estimate(guest);
    look_at_source(guest, findings).await;
    if let Some(lacking) = lacking_descriptors(context).await {
        findings.add(Severity::Refused, "host", lacking.to_string(), None);
    }
    if !findings.refused() {
        look_at_state(guest, findings).await;
    }
    if findings.refused() && !request.check_only {
        return None;
    }
    let qemu = match guest.driver.look().await {
        Ok(qemu) => qemu,
        Err(error) => {
            findings.add(Severity::Refused, "vmm", error.to_string(), Some("look at its log"));
            return None;
        }
    };
    let offer = Offer {
        migration: request.migration,
        check_only: request.check_only,
        data_bytes: findings.estimate.data_bytes,
        shape: guest.shape.clone(),
        qemu: qemu.map(Box::new),
    };
    let (asked, mtu) = tokio::join!(ask(context, peer, offer, findings), try_control(context, peer));
    if let Some(swallowed) = mtu {
        findings.add(Severity::Refused, "host", swallowed.to_string(), Some(LOWER_MTU));
    }
    let (link, token, ports) = asked?;
    let pairs = try_ports(context, peer, &ports, findings).await;
    judge_bandwidth(&pairs, request.min_bandwidth, findings).await;
    if findings.refused() || request.check_only {
        return None;
    }
    let round_trip = pairs.iter().map(|pair| pair.round_trip).min().unwrap_or_default();
    let routes = Routes::new(context.clone(), peer.clone(), token, &ports);
    let lanes = open_lanes(&routes, &pairs, findings).await;
    (!findings.refused()).then_some(Plan { link, lanes, routes, round_trip })
}

/// Connects to the daemon of a peer, tries whether large packets arrive, and hangs up. It takes a few seconds at the most.
///
/// # Errors
///
/// Fails if the peer cannot be reached, refuses the connection, or does not get large packets.
pub async fn greet(context: &Context, peer: &PeerConfig) -> Result<(), OpenError> {
    let remote = peer.control;
    let address = if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // The way there is up to the kernel, as for the control connection itself.
    let name = "control".parse().expect("it has the form of a name");
    let (interface, speed, congestion_control) = (None, None, None);
    let any = PortConfig { name, interface, address, speed, lanes: 1, congestion_control };
    let caller = context.caller(&peer.name);
    task::aside(move || port::open(&any, remote, &caller, Purpose::Probe).map(drop)).await
}

impl Findings {
    /// Tells whether something forbids the move.
    pub fn refused(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Refused)
    }

    /// Returns everything that forbids the move, as one text.
    pub fn reasons(&self) -> String {
        let refused = self.findings.iter().filter(|finding| finding.severity == Severity::Refused);
        let texts: Vec<String> = refused
            .map(|finding| match &finding.remedy {
                Some(remedy) => format!("{}: {}; {remedy}", finding.what, finding.detail),
                None => format!("{}: {}", finding.what, finding.detail),
            })
            .collect();
        texts.join("\n")
    }

    fn add(&mut self, severity: Severity, what: impl Into<String>, detail: String, remedy: Option<&str>) {
        let remedy = remedy.map(str::to_owned);
        self.findings.push(Finding { severity, what: what.into(), detail, remedy });
    }
}

/// Finds what prevents the move on this host.
async fn look_at_source(guest: &Guest, findings: &mut Findings) {
    if let Err(lost) = guest.ram.check() {
        findings.add(Severity::Refused, "memory", lost.to_string(), Some("start the guest anew"));
    }
    match guest.driver.blockers().await {
        Ok(blockers) => {
            for blocker in blockers {
                findings.add(Severity::Refused, blocker.what, blocker.detail, blocker.remedy.as_deref());
            }
        }
        Err(error) => findings.add(Severity::Refused, "vmm", error.to_string(), Some("look at its log")),
    }
}

/// Finds out whether this daemon may open enough files for one more move.
async fn lacking_descriptors(context: &Rc<Context>) -> Option<room::NoRoom> {
    let lanes = context.settings.ports.iter().map(|port| u64::from(port.lanes)).sum();
    task::aside(move || room::lacking_descriptors(lanes)).await
}

/// Finds out how large the VMM's state is.
async fn look_at_state(guest: &Guest, findings: &mut Findings) {
    guest.state_bytes.set(guest.driver.state_bytes().await.ok().flatten());
    let bytes = guest.saved_bytes.get().or(guest.state_bytes.get());
    findings.estimate.state_bytes = bytes;
    if let Some(bytes) = bytes.filter(|bytes| *bytes > MAX_STATE_BYTES) {
        let (most, mib) = (MAX_STATE_BYTES >> 20, bytes >> 20);
        let detail =
            format!("the VMM's state may have {mib} MiB, and no more than {most} MiB of it can move");
        findings.add(Severity::Warning, "state", detail, Some("give the guest less video memory"));
    }
}

fn estimate(guest: &Guest) -> Estimate {
    Estimate {
        ram_bytes: guest.shape.ram_bytes(),
        data_bytes: guest.ram.allocated_bytes().unwrap_or(0),
        state_bytes: None,
        bytes_per_second: None,
        seconds: None,
    }
}

const LOWER_MTU: &str =
    "raise the MTU between the hosts, or lower that of the interfaces on both (ip link set dev ... mtu ...)";
const LOOK_AT_KEYS: &str = "compare what `memlanectl keys show` says on both hosts";

/// Says what to do about a destination that cannot be talked to, unless the error itself says it.
fn remedy(error: &LinkError) -> Option<&'static str> {
    match error {
        LinkError::Encryption { .. } | LinkError::Tls(_) => Some(LOOK_AT_KEYS),
        LinkError::Refused { .. } => None,
        _ => Some("see that memlaned runs there and that its control address can be reached from here"),
    }
}

/// Offers the guest to the destination.
async fn ask(
    context: &Rc<Context>,
    peer: &memlane_protocol::wire::Label,
    mut offer: Offer,
    findings: &mut Findings,
) -> Option<(Link, Token, Vec<Port>)> {
    let mut link = match context.connect(peer).await {
        Ok(Some(link)) => link,
        Ok(None) => {
            findings.add(Severity::Refused, "host", format!("{peer} is no peer of this host"), None);
            return None;
        }
        Err(error) => {
            findings.add(Severity::Refused, "host", format!("{peer}: {error}"), remedy(&error));
            return None;
        }
    };
    if let Some(qemu) = offer.qemu.as_mut().filter(|_| link.version() < NAMES_PARTS) {
        qemu.parts = Vec::new();
    }
    let answer = async {
        link.send(&Control::Offer(offer)).await?;
        link.receive().await
    };
    match tokio::time::timeout(ANSWER, answer).await {
        Ok(Ok(Control::Accept(accept))) => {
            findings.add(Severity::Ok, "destination", format!("{peer} can take the guest"), None);
            Some((link, accept.token, accept.ports))
        }
        Ok(Ok(Control::Refuse(refusals))) => {
            for Refusal { what, reason } in refusals {
                findings.add(Severity::Refused, what.name(), format!("{peer}: {reason}"), None);
            }
            None
        }
        Ok(Ok(other)) => {
            let detail = format!("{peer} answered the offer with `{}`", other.name());
            findings.add(Severity::Refused, "host", detail, Some("see that both run the same version"));
            None
        }
        Ok(Err(error)) => {
            findings.add(Severity::Refused, "host", format!("{peer}: {error}"), remedy(&error));
            None
        }
        Err(_) => {
            let detail = format!("{peer} did not answer the offer within {ANSWER:.0?}");
            findings.add(Severity::Refused, "host", detail, Some("look at its log"));
            None
        }
    }
}

/// Finds out whether large packets get to the address of the destination's daemon.
async fn try_control(context: &Rc<Context>, peer: &Label) -> Option<OpenError> {
    let tried = greet(context, context.peer(peer)?).await;
    // Whatever else is wrong, the control connection itself finds out.
    tried.err().filter(|error| matches!(error, OpenError::Mtu { .. }))
}

/// Connects each port of this host to the port of the same name there.
pub(crate) async fn try_ports(
    context: &Rc<Context>,
    peer: &Label,
    theirs: &[Port],
    findings: &mut Findings,
) -> Vec<Pair> {
    let mut pairs = Vec::new();
    let probes: Vec<_> = context
        .settings
        .ports
        .iter()
        .map(|ours| {
            let there = theirs.iter().find(|port| port.name == ours.name).cloned();
            let (ours, caller) = (ours.clone(), context.caller(peer));
            tokio::task::spawn_blocking(move || {
                let opened =
                    there.as_ref().map(|there| port::open(&ours, there.address, &caller, Purpose::Probe));
                (ours, there, opened)
            })
        })
        .collect();
    for probe in probes {
        let (ours, there, opened) = probe.await.expect("a probe does not panic");
        let mut check = PortCheck { port: ours.name.to_string(), ..PortCheck::default() };
        let what = format!("port {}", ours.name);
        match (there, opened) {
            (Some(there), Some(Ok(opened))) => {
                check.peer_port = there.name.to_string();
                check.reachable = true;
                check.round_trip_seconds = Some(opened.round_trip.as_secs_f64());
                findings.add(Severity::Ok, what, format!("{} answers", there.address), None);
                let route = Route { port: ours, there };
                pairs.push(Pair { route, round_trip: opened.round_trip });
            }
            (Some(there), Some(Err(error))) => {
                check.peer_port = there.name.to_string();
                let remedy = match error {
                    OpenError::Failed { .. } => Some("look at the cabling, the address and the firewall"),
                    OpenError::Mtu { .. } => Some(LOWER_MTU),
                    OpenError::Encryption { .. } => Some(LOOK_AT_KEYS),
                    OpenError::Refused { .. } => None,
                };
                findings.add(Severity::Warning, what, error.to_string(), remedy);
            }
            _ => {
                let detail = "the destination has no port of this name".to_owned();
                findings.add(
                    Severity::Warning,
                    what,
                    detail,
                    Some("give ports of one network one name on both hosts"),
                );
            }
        }
        findings.ports.push(check);
    }
    if pairs.is_empty() {
        let of_ports = findings.findings.iter().filter(|finding| finding.severity == Severity::Warning);
        let why: Vec<String> =
            of_ports.map(|finding| format!("{}: {}", finding.what, finding.detail)).collect();
        let detail = format!("no port reaches its counterpart at the destination ({})", why.join("; "));
        let remedy = "see `memlanectl ports` on both hosts";
        findings.add(Severity::Refused, RefusalKind::Port.name(), detail, Some(remedy));
    }
    pairs
}

/// Checks that the ports promise what is asked, as far as their speeds are known.
async fn judge_bandwidth(pairs: &[Pair], min_bandwidth: u64, findings: &mut Findings) {
    let ports: Vec<_> = pairs.iter().map(|pair| pair.route.port.clone()).collect();
    let total = task::aside(move || ports.iter().map(speed).sum::<Option<u64>>()).await;
    let Some(total) = total.filter(|_| !pairs.is_empty()) else { return };
    findings.estimate.bytes_per_second = Some(total as f64 / 8.0);
    findings.estimate.seconds = Some(findings.estimate.data_bytes as f64 * 8.0 / total as f64);
    let (total, least) = (Rate(total), Rate(min_bandwidth));
    if total.0 < least.0 {
        let detail = format!("the ports carry {total} together, and at least {least} is asked for");
        let remedy = "add ports, or lower limits.min_bandwidth or the order's --min-bandwidth";
        findings.add(Severity::Refused, RefusalKind::Bandwidth.name(), detail, Some(remedy));
    } else {
        findings.add(
            Severity::Ok,
            RefusalKind::Bandwidth.name(),
            format!("{total} on {} ports", pairs.len()),
            None,
        );
    }
}

/// Returns the speed of a port in bits per second, as configured or as its interface says. Asking the interface may
/// block.
pub fn speed(port: &PortConfig) -> Option<u64> {
    let reported = || port.interface.as_deref().and_then(|interface| port::interface_state(interface).1);
    port.speed.map(|speed| speed.0).or_else(reported)
}

/// Opens lanes between all pairs of ports.
pub(crate) async fn open_lanes(routes: &Routes, pairs: &[Pair], findings: &mut Findings) -> Vec<LaneEnd> {
    let each = pairs.iter().flat_map(|pair| (0..pair.route.lanes()).map(|_| routes.open(&pair.route)));
    // All at once, before any of them is waited for.
    let opening: Vec<_> = each.flatten().collect();
    let mut lanes = Vec::new();
    for lane in opening {
        match lane.await {
            Ok(lane) => lanes.push(lane),
            Err(error) => findings.add(Severity::Warning, "lane", error.to_string(), None),
        }
    }
    if lanes.is_empty() {
        findings.add(Severity::Refused, RefusalKind::Port.name(), "no lane could be opened".into(), None);
    }
    lanes
}
