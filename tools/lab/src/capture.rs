//! Frames as they arrive at an interface.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_recv_buffer_size_force, set_socket_timeout};
use rustix::net::{RecvFlags, recv};

/// Largest frame: TCP hands over up to 64 KiB at once to interfaces that are none of hardware.
const MAX_FRAME_BYTES: usize = 68 << 10;
/// This many bytes of frames may wait to be looked at.
const KEPT_BYTES: usize = 64 << 20;
const ETH_P_ALL: u16 = 0x0003;
const ETH_P_RARP: u16 = 0x8035;

/// A packet socket. It queues frames from the time it was opened on, the earliest first; where there are too many,
/// the latest are lost.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
}

/// An Ethernet frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EthernetFrame {
    /// All bytes of the frame, without the checksum.
    pub bytes: Vec<u8>,
}

impl Capture {
    /// Captures what arrives at `interface`, and not what leaves through it. The interface is looked for in the
    /// namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If there is no such interface, or the system refuses: `CAP_NET_RAW` is needed.
    pub fn open(interface: &str) -> io::Result<Self> {
        let name = CString::new(interface)?;
        // SAFETY: the name ends in NUL.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        // Of no protocol yet, so that nothing of other interfaces is queued before the socket is bound.
        // SAFETY: a plain system call; its result is checked before it is owned.
        let descriptor = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        checked(descriptor)?;
        // SAFETY: just opened, and owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };

        let on: libc::c_int = 1;
        let (level, option) = (libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING);
        // SAFETY: the value is of the length given.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as u32,
            )
        };
        checked(set)?;

        // What comes while the program has no processor is kept.
        set_socket_recv_buffer_size_force(&socket, KEPT_BYTES)?;
        // SAFETY: an address of zeros is a valid one to fill in.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ETH_P_ALL.to_be();
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the address is of the length given.
        checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
        Ok(Self { socket })
    }

    /// Returns the next frame; `None` if none comes within `timeout`.
    ///
    /// # Errors
    ///
    /// If the interface is gone.
    pub fn next(&self, timeout: Duration) -> io::Result<Option<EthernetFrame>> {
        // Zero would be no timeout at all.
        let timeout = timeout.max(Duration::from_millis(1));
        set_socket_timeout(&self.socket, Timeout::Recv, Some(timeout))?;
        let mut bytes = vec![0; MAX_FRAME_BYTES];
        loop {
            match recv(&self.socket, &mut bytes[..], RecvFlags::empty()) {
                Ok((count, _)) => {
                    bytes.truncate(count);
                    return Ok(Some(EthernetFrame { bytes }));
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns the next frame that `mac` has sent; `None` if neither it nor any other frame comes within `timeout`.
    ///
    /// # Errors
    ///
    /// If the interface is gone.
    pub fn next_from(&self, mac: [u8; 6], timeout: Duration) -> io::Result<Option<EthernetFrame>> {
        loop {
            match self.next(timeout)? {
                Some(frame) if frame.source() != Some(mac) => {}
                found => return Ok(found),
            }
        }
    }
}

impl EthernetFrame {
    /// Returns the hardware address of the sender.
    pub fn source(&self) -> Option<[u8; 6]> {
        self.bytes.get(6..12)?.try_into().ok()
    }

    /// Returns the EtherType; 0 if the frame is cut short.
    pub fn kind(&self) -> u16 {
        self.bytes.get(12..14).map_or(0, |kind| u16::from_be_bytes([kind[0], kind[1]]))
    }

    /// Returns whether this is a RARP frame, by which hosts announce guests that have arrived.
    pub fn is_rarp(&self) -> bool {
        self.kind() == ETH_P_RARP
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
