//! The Debian of a host of VMs, as an operator would have it before Memlane is installed.

use super::Tree;

impl Tree {
    /// Debian 12 with systemd, QEMU 7.2, libvirt 9.0 and Prometheus, installed and without a kernel.
    ///
    /// Memlane's package can be installed in it without an archive: all that it depends on is there. There is no host's name,
    /// no key of a host, and no address; the lab gives it these.
    pub const HOST: Self = Self {
        role: "host",
        suite: "bookworm",
        backported: false,
        installed: true,
        packages: PACKAGES,
        masked: MASKED,
        asleep: ASLEEP,
    };
}

const PACKAGES: &[&str] = &[
    // Process 1 and what it needs to know devices. Units are what the tests are about.
    "systemd",
    "systemd-sysv",
    "udev",
    // Transient units are asked for over D-Bus; QEMUs of other users run in those users' managers, which pam_systemd starts.
    "dbus",
    "dbus-user-session",
    "libpam-systemd",
    // Decides who may ask systemd and libvirt for what.
    "polkitd",
    // Ports, bridges, traffic control, and whether hosts reach each other.
    "iproute2",
    "iputils-ping",
    // Modules of the VMs' kernel, its settings, and its processes.
    "kmod",
    "procps",
    // Disks that are slow or lie about what they have written, and their file systems.
    "dmsetup",
    "e2fsprogs",
    // The harness reaches VMs by it.
    "openssh-server",
    // It confines libvirt's QEMU, which must be allowed the shim's files.
    "apparmor",
    // The VMM that people have. libvirt's driver for it is only recommended by libvirt.
    "qemu-system-x86",
    "libvirt-daemon-system",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    // It scrapes the daemons; promtool comes with it.
    "prometheus",
];

/// The units that never start. They would take the time of an emulated processor at any moment, or look for a network.
/// Prometheus is started by the test that needs it, with its own configuration.
const MASKED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "logrotate.timer",
    "systemd-timesyncd.service",
    "prometheus.service",
];

/// The units that start when something needs them, and not with the host: libvirt takes seconds on an emulated processor, and its
/// sockets start it.
const ASLEEP: &[&str] = &["libvirtd.service", "libvirt-guests.service"];
