//! Several guests that are moved at once.

use std::panic::resume_unwind;

use anyhow::{Context, Result};
use memlane_lab::{HostId, Rig, unix_time};
use serde_json::Value;

use super::{BenchGuest, Ends, WARM_UP, ensure_completed, order, resumed_at};
use crate::baseline::memory::warm_up;

/// The figures of guests that were moved at once.
#[derive(Debug, Clone)]
pub struct Together {
    /// The seconds of each guest from its order until it ran at its destination.
    pub seconds: Vec<f64>,
    /// The seconds from the first order until the last guest ran at its destination.
    pub total_seconds: f64,
    /// The migrations, as the source's daemon reported them at their end.
    pub migrations: Vec<Value>,
}

/// Starts `count` guests of one kind on host A, orders all of them at once to move to host B, with more `arguments` to `memlanectl migrate`, and compares the memory of each with its model when all have
/// arrived.
///
/// # Errors
///
/// If one does not arrive, or not as it left.
pub fn migrate_together(
    guest: &BenchGuest,
    rig: &mut Rig,
    count: usize,
    arguments: &[&str],
) -> Result<Together> {
    let names: Vec<String> = (1..=count).map(|number| format!("web{number}")).collect();
    let ends: Vec<Ends> = names.iter().map(|name| guest.start(rig, name)).collect::<Result<_>>()?;
    std::thread::sleep(WARM_UP);
    warm_up(guest.ram.bytes() * count as u64)?;
    let ordered = order_all(rig, &names, arguments)?;
    let mut migrations = Vec::new();
    let mut running_at = Vec::new();
    for (_, id) in &ordered {
        let migration = rig.watch(HostId::A, id, |_| {})?;
        ensure_completed(&migration)?;
        running_at.push(resumed_at(&migration).context("a migration does not say when its guest ran again")?);
        migrations.push(migration);
    }
    for ends in ends {
        ends.check()?;
    }
    let seconds = running_at.iter().zip(&ordered).map(|(ran, (ordered, _))| ran - ordered).collect();
    let first = ordered
        .iter()
        .map(|(ordered, _)| *ordered)
        .reduce(f64::min)
        .context("there are guests to be moved")?;
    Ok(Together { seconds, total_seconds: running_at.into_iter().fold(first, f64::max) - first, migrations })
}

/// Gives all orders; returns when each was given, and the identity of its migration.
fn order_all(rig: &Rig, names: &[String], arguments: &[&str]) -> Result<Vec<(f64, String)>> {
    std::thread::scope(|scope| {
        let give = |name| move || Ok((unix_time(), order(rig, name, arguments)?));
        let orders: Vec<_> = names.iter().map(|name| scope.spawn(give(name))).collect();
        let given = orders.into_iter().map(|order| order.join().unwrap_or_else(|panic| resume_unwind(panic)));
        given.collect()
    })
}
