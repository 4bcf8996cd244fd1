//! Whole migrations in virtual time.
//!
//! The decisions are those of `memlane-protocol`, as the daemon makes them: the handover, convergence with its forecast,
//! stun, windows, liveness, compression, bandwidth, sets of pages, which messages are sent again over another
//! connection, and the bytes of control messages and frames. The world around them is simulated: two hosts, each with a
//! daemon that crashes and comes back, and a journal that may lose what was not synced; the network with its lanes; VMMs;
//! and a guest whose pages have versions in place of contents. What a daemon does between two decisions is a model of
//! `daemon/migrate` and `daemon/lane`, named in the file that has it.
//!
//! A seed draws what a run is like (`swarm`), what the guest does (`guest`), and what goes wrong (`trouble`). At every
//! step it is checked that nobody reads anything but the newest version of a page, and that one copy of the guest runs at
//! most (`invariants`). Then all trouble ends, and everything must come to its end in time, with one owner.
//!
//! The model leaves out:
//!
//! - huge pages, memory that the guest gives back, `--verify`, `--retry`, versions of the protocols before the last one,
//!   authentication, and an operator who resolves what is in doubt;
//! - a QEMU that hangs at a missing page in a migration that is in no journal.
//!
//! The same seed gives the same run, always. [`Plant`] has faults that can be planted, to prove that runs find them.

#![forbid(unsafe_code)]

mod channel;
mod clock;
mod connections;
mod destination;
mod dice;
mod drive;
mod effects;
mod event;
mod fetch;
mod guest;
mod host;
mod invariants;
mod lane;
mod memory;
mod network;
mod outbound;
mod plant;
mod precopy;
mod report;
mod serve;
mod session;
mod source;
mod supervisor;
mod swarm;
mod switchover;
mod trace;
mod trouble;
mod vmm;
mod world;

pub use plant::Plant;
pub use report::{Run, Tally};

/// Runs the seed. The trace is kept if `keep_trace`.
pub fn simulate(seed: u64, plant: Plant, keep_trace: bool) -> Run {
    world::World::new(seed, plant, keep_trace).run(seed)
}
