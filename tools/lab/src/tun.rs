//! Interfaces whose packets a program carries; see tuntap.rst of the kernel's documentation.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use crate::namespace::Namespace;

/// The length of the longest packet that a tun delivers, in bytes. It includes the header in front of it (`struct
/// virtio_net_hdr`) that says what the device would do to the packet: checksums, and cutting it into segments.
pub(crate) const MAX_PACKET_BYTES: usize = (64 << 10) + 64;

/// A tun interface. It is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Tun {
    file: OwnedFd,
}

impl Tun {
    /// Makes an interface of this name inside `namespace`. Large segments pass whole, as between the ends of a veth
    /// pair.
    pub(crate) fn create(namespace: &Namespace, name: &str) -> anyhow::Result<Self> {
        Self::of_kind(libc::IFF_TUN, namespace, name)
    }

    /// As [`Self::create`], for an interface whose packets have Ethernet's headers: a tap.
    pub(crate) fn create_tap(namespace: &Namespace, name: &str) -> anyhow::Result<Self> {
        Self::of_kind(libc::IFF_TAP, namespace, name)
    }

    fn of_kind(kind: libc::c_int, namespace: &Namespace, name: &str) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        // A tun belongs to the namespace of whoever opens the file.
        let created = namespace.run_in(|| Self::open(kind, name))?;
        created.with_context(|| format!("making the tun {name} (is there a /dev/net/tun?)"))
    }

    fn open(kind: libc::c_int, name: &str) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(c"/dev/net/tun", flags, Mode::empty())?;
        // SAFETY: a request of zeros is a valid one to fill in.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        assert!(name.len() < request.ifr_name.len(), "{name} is too long for an interface");
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let flags = kind | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the request is one for this ioctl, and outlives it.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        // SAFETY: this ioctl takes a number.
        let set =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
        checked(set)?;
        Ok(Self { file })
    }

    /// Gives the interface a carrier, or takes it away, as a cable does that is pulled at its other end.
    pub(crate) fn set_carrier(&self, on: bool) -> io::Result<()> {
        let on = libc::c_int::from(on);
        // SAFETY: the number that this ioctl reads outlives it.
        checked(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETCARRIER, &raw const on) })
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
