//! What an order asks for becomes a migration, with the daemon's limits where the order names none.

use std::rc::Rc;
use std::time::Duration;

use memlane_api::ids;
use memlane_api::types::{ApiError, ErrorCode, Order};
use memlane_guest::Guest;
use memlane_migrate::{MigrateParameters, MigrationHandle, Order as Orders, OrderError};
use memlane_protocol::convergence::{Converge, Policy};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::RunState;

use crate::host::Host;

/// Begins the migration that an order asks for.
///
/// # Errors
///
/// Fails if the guest cannot be moved now, or not there.
pub(crate) async fn begin(host: &Host, order: &Order) -> Result<Rc<MigrationHandle>, ApiError> {
    let (guest, peer) = parties(host, order)?;
    let orders =
        Orders { parameters: migrate_parameters(host, order), min_bandwidth: min_bandwidth(host, order) };
    let ordered = host.migrate.migrate(&guest, &peer, ids::random(), orders).await;
    ordered.map_err(|error| match error {
        OrderError::Moving => already_moving(order),
        OrderError::Refused(findings) => ApiError::new(ErrorCode::Refused, findings.reasons()),
        OrderError::VmmLost => {
            let text = format!(
                "the connection to the VMM of guest {} was lost meanwhile; order it again",
                order.guest
            );
            ApiError::new(ErrorCode::Refused, text)
        }
    })
}

/// Finds the guest and the host that an order names, and checks that the guest is free to move.
///
/// # Errors
///
/// Fails if one of them is not known, or the guest cannot move now.
pub(crate) fn parties(host: &Host, order: &Order) -> Result<(Rc<Guest>, Label), ApiError> {
    let guest = guest(host, &order.guest)?;
    let peer = order.host.parse().ok().and_then(|name| host.context().peer(&name)).ok_or_else(|| {
        let names: Vec<String> = host.config.peers.iter().map(|peer| peer.name.to_string()).collect();
        let there =
            if names.is_empty() { "none is".into() } else { format!("there are: {}", names.join(", ")) };
        let text = format!("{} is no peer of this host ({there}); add it as [[peer]]", order.host);
        ApiError::new(ErrorCode::UnknownHost, text)
    })?;
    if guest.is_moving() {
        return Err(already_moving(order));
    }
    if guest.lost.get() {
        let text = format!(
            "guest {} waits for memory that will never come, so that it cannot move; end its VMM (process {})",
            order.guest,
            guest.process.identity().pid
        );
        return Err(ApiError::new(ErrorCode::Refused, text));
    }
    if guest.incomplete.get() {
        let text = format!("part of guest {}'s memory was given up, so that it cannot move", order.guest);
        return Err(ApiError::new(ErrorCode::Refused, text));
    }
    if guest.run_state.get() != RunState::Running {
        let text = format!("guest {} does not run here ({:?})", order.guest, guest.run_state.get());
        return Err(ApiError::new(ErrorCode::Refused, text));
    }
    Ok((guest, peer.name.clone()))
}

/// Returns how many bits per second the ports must deliver.
pub(crate) fn min_bandwidth(host: &Host, order: &Order) -> u64 {
    let default = host.config.limits.min_bandwidth.0;
    order.min_bandwidth_bits_per_second.unwrap_or(default)
}

/// Combines an order with the daemon's limits. The API has checked that numbers are in range.
fn migrate_parameters(host: &Host, order: &Order) -> MigrateParameters {
    let limits = &host.config.limits;
    let downtime_limit = order.downtime_limit_seconds.map_or(limits.downtime, Duration::from_secs_f64);
    let max_iterations = order.max_rounds.unwrap_or(limits.max_iterations);
    let converge = match (order.converge, limits.converge) {
        (Some(converge), _) => converge.into(),
        // The order asks to compare memory, and that is impossible while the guest runs: so no post-copy.
        (None, Converge::Postcopy) if order.verify => Converge::None,
        (None, Converge::Auto) if order.verify => Converge::Stun,
        (None, default) => default,
    };
    let postcopy = order.postcopy.map(Into::into);
    let max_stun_percent = order.max_stun_percent.unwrap_or(limits.max_stun_percent(converge));
    let policy = Policy { downtime_limit, max_iterations, converge, max_stun_percent, postcopy };
    let compression = order.compression.map_or(limits.compression, Into::into);
    let patience = order.patience_seconds.map_or(limits.patience, Duration::from_secs_f64);
    MigrateParameters { policy, verify: order.verify, compression, patience }
}

/// Finds the guest of this name.
///
/// # Errors
///
/// Fails if none is attached.
pub(crate) fn guest(host: &Host, name: &str) -> Result<Rc<Guest>, ApiError> {
    name.parse().ok().and_then(|label| host.guests.get(&label)).ok_or_else(|| {
        let names: Vec<String> = host.guests.all().iter().map(|guest| guest.shape.name.to_string()).collect();
        let there =
            if names.is_empty() { "none is".into() } else { format!("there are: {}", names.join(", ")) };
        let text = format!("no guest named {name} is attached to this daemon ({there})");
        ApiError::new(ErrorCode::UnknownGuest, text)
    })
}

fn already_moving(order: &Order) -> ApiError {
    let text = format!("guest {} is being moved already; see `memlanectl watch`", order.guest);
    ApiError::new(ErrorCode::AlreadyMoving, text)
}
