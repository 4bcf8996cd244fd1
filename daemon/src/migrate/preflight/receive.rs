//! What the destination looks at before it accepts a guest.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::rc::Rc;

use memlane_kvm::compat;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::Standing;
use memlane_protocol::wire::control::{MAX_REFUSALS, Offer, Port, Refusal, Respect};
use tracing::warn;

use super::summon;
use crate::guest::{Guest, qemu};
use crate::host::Host;
use crate::port;
use crate::task;

/// Whether an offered guest can come: the VMM that waits for it, which the migration then has
/// for itself, or everything that is wrong. A guest in QEMU may bring what its QEMU here is
/// started from.
pub async fn receive(host: &Rc<Host>, peer: &Label, offer: &Offer) -> Result<Rc<Guest>, Vec<Refusal>> {
    let name = &offer.shape.name;
    let refused = |what, reason: String| Err(vec![Refusal { what, reason }]);
    let guest = match host.guest(name) {
        Some(guest) if guest.is_moving() => {
            return refused(
                Respect::Busy,
                format!("guest {name} is moving already; wait until that has ended"),
            );
        }
        Some(guest) if guest.standing.get() != Standing::Incoming => {
            return refused(
                Respect::Busy,
                format!("a guest named {name} is here already; names must be unique"),
            );
        }
        Some(guest) => guest,
        None => match summon::summon(host, peer, offer).await {
            Ok(guest) => guest,
            Err(refusals) => return Err(shorten(refusals)),
        },
    };
    // Taken before anything else is awaited, so that no second offer can take it too.
    guest.migration.replace(Some(offer.migration));
    let mut refusals = judge(host, offer, &guest).await;
    if !matches!(guest.driver.awaits().await, Ok(true)) {
        let reason = format!("the VMM named {name} does not wait for a guest any more; start it anew");
        refusals.push(Refusal { what: Respect::Receiver, reason });
    }
    if refusals.is_empty()
        && !offer.check_only
        && let Err(error) = guest.driver.get_ready().await
    {
        let reason = format!("the VMM named {name} cannot be made ready: {error}; look at its log there");
        refusals.push(Refusal { what: Respect::Receiver, reason });
    }
    if refusals.is_empty() {
        return Ok(guest);
    }
    release(&guest, offer).await;
    Err(shorten(refusals))
}

/// Frees a guest that does not come after all, and ends its VMM if it was started for that only.
pub async fn release(guest: &Guest, offer: &Offer) {
    if !guest.summoned.get() {
        guest.driver.stand_down().await;
    } else if let Err(error) = guest.driver.discard().await {
        warn!(guest = %guest.shape.name, %error, "cannot end the VMM that was started for a guest");
    }
    guest.migration.borrow_mut().take_if(|migration| *migration == offer.migration);
}

/// Compares what is offered with what waits for it, and with this host.
async fn judge(host: &Rc<Host>, offer: &Offer, guest: &Guest) -> Vec<Refusal> {
    let refusal = |what, reason: String| Refusal { what, reason };
    let mut refusals = Vec::new();
    for reason in compat::check(&offer.shape, &guest.shape) {
        refusals.push(refusal(Respect::Machine, reason.to_string()));
    }
    if let (Some(theirs), Some(ours)) = (&offer.qemu, guest.driver.qemu()) {
        refusals.extend(qemu::differences(theirs, ours));
    }
    if let Err(lost) = guest.ram.check() {
        let reason = format!("{lost}; start the VMM that waits for the guest anew");
        refusals.push(refusal(Respect::Memory, reason));
    }
    let (available, bridges) = (task::aside(available_memory), host.bridges_there());
    let (available, bridges) = tokio::join!(available, bridges);
    if let Some(reason) = available.and_then(|available| memory_missing(host, offer, guest, available)) {
        refusals.push(refusal(Respect::Memory, reason));
    }
    for nic in &offer.shape.nics {
        if let Some(reason) = host.network_missing(&nic.network, &bridges) {
            refusals.push(refusal(Respect::Network, reason));
        }
    }
    if host.offered_ports().is_empty() {
        let unknown = host.config.ports.iter().find_map(|port| port::holds(port.address).err());
        refusals.push(match unknown {
            Some(error) => refusal(Respect::Host, error.to_string()),
            None => {
                let reason = "no port of this host is up; see `memlanectl ports` there".to_owned();
                refusal(Respect::Port, reason)
            }
        });
    }
    refusals
}

/// What fits into one answer: a VMM of another kind may differ in hundreds of registers.
fn shorten(mut refusals: Vec<Refusal>) -> Vec<Refusal> {
    if refusals.len() > MAX_REFUSALS {
        // One of each respect first, so that the cut leaves something of all of them.
        let mut seen = HashSet::new();
        refusals.sort_by_cached_key(|refusal| !seen.insert(refusal.what));
        let left_out = refusals.len() - (MAX_REFUSALS - 1);
        refusals.truncate(MAX_REFUSALS - 1);
        refusals.push(Refusal { what: Respect::Machine, reason: format!("and {left_out} more") });
    }
    refusals
}

/// Why this host's memory does not do, if it does not.
fn memory_missing(host: &Host, offer: &Offer, guest: &Guest, available: u64) -> Option<String> {
    let held = guest.ram.held_bytes().unwrap_or(0);
    // A VMM on huge pages has reserved them; one whose memory is touched holds it.
    let huge = guest.shape.regions.iter().any(|region| u64::from(region.page_bytes) != PAGE_SIZE);
    let wanted = if huge { 0 } else { offer.data_bytes.saturating_sub(held) };
    let reserve = host.config.limits.memory_reserve.0;
    (wanted > 0 && available < wanted.saturating_add(reserve)).then(|| {
        let mib = |bytes: u64| bytes >> 20;
        format!(
            "the guest needs {} MiB more than its VMM holds, {} MiB are available, and {} MiB of them are to \
             stay free; free memory there, or lower limits.memory_reserve",
            mib(wanted),
            mib(available),
            mib(reserve)
        )
    })
}

/// What the kernel thinks can be used without swapping (`MemAvailable`).
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib << 10)
}

/// Where lanes may connect on this host.
pub fn offered_ports(host: &Host) -> Vec<Port> {
    let up = host.config.ports.iter().filter(|port| port::holds(port.address).unwrap_or(false));
    up.map(|port| Port {
        name: port.name.clone(),
        address: SocketAddr::new(port.address, host.config.lane_port),
        lanes: port.lanes,
    })
    .collect()
}
