//! What the configuration says of guests and of their VMMs.

use std::path::PathBuf;

use memlane_api::units::Size;
use memlane_protocol::wire::Label;

/// `[attach]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachConfig {
    /// Guests that VMMs of one user may attach.
    pub guests_per_user: u64,
    /// File descriptors that the daemon holds of one user's VMMs, at the most half of what it may have.
    pub descriptors_per_user: u64,
    /// Memory of one user's guests that the daemon maps, whether it holds anything or not.
    pub memory_per_user: Size,
}

/// `[[network]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Name that the NICs of guests carry, the same on all hosts.
    pub name: Label,
    /// Bridge of this host on which arriving guests are announced.
    pub bridge: String,
}

/// `[guests]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestsConfig {
    /// Where each guest that was started has a folder with its QMP socket and its log.
    pub directory: PathBuf,
    /// Where their RAM lies, a file each: on tmpfs or hugetlbfs.
    pub memory: PathBuf,
    /// `libmemlane_shim.so`, which their QEMU is started with.
    pub shim: PathBuf,
    /// Programs that a guest file may name. Without any, no guest is started.
    pub qemu: Vec<PathBuf>,
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
        }
    }
}
