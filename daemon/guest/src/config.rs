//! This module holds what the configuration says of guests and of their VMMs.

use std::path::PathBuf;

use memlane_api::units::Size;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::starter::GuestUsers;

/// The `[attach]` table of the configuration limits what the VMMs of one user may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachConfig {
    /// The VMMs of one user may attach this many guests.
    pub guests_per_user: u64,
    /// The daemon holds this many file descriptors of one user's VMMs, at the most half of what it may have.
    pub descriptors_per_user: u64,
    /// The daemon maps this much memory of one user's guests, with or without contents.
    pub memory_per_user: Size,
}

/// A `[[network]]` of the configuration is a network that guests are plugged into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// This is the name that the NICs of guests carry, which is the same on all hosts.
    pub name: Label,
    /// Arriving guests are announced on this bridge of the host.
    pub bridge: String,
}

/// The `[guests]` table of the configuration is about the guests that this daemon starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestsConfig {
    /// Each guest that was started has a folder here, with its QMP socket and its log.
    pub directory: PathBuf,
    /// The guests' RAM lies in this directory of a tmpfs or hugetlbfs, a file for each guest.
    pub memory: PathBuf,
    /// This is the path of `libmemlane_shim.so`, which the guests' QEMU is started with.
    pub shim: PathBuf,
    /// A guest file may name these programs. With an empty list no guest is started.
    pub qemu: Vec<PathBuf>,
    /// Each guest's QEMU runs as one of these users, which no other guest has at the same time.
    pub users: GuestUsers,
    /// QEMU is in these groups besides, by their numbers.
    pub groups: Vec<u32>,
    /// systemd listens here, and starts a starter for whoever connects.
    pub starter_socket: PathBuf,
    /// This is the path of the starter, which a daemon that is root runs where nobody listens at the socket.
    pub starter: PathBuf,
}

/// What the configuration says of QEMUs.
#[derive(Clone, Debug)]
pub struct QemuSettings {
    /// Guests that this daemon starts.
    pub guests: GuestsConfig,
    /// Networks that guests are plugged into.
    pub networks: Vec<NetworkConfig>,
    /// User ids whose VMMs may attach guests.
    pub attach_users: Vec<u32>,
    /// Where the shims in VMMs connect.
    pub attach_socket: PathBuf,
}

/// Finds the number of a user or a group by its name, in the file of the system that lists them.
pub fn number_of(name: &str, file: &str) -> Option<u32> {
    let lines = std::fs::read_to_string(file).unwrap_or_default();
    let fields = lines.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut found = fields.filter(|fields| fields.len() > 2 && fields[0] == name);
    found.next().and_then(|fields| fields[2].parse().ok())
}

impl Default for AttachConfig {
    fn default() -> Self {
        // A process has 128 TiB of addresses (x86-64 with four levels of page tables).
        Self { guests_per_user: 1024, descriptors_per_user: 16 << 10, memory_per_user: Size(16 << 40) }
    }
}

impl Default for GuestsConfig {
    fn default() -> Self {
        Self {
            directory: "/run/memlane/guests".into(),
            memory: "/dev/shm/memlane".into(),
            shim: "/usr/lib/memlane/libmemlane_shim.so".into(),
            qemu: vec!["/usr/bin/qemu-system-x86_64".into()],
            users: GuestUsers::default(),
            // Whoever is in it may use /dev/kvm, as udev sets that up.
            groups: number_of("kvm", "/etc/group").into_iter().collect(),
            starter_socket: "/run/memlane-guest.sock".into(),
            starter: "/usr/lib/memlane/memlane-starter".into(),
        }
    }
}
