//! Stock QEMU: guests whose VMM knows nothing of Memlane.
//!
//! A QEMU does not attach itself: the daemon starts it from a [guest file](definition), or is told where its monitor
//! is. From then on a [`Supervisor`] keeps to it, across lost connections and, by what is in its state directory,
//! across the daemon's own end.

mod block;
mod blockers;
mod child;
pub mod definition;
mod driver;
mod farewell;
mod handed;
mod inspect;
mod launch;
mod machine;
mod others;
mod qmp;
mod ram;
mod revision;
mod run_state;
mod settings;
mod starter;
mod state_directory;
mod supervisor;

use std::io;
use std::path::PathBuf;

use memlane_kvm::ram::RamError;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::{QemuGuest, Refusal, RefusalKind};
use memlane_protocol::wire::machine::MAX_RAM_BYTES;

use crate::driver::DriverError;
use crate::process::ProcessError;
use crate::registry::AttachError;
use crate::users::UserError;

use definition::DefinitionError;

pub use qmp::ConnectError;
pub use starter::StarterError;
pub use state_directory::StateError;
pub use supervisor::Supervisor;

/// A guest in QEMU cannot be taken in or started.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// A guest of this name is here.
    #[error("a guest named {0} is here already; names are unique on a host")]
    NameTaken(Label),
    /// This QEMU is here already.
    #[error(
        "QEMU (process {pid}) is here already, as guest {name}; `memlanectl detach {name}` lets go of it"
    )]
    Twice {
        /// This is its process.
        pid: u32,
        /// It has this guest.
        name: String,
    },
    /// No guest of this name is in a QEMU here.
    #[error("no guest named {0} in a QEMU is here; see `memlanectl guests`")]
    Unknown(Label),
    /// The guest is being moved.
    #[error("guest {0} is being moved; wait until that has ended, or cancel it")]
    Moving(Label),
    /// The monitor cannot be talked to.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// QEMU does not do as it is asked.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The process of QEMU cannot be followed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The user that QEMU runs as may not attach guests.
    #[error(
        "QEMU runs as user {user}, who may not attach guests; add that user to attach_users in the daemon's \
         configuration"
    )]
    User {
        /// This is the user id.
        user: u32,
    },
    /// This QEMU is too old.
    #[error("QEMU {} is too old to be moved; install {}.{} or newer", dotted(found), oldest[0], oldest[1])]
    TooOld {
        /// This is its version.
        found: [u32; 3],
        /// This version is the oldest that would do.
        oldest: [u32; 3],
    },
    /// The guest's memory is not behind memory back ends.
    #[error(
        "QEMU has {found} memory back ends, and 1 to {limit} can be moved; start QEMU by memlane-qemu, which gives it one (see \
         docs/qemu.md), or with -object memory-backend-file,share=on"
    )]
    NoMemory {
        /// QEMU has this many memory back ends.
        found: usize,
        /// QEMU may have this many.
        limit: usize,
    },
    /// The guest's memory is larger than any that can be moved.
    #[error(
        "with memory {id} of {bytes} bytes the guest has more RAM than can be moved, which is {MAX_RAM_BYTES} bytes"
    )]
    TooMuchMemory {
        /// This is the name of the back end.
        id: String,
        /// This is its length in bytes, as QEMU says.
        bytes: u64,
    },
    /// The guest's memory cannot be shared.
    #[error(
        "memory of the guest cannot be moved by the daemon in QEMU {}: {private}; start QEMU once by memlane-qemu, which \
         makes that memory-backend-file,share=on of the same names and changes nothing else (see docs/qemu.md), or so by \
         hand: -object memory-backend-file,id=mem,share=on,size=SIZE,mem-path=/dev/shm -machine memory-backend=mem",
        dotted(version)
    )]
    PrivateMemory {
        /// These are the names and types of the back ends.
        private: String,
        /// This is QEMU's version.
        version: [u32; 3],
    },
    /// The guest's memory is not handed over.
    #[error("cannot get at the guest's memory {}, which has no name that the daemon could open: {source}", path.display())]
    Handed {
        /// This is what is known of it.
        path: PathBuf,
        /// This is why.
        source: crate::shim::ShimError,
    },
    /// The guest's memory cannot be opened.
    #[error("cannot use {} as the guest's memory: {source}", path.display())]
    MemoryFile {
        /// This is the file, as QEMU names it.
        path: PathBuf,
        /// This is why.
        source: io::Error,
    },
    /// The guest's memory is of a kind that cannot be moved.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The guest's VMM was sent away.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The QEMU is in another state than the operator says.
    #[error(transparent)]
    RunState(#[from] RunStateError),
    /// The guest file is wrong.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// A tap that the guest file names is not on this host.
    #[error(
        "tap {tap} of guest {guest} is not there; make it with `ip tuntap add {tap} mode tap`, join it to the \
         bridge of network {network} and bring it up, or change nic.tap in the guest file"
    )]
    NoTap {
        /// This is the tap.
        tap: String,
        /// The tap belongs to this guest.
        guest: Label,
        /// The tap is to be joined to the bridge of this network.
        network: Label,
    },
    /// A tap that the guest file names cannot be used.
    #[error("cannot open tap {tap} of guest {guest}: {source}{remedy}")]
    Tap {
        /// This is the tap.
        tap: String,
        /// The tap belongs to this guest.
        guest: Label,
        /// This is what the kernel said.
        source: io::Error,
        /// This says what to do about it, and begins with a semicolon.
        remedy: String,
    },
    /// There is no user for the guest.
    #[error(transparent)]
    GuestUser(#[from] UserError),
    /// The starter has started no QEMU.
    #[error("cannot start QEMU: {0}")]
    Starter(#[from] StarterError),
    /// Another process than the QEMU that was started answers at its monitor.
    #[error(
        "process {found} (user {user}) answers at the monitor of guest {guest}, in place of process {expected}, which is \
         its QEMU; end that process"
    )]
    Impostor {
        /// This is the guest.
        guest: Label,
        /// This process answers.
        found: u32,
        /// This is its user.
        user: u32,
        /// This process should.
        expected: u32,
    },
    /// The shim is not on this host.
    #[error(
        "the shim {} is not there, without which the guest could not be moved; install it, or name it in \
         guests.shim of the daemon's configuration",
        .0.display()
    )]
    NoShim(PathBuf),
    /// QEMU cannot be started.
    #[error("cannot {doing} {}: {source}", path.display())]
    Start {
        /// This was being done.
        doing: &'static str,
        /// It was being done to this file or directory.
        path: PathBuf,
        /// This is why it failed.
        source: io::Error,
    },
    /// QEMU ended as soon as it had begun.
    #[error("QEMU did not start: {words}{}", remedy(*lacks, *user))]
    Ended {
        /// QEMU said that it lacks this.
        lacks: Option<Lacking>,
        /// QEMU ran as this user.
        user: u32,
        /// These are the last lines of its log.
        words: String,
    },
    /// QEMU's monitor did not answer in time.
    #[error("QEMU did not start: its monitor has not answered for {after:.0?}, and it was ended; {words}")]
    Slow {
        /// The answer was waited for this long.
        after: std::time::Duration,
        /// These are the last lines of its log.
        words: String,
    },
    /// What must be remembered cannot be written down.
    #[error(transparent)]
    Remember(#[from] StateError),
}

/// A QEMU is in another state than it should be in when it is taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunStateError {
    /// A program other than this daemon has told it to migrate since it was taken in.
    #[error(
        "QEMU was told to migrate by others; once that is settled, `memlanectl detach` it and attach it again"
    )]
    MigratedByOthers,
    /// It waits for a guest at an address of its own.
    #[error("QEMU listens for a migration of its own; start it with -incoming defer")]
    Listens,
    /// It runs a guest, and should wait for one.
    #[error("QEMU does not wait for a guest; start it with -incoming defer")]
    NotIncoming,
    /// It waits for a guest, and should run one.
    #[error("QEMU waits for a guest to arrive; say so with --incoming")]
    Incoming,
    /// It is migrating its guest without Memlane.
    #[error("QEMU migrates the guest by itself; wait until that has ended")]
    Migrating,
    /// It has migrated its guest without Memlane.
    #[error("QEMU has migrated the guest by itself: it runs elsewhere")]
    Migrated,
}

/// A QEMU may lack something that a guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacking {
    /// QEMU lacks the machine type.
    Machine,
    /// QEMU lacks the CPU model.
    Cpu,
    /// QEMU may not open something.
    Rights,
    /// QEMU may not lock so much memory.
    LockedMemory,
    /// The host has not the memory that QEMU takes at once: huge pages, most often.
    Memory,
}

fn remedy(lacks: Option<Lacking>, user: u32) -> String {
    match lacks {
        Some(Lacking::Rights) => format!(
            "; it ran as user {user}: give that user what it names (`chown {user} DISK`) and keep it the guest's by user = \
             {user} in the guest file, or open it to a group of guests.groups in the daemon's configuration (/dev/kvm: kvm)"
        ),
        Some(Lacking::LockedMemory) => {
            "; raise LimitMEMLOCK= of the daemon's unit, or `ulimit -l` before it starts".into()
        }
        Some(Lacking::Memory) => {
            "; free memory there, or add huge pages (/proc/sys/vm/nr_hugepages) if the guest's lie in such"
                .into()
        }
        Some(Lacking::Machine | Lacking::Cpu) | None => String::new(),
    }
}

/// Returns everything in which a waiting QEMU differs from the one that its guest comes from.
pub fn differences(guest: &QemuGuest, waiting: &QemuGuest) -> Vec<Refusal> {
    let pairs = [
        ("machine type", "-machine", &guest.machine, &waiting.machine),
        ("CPU model", "-cpu", &guest.cpu, &waiting.cpu),
        ("accelerator", "-accel", &guest.accelerator, &waiting.accelerator),
    ];
    let differing = pairs.into_iter().filter(|(_, _, ours, theirs)| ours != theirs);
    let mut found: Vec<Refusal> = differing
        .map(|(what, option, ours, theirs)| Refusal {
            what: RefusalKind::Machine,
            reason: format!(
                "the guest has {what} {ours}, and the QEMU that waits for it {theirs}; start that one with \
                 {option} {ours}"
            ),
        })
        .collect();
    // Of a peer that does not say, nothing is known.
    if found.is_empty() && !guest.parts.is_empty() && !waiting.parts.is_empty() {
        let differs = |reason: String| Refusal { what: RefusalKind::Machine, reason };
        found.extend(machine::missing(&guest.parts, &waiting.parts).into_iter().map(|part| {
            differs(format!(
                "the guest has {part}, and the QEMU that waits for it has not; start that one with the same"
            ))
        }));
        found.extend(machine::missing(&waiting.parts, &guest.parts).into_iter().map(|part| {
            differs(format!("the QEMU that waits for the guest has {part}, and the guest has not; start that one without it"))
        }));
    }
    found
}

fn dotted(version: &[u32; 3]) -> String {
    let [major, minor, micro] = version;
    format!("{major}.{minor}.{micro}")
}
