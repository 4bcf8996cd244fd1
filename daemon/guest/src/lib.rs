//! Guests of this host, and how their VMMs are handled.
//!
//! - [`Guests`] is who is here, and [`Claim`] what one migration has of a guest at a time.
//! - [`Driver`] is what every kind of VMM can be asked. [`Linked`] drives VMMs that link `memlane-kvm` and connect to
//!   the [`attach_socket`], [`qemu`] drives stock QEMU, by way of a [`shim`] in its process.
//! - `tracking` finds what a VMM writes from outside, and `stun` holds its writes up.
//! - [`config`] is what the configuration says of guests, and [`toml_file`] reads it and guest files.

mod accounts;
pub mod attach_socket;
mod claim;
pub mod config;
mod driver;
mod guest;
mod linked;
mod memory;
mod prefault;
mod process;
pub mod qemu;
mod registry;
pub mod shim;
mod stun;
pub mod toml_file;
mod tracking;
mod write_faults;

pub use claim::Claim;
pub use driver::{Blocker, Driver, DriverError, SavedState};
pub use guest::Guest;
pub use linked::Linked;
pub use memlane_kvm::dirty::{Harvest, ThrottleStats};
pub use memory::VmmMemory;
pub use process::{KillError, Process, ProcessError};
pub use registry::{AttachError, GuestObserver, Guests, Stranger};
pub use stun::Switch;
pub use write_faults::Report as StunReport;
