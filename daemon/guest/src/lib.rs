//! This crate knows the guests of this host, and drives their VMMs.
//!
//! - [`Guests`] lists the guests, and a [`Claim`] gives a guest to one migration at a time.
//! - [`Driver`] is the trait by which every kind of VMM is asked to do things. [`Linked`] drives VMMs that link
//!   `memlane-kvm` and connect to the [`attach_socket`]. [`qemu`] drives stock QEMU, by way of a [`shim`] in its
//!   process.
//! - `tracking` finds from outside what a VMM writes, and `stun` holds its writes up.
//! - [`config`] holds what the configuration says of guests, and [`toml_file`] reads it and guest files.

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
mod state;
mod stun;
pub mod toml_file;
mod tracking;
mod users;
mod write_faults;

pub use claim::Claim;
pub use driver::{Blocker, Driver, DriverError, Farewell, LoadedState, SavedState};
pub use guest::Guest;
pub use linked::Linked;
pub use memlane_kvm::dirty::{Harvest, ThrottleStats};
pub use memory::VmmMemory;
pub use process::{Hang, KillError, Process, ProcessError};
pub use registry::{AttachError, GuestObserver, Guests, Stranger};
pub use state::{NotRead, StateReader, StateWriter, narrow_state_pipe, state_pipe};
pub use stun::Switch;
pub use users::{UserError, Users};
pub use write_faults::Report as StunReport;
