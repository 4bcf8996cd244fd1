//! The guest, and what it and its VMM exchange in its memory.

pub mod block;
pub mod clock;
pub mod code;
pub mod kvm;
pub mod layout;
pub mod long_mode;
pub mod process;
mod spread;
mod vcpu;

use std::collections::BTreeMap;
use std::time::Duration;

use memlane_protocol::wire::machine::Machine;

use crate::workload::SLOTS;

pub use block::{ControlBlock, Stall};
pub use clock::ClockReading;
pub use layout::{GuestLayout, SYSTEM_PAGES};

/// A guest of either kind, as its VMM handles it.
pub trait GuestMachine: Send + Sync {
    /// Returns the guest's machine. For a guest that is expected from another host, it returns what this host could
    /// run.
    fn machine(&self) -> Machine;

    /// Reads the guest's clock, which all vCPUs share.
    fn clock(&self) -> ClockReading;

    /// Returns whether a vCPU may be stopped between a step and its count, as a virtual machine can be.
    fn stops_anywhere(&self) -> bool;

    /// Returns the pages that only the VMM writes, before the start, by number.
    fn image(&self) -> BTreeMap<u64, [u64; SLOTS]>;

    /// Stops all vCPUs; they have stopped when this returns. It does nothing to a paused guest.
    fn pause(&self) -> Result<(), String>;

    /// Lets the vCPUs run. It does nothing to a running guest.
    fn resume(&self) -> Result<(), String>;

    /// Saves everything but RAM of a paused guest, together with data of the VMM's own.
    fn save(&self, own: Vec<u8>) -> Result<Vec<u8>, String>;

    /// Loads the state that [`GuestMachine::save`] returned, and returns the VMM's own data. The guest is paused until
    /// it is resumed.
    fn load(&self, state: &[u8]) -> Result<Vec<u8>, String>;

    /// Waits at most `patience` for a vCPU to fail, and returns why it failed.
    fn failure(&self, patience: Duration) -> Option<String>;
}
