//! The destination looks at these things before it accepts a guest.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use memlane_guest::{Claim, Guest, qemu};
use memlane_kvm::compat;
use memlane_net::port;
use memlane_net::task;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::RunState;
use memlane_protocol::wire::control::{MAX_REFUSALS, Offer, Refusal, RefusalKind};
use tracing::warn;

use super::{lacking_descriptors, launch, room};
use crate::context::Context;

/// Finds the VMM that waits for an offered guest, and claims its guest for the migration. A guest in QEMU may bring the
/// file from which its QEMU is started here.
///
/// # Errors
///
/// Returns everything that prevents the guest from coming.
pub(crate) async fn receive(
    context: &Rc<Context>,
    peer: &Label,
    offer: &Offer,
) -> Result<Claim, Vec<Refusal>> {
    let name = &offer.shape.name;
    let refused = |what, reason: String| Err(vec![Refusal { what, reason }]);
    until_checked(context, name).await;
    let guest = match context.guests.get(name) {
        Some(guest) if guest.is_moving() => {
            return busy(name);
        }
        Some(guest) if guest.run_state.get() != RunState::Incoming => {
            return refused(
                RefusalKind::Busy,
                format!("a guest named {name} is here already; names must be unique"),
            );
        }
        Some(guest) => guest,
        None => match launch::launch_incoming(context, peer, offer).await {
            Ok(guest) => guest,
            Err(refusals) => return Err(shorten(refusals)),
        },
    };
    // Taken before anything else is awaited, so that no second offer can take it too.
    let Some(claim) = guest.claim(offer.migration) else { return busy(name) };
    guest.checked.set(offer.check_only);
    let mut refusals = judge(context, offer, &guest).await;
    if !matches!(guest.driver.awaits().await, Ok(true)) {
        let reason = format!("the VMM named {name} does not wait for a guest any more; start it anew");
        refusals.push(Refusal { what: RefusalKind::Receiver, reason });
    }
    if refusals.is_empty()
        && !offer.check_only
        && let Err(error) = guest.driver.get_ready().await
    {
        let reason = format!("the VMM named {name} cannot be made ready: {error}; look at its log there");
        refusals.push(Refusal { what: RefusalKind::Receiver, reason });
    }
    if refusals.is_empty() {
        return Ok(claim);
    }
    release(claim).await;
    Err(shorten(refusals))
}

/// Waits until a check of a guest has ended that is under way. It holds the VMM for a moment longer than the other host waits
/// for the answer.
async fn until_checked(context: &Context, name: &Label) {
    const CHECK: Duration = Duration::from_secs(10);
    let checked = || context.guests.get(name).is_some_and(|guest| guest.is_moving() && guest.checked.get());
    let ended = async {
        while checked() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let _ = tokio::time::timeout(CHECK, ended).await;
}

fn busy<T>(name: &Label) -> Result<T, Vec<Refusal>> {
    let reason = format!("guest {name} is moving already; wait until that has ended");
    Err(vec![Refusal { what: RefusalKind::Busy, reason }])
}

/// Frees a guest that does not come after all, and ends its VMM if it was started for that only.
pub(crate) async fn release(guest: Claim) {
    if !guest.launched_for_migration.get() {
        guest.driver.stand_down().await;
    } else if let Err(error) = guest.driver.discard().await {
        warn!(guest = %guest.shape.name, %error, "cannot end the VMM that was started for a guest");
    }
}

/// Compares what is offered with the VMM that waits for it, and with this host.
async fn judge(context: &Rc<Context>, offer: &Offer, guest: &Guest) -> Vec<Refusal> {
    let refusal = |what, reason: String| Refusal { what, reason };
    let mut refusals = Vec::new();
    for reason in compat::check(&offer.shape, &guest.shape) {
        refusals.push(refusal(RefusalKind::Machine, reason.to_string()));
    }
    match (&offer.qemu, guest.driver.look().await) {
        (Some(theirs), Ok(Some(ours))) => refusals.extend(qemu::differences(theirs, &ours)),
        (Some(_), Err(error)) => refusals.push(refusal(RefusalKind::Receiver, error.to_string())),
        _ => {}
    }
    if let Err(lost) = guest.ram.check() {
        let reason = format!("{lost}; start the VMM that waits for the guest anew");
        refusals.push(refusal(RefusalKind::Memory, reason));
    }
    let (wanted, reserve) = (memory_wanted(offer, guest), context.limits().memory_reserve.0);
    let ram = guest.ram.clone();
    let lacking = task::aside(move || room::lacking(&ram, wanted, reserve));
    let (lacking, bridges) = tokio::join!(lacking, context.bridges_there());
    refusals.extend(lacking.map(|lacking| refusal(RefusalKind::Memory, lacking.to_string())));
    let lacking = lacking_descriptors(context).await;
    refusals.extend(lacking.map(|lacking| refusal(RefusalKind::Host, lacking.to_string())));
    for nic in &offer.shape.nics {
        if let Some(reason) = context.network_missing(&nic.network, &bridges) {
            refusals.push(refusal(RefusalKind::Network, reason));
        }
    }
    if context.offered_ports().is_empty() {
        let unknown = context.settings.ports.iter().find_map(|port| port::holds(port.address).err());
        refusals.push(match unknown {
            Some(error) => refusal(RefusalKind::Host, error.to_string()),
            None => {
                let reason = "no port of this host is up; see `memlanectl ports` there".to_owned();
                refusal(RefusalKind::Port, reason)
            }
        });
    }
    refusals
}

/// Shortens the refusals to what fits into one answer: a VMM of another kind may differ in hundreds of registers.
fn shorten(mut refusals: Vec<Refusal>) -> Vec<Refusal> {
    if refusals.len() > MAX_REFUSALS {
        // One of each respect first, so that the cut leaves something of all of them.
        let mut seen = HashSet::new();
        refusals.sort_by_cached_key(|refusal| !seen.insert(refusal.what));
        let left_out = refusals.len() - (MAX_REFUSALS - 1);
        refusals.truncate(MAX_REFUSALS - 1);
        refusals.push(Refusal { what: RefusalKind::Machine, reason: format!("and {left_out} more") });
    }
    refusals
}

/// Returns how many bytes of memory the guest will take here besides those that its VMM holds.
fn memory_wanted(offer: &Offer, guest: &Guest) -> u64 {
    let held = guest.ram.allocated_bytes().unwrap_or(0);
    // A VMM on huge pages has reserved them; one whose memory is touched holds it.
    let huge = guest.shape.regions.iter().any(|region| u64::from(region.page_bytes) != PAGE_SIZE);
    if huge { 0 } else { offer.data_bytes.saturating_sub(held) }
}
