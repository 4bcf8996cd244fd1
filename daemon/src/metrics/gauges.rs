//! What goes up and down. It is set when `/metrics` is read.

use std::collections::BTreeMap;

use memlane_migrate::Progress;
use memlane_migrate::progress::{Phase, Role};
use metrics::{counter, gauge};

use super::names::*;
use crate::surroundings::Surroundings;
use crate::{log, views};

/// Sets the gauges of encryption: when the certificate of this host expires, in seconds since 1970 (UTC), or `None` if
/// nothing is encrypted.
pub(crate) fn encryption(expires: Option<f64>) {
    gauge!(INSECURE).set(if expires.is_some() { 0.0 } else { 1.0 });
    gauge!(CERTIFICATE_EXPIRES).set(expires.unwrap_or(0.0));
}

/// Sets the gauges of the guests that are attached, each of so many bytes of RAM, and of what the migrations under way do
/// on these ports; and tells how many lines of the log were lost.
pub(crate) fn now<'n>(guests: &[u64], migrations: &[Progress], ports: impl IntoIterator<Item = &'n str>) {
    counter!(LOG_LINES_LOST).absolute(log::lost_lines());
    gauge!(GUESTS).set(guests.len() as f64);
    gauge!(GUEST_RAM).set(guests.iter().sum::<u64>() as f64);
    let active: Vec<&Progress> =
        migrations.iter().filter(|progress| progress.status.outcome.is_none()).collect();
    phases(&active);
    let in_doubt = active.iter().filter(|progress| progress.status.in_doubt_since_unix_seconds.is_some());
    gauge!(IN_DOUBT).set(in_doubt.count() as f64);
    let oldest = active.iter().map(|progress| progress.started_at_unix_seconds).reduce(f64::min);
    gauge!(OLDEST_MIGRATION).set(oldest.unwrap_or(0.0));
    let of = |role| active.iter().filter(move |progress| progress.role == role);
    let missing = of(Role::Destination).filter_map(|progress| progress.postcopy.as_ref());
    gauge!(MISSING_PAGES).set(missing.map(|postcopy| postcopy.remaining_pages).sum::<u64>() as f64);
    let copied = of(Role::Source).filter(|progress| progress.status.phase == Phase::Copying);
    gauge!(REMAINING_PAGES).set(copied.map(|progress| progress.ram.pages_remaining).sum::<u64>() as f64);
    let mut bandwidth: BTreeMap<&str, f64> = ports.into_iter().map(|port| (port, 0.0)).collect();
    for lane in of(Role::Source).flat_map(|progress| &progress.lanes) {
        *bandwidth.entry(&lane.port).or_default() += lane.bytes_per_second;
    }
    for (port, rate) in bandwidth {
        gauge!(BANDWIDTH, "port" => port.to_owned()).set(rate);
    }
}

/// Sets the gauges of what surrounds the daemon. What could not be found out keeps its value.
pub(crate) fn surroundings(seen: &Surroundings) {
    for (port, up) in &seen.ports {
        gauge!(PORT_UP, "port" => port.to_string()).set(f64::from(u8::from(*up)));
    }
    if let Some(bytes) = seen.available_memory {
        gauge!(AVAILABLE_MEMORY).set(bytes as f64);
    }
    if let Some((free, all)) = seen.journal_room {
        gauge!(JOURNAL_FREE).set(free as f64);
        gauge!(JOURNAL_SIZE).set(all as f64);
    }
}

/// Sets the gauge of a peer: whether its daemon has answered.
pub(crate) fn peer(name: &str, reachable: bool) {
    gauge!(PEER_REACHABLE, "peer" => name.to_owned()).set(f64::from(u8::from(reachable)));
}

/// Counts migrations by what they do, and as which side.
fn phases(active: &[&Progress]) {
    use Phase::{Committing, Copying, Fetching, Preflight, Preparing, SwitchingOver};
    for (role, side) in [(Role::Source, "source"), (Role::Destination, "destination")] {
        for phase in [Preflight, Preparing, Copying, SwitchingOver, Committing, Fetching] {
            let step = views::phase_of(phase).as_str().replace(' ', "_");
            let here =
                active.iter().filter(|progress| (progress.role, progress.status.phase) == (role, phase));
            gauge!(MIGRATIONS_ACTIVE, "role" => side, "phase" => step).set(here.count() as f64);
        }
    }
}
