//! What the destination looks at before it accepts a guest.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::rc::Rc;

use memlane_kvm::compat;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::attach::Standing;
use memlane_protocol::wire::control::{MAX_REFUSALS, Offer, Port, Refusal, Respect};

use crate::guest::Guest;
use crate::host::Host;
use crate::port;

/// Whether an offered guest can come: the VMM that waits for it, which the migration then has
/// for itself, or everything that is wrong.
pub fn receive(host: &Host, offer: &Offer) -> Result<Rc<Guest>, Vec<Refusal>> {
    let name = &offer.shape.name;
    let refusal = |what, reason: String| Refusal { what, reason };
    let guest = match host.guest(name) {
        None => {
            let reason =
                format!("no VMM waits for a guest named {name}; start one with --incoming and that name");
            return Err(vec![refusal(Respect::Receiver, reason)]);
        }
        Some(guest) if guest.is_moving() => {
            let reason = format!("guest {name} is moving already; wait until that has ended");
            return Err(vec![refusal(Respect::Busy, reason)]);
        }
        Some(guest) if guest.standing.get() != Standing::Incoming => {
            let reason = format!("a guest named {name} is here already; names must be unique");
            return Err(vec![refusal(Respect::Busy, reason)]);
        }
        Some(guest) => guest,
    };
    let mut refusals = Vec::new();
    for reason in compat::check(&offer.shape, &guest.shape) {
        refusals.push(refusal(Respect::Machine, reason.to_string()));
    }
    if let Some(reason) = memory_missing(host, offer, &guest) {
        refusals.push(refusal(Respect::Memory, reason));
    }
    for nic in &offer.shape.nics {
        if let Some(reason) = host.network_missing(&nic.network) {
            refusals.push(refusal(Respect::Network, reason));
        }
    }
    if host.offered_ports().is_empty() {
        let reason = "no port of this host is up; see `memlanectl ports` there".to_owned();
        refusals.push(refusal(Respect::Port, reason));
    }
    if !refusals.is_empty() {
        return Err(shorten(refusals));
    }
    if !offer.check_only {
        // Taken before anything is awaited, so that no second offer can take it too.
        guest.migration.replace(Some(offer.migration));
    }
    Ok(guest)
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
fn memory_missing(host: &Host, offer: &Offer, guest: &Guest) -> Option<String> {
    let extents = guest.ram.data_extents(0..guest.ram.pages()).unwrap_or_default();
    let held: u64 = extents.iter().map(|extent| (extent.end - extent.start) * PAGE_SIZE).sum();
    // A VMM on huge pages has reserved them; one whose memory is touched holds it.
    let huge = guest.shape.regions.iter().any(|region| u64::from(region.page_bytes) != PAGE_SIZE);
    let wanted = if huge { 0 } else { offer.data_bytes.saturating_sub(held) };
    let reserve = host.config.limits.memory_reserve.0;
    let available = available_memory()?;
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
    let up = host.config.ports.iter().filter(|port| port::holds(port.address));
    up.map(|port| Port {
        name: port.name.clone(),
        address: SocketAddr::new(port.address, host.config.lane_port),
        lanes: port.lanes,
    })
    .collect()
}
