//! The fault matrix: something fails in each phase of a migration, and it is found out who owns the guest then, whether it
//! is whole, and what the operator is told.
//!
//! - [`phase`] brings a migration to a phase, and holds it there.
//! - [`fault`] has something fail.
//! - [`cell`] does both on two hosts of its own, waits until all is at rest, and looks at what has become of the guest.
//! - [`table`] is the table in the documents, with which it is compared. With `MEMLANE_WRITE_FAULTS=1` this test writes it.

#[path = "../common/mod.rs"]
mod common;

mod cell;
mod fault;
mod phase;
mod table;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cell::Seen;
use fault::Fault;
use phase::Phase;
use table::Table;

/// So many cells are tried at once: they wait most of the time.
const AT_ONCE: usize = 8;
/// With this in the environment, only cells of this name are tried: `FAULT / PHASE` or a part of it.
const ONLY: &str = "MEMLANE_FAULTS";

#[test]
fn whatever_fails_the_guest_has_one_owner_and_is_whole() {
    let test = "whatever_fails_the_guest_has_one_owner_and_is_whole";
    if memlane_lab::skip(test, memlane_lab::Requirement::LAB) {
        return;
    }
    let only = std::env::var(ONLY).unwrap_or_default();
    let cells: Vec<(Fault, Phase)> = Fault::ALL
        .into_iter()
        .flat_map(|fault| Phase::ALL.map(|phase| (fault, phase)))
        .filter(|(fault, phase)| format!("{} / {}", fault.name(), phase.name()).contains(&only))
        .collect();
    let (next, results) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(cells.len()) {
            scope.spawn(|| {
                while let Some(&(fault, phase)) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let name = format!("{} / {}", fault.name(), phase.name());
                    let seen = catch_unwind(AssertUnwindSafe(|| cell::play(fault, phase)));
                    match &seen {
                        Ok(seen) => eprintln!("{name}: {seen}"),
                        Err(_) => eprintln!("{name}: failed, see above"),
                    }
                    results.lock().unwrap().insert((fault, phase), seen.map_err(|_| name));
                }
            });
        }
    });
    let results = results.into_inner().unwrap();
    let failed: Vec<&String> = results.values().filter_map(|seen| seen.as_ref().err()).collect();
    assert!(failed.is_empty(), "these cells failed, see above: {failed:#?}");
    let seen: BTreeMap<(Fault, Phase), &Seen> =
        results.iter().filter_map(|(cell, seen)| Some((*cell, seen.as_ref().ok()?))).collect();
    Table::read().check(&seen);
}
