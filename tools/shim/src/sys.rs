//! The calls to the kernel and to the C library, declared here so that no crate is needed for them.
//!
//! Only functions that every C library of the last decade has: with one that is missing, the
//! program itself would not start. Newer system calls go by their numbers.

use std::ffi::{c_int, c_long, c_uint, c_ulong, c_void};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{null, null_mut};

const AF_UNIX: u16 = 1;
const SOCK_SEQPACKET_CLOEXEC: c_int = 5 | O_CLOEXEC;
const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;
const MSG_NOSIGNAL: c_int = 0x4000;
const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;
const MSG_TRUNC: c_int = 0x20;
const SIG_BLOCK: c_int = 0;
const SIG_SETMASK: c_int = 2;
const O_CLOEXEC: c_int = 0o2_000_000;
const O_NONBLOCK: c_int = 0o4_000;
/// The request `_IO(0xAA, 0x00)` of `linux/userfaultfd.h`.
const USERFAULTFD_IOC_NEW: c_ulong = 0xaa00;
#[cfg(target_arch = "x86_64")]
const SYS_USERFAULTFD: c_long = 323;
/// The number of `close_range`, which is the same on all architectures.
const SYS_CLOSE_RANGE: c_long = 436;
const CLOSE_RANGE_UNSHARE: c_uint = 2;
/// The numbers of `pidfd_open` and `pidfd_getfd`, which are the same on all architectures.
const SYS_PIDFD_OPEN: c_long = 434;
const SYS_PIDFD_GETFD: c_long = 438;

/// A function of `pthread_atfork`.
type ForkHandler = extern "C" fn();

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn connect(socket: c_int, address: *const Address, bytes: c_uint) -> c_int;
    fn sendmsg(socket: c_int, message: *const MsgHdr, flags: c_int) -> isize;
    fn recvmsg(socket: c_int, message: *mut MsgHdr, flags: c_int) -> isize;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn sigfillset(set: *mut SigSet) -> c_int;
    fn pthread_atfork(
        before: Option<ForkHandler>,
        in_parent: Option<ForkHandler>,
        in_child: Option<ForkHandler>,
    ) -> c_int;
    fn pthread_sigmask(how: c_int, set: *const SigSet, old: *mut SigSet) -> c_int;
}

/// Gives the calling thread a table of descriptors of its own, with none in it (Linux 5.9).
pub(crate) fn leave_descriptor_table() -> Result<()> {
    // SAFETY: the thread shares the table with the program until here, whose descriptors stay as
    // they are; the thread itself has opened none yet.
    match unsafe { syscall(SYS_CLOSE_RANGE, 0 as c_uint, c_uint::MAX, CLOSE_RANGE_UNSHARE) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// Has the C library call a function in each child that is forked from now on. Where it cannot, children have no shim.
pub(crate) fn when_forked(in_child: ForkHandler) {
    // SAFETY: the function lives as long as the library, which is never unloaded.
    unsafe { pthread_atfork(None, None, Some(in_child)) };
}

/// Opens a userfaultfd of this process, with the rights of the process that opened `device` (`/dev/userfaultfd`).
pub(crate) fn userfaultfd_of(device: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: the ioctl takes flags by value, and touches no memory.
    owned(unsafe { ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK) })
}

/// Opens a userfaultfd of this process, with its own rights.
pub(crate) fn userfaultfd() -> Result<OwnedFd> {
    // SAFETY: the system call takes flags by value, and touches no memory.
    owned(unsafe { syscall(SYS_USERFAULTFD, O_CLOEXEC | O_NONBLOCK) } as c_int)
}

/// The program's own descriptors, which this thread's table does not have.
pub(crate) struct ProgramDescriptors(OwnedFd);

impl ProgramDescriptors {
    /// Gets at the descriptors of this process (Linux 5.3).
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: the system call takes numbers, and touches no memory.
        owned(unsafe { syscall(SYS_PIDFD_OPEN, std::process::id() as c_int, 0 as c_uint) } as c_int).map(Self)
    }

    /// Copies one of them, with all the rights that the program has by it (Linux 5.6).
    pub(crate) fn copy(&self, number: RawFd) -> Result<OwnedFd> {
        let pidfd = self.0.as_raw_fd();
        // SAFETY: the system call takes numbers, and touches no memory.
        owned(unsafe { syscall(SYS_PIDFD_GETFD, pidfd, number as c_int, 0 as c_uint) } as c_int)
    }
}

/// Keeps all signals from the calling thread until it is dropped. The C library leaves out those
/// that it needs itself, to change the user of all threads.
pub(crate) struct SignalsBlocked(SigSet);

impl SignalsBlocked {
    /// Blocks all signals.
    pub(crate) fn new() -> Self {
        let (mut all, mut before) = (SigSet([0; 16]), SigSet([0; 16]));
        // SAFETY: both are of the size that the C library gives a sigset_t.
        unsafe {
            sigfillset(&mut all);
            pthread_sigmask(SIG_BLOCK, &all, &mut before);
        }
        Self(before)
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set is what `new` was given.
        unsafe { pthread_sigmask(SIG_SETMASK, &self.0, null_mut()) };
    }
}

/// The path of a Unix socket (`struct sockaddr_un`).
#[repr(C)]
pub(crate) struct Address {
    family: u16,
    path: [u8; 108],
}

impl Address {
    /// Makes an address; returns `None` for a path that cannot be one of a socket: empty, too long, or with a zero in
    /// it.
    pub(crate) fn new(path: &[u8]) -> Option<Self> {
        let mut address = Self { family: AF_UNIX, path: [0; 108] };
        let (room, _last_is_zero) = address.path.split_at_mut(107);
        room.get_mut(..path.len())?.copy_from_slice(path);
        (!path.is_empty() && !path.contains(&0)).then_some(address)
    }
}

/// A connected `SOCK_SEQPACKET` socket.
pub(crate) struct Socket(OwnedFd);

impl Socket {
    /// Connects to the socket at `address`.
    pub(crate) fn connect(address: &Address) -> Result<Self> {
        // SAFETY: plain numbers.
        let socket = owned(unsafe { socket(AF_UNIX.into(), SOCK_SEQPACKET_CLOEXEC, 0) })?;
        // SAFETY: the address is as long as is said.
        match unsafe { connect(socket.as_raw_fd(), address, size_of::<Address>() as c_uint) } {
            0 => Ok(Self(socket)),
            _ => Err(Error::last_os_error()),
        }
    }

    /// Sends a packet, and descriptors with it.
    pub(crate) fn send_with<const N: usize>(&self, packet: &[u8], descriptors: &[OwnedFd; N]) -> Result<()> {
        let numbers = descriptors.each_ref().map(|descriptor| descriptor.as_raw_fd());
        self.send_packet(packet, Some(&mut ControlMessage::new(numbers)))
    }

    /// Sends a packet.
    pub(crate) fn send(&self, packet: &[u8]) -> Result<()> {
        self.send_packet::<0>(packet, None)
    }

    fn send_packet<const N: usize>(
        &self,
        packet: &[u8],
        control: Option<&mut ControlMessage<N>>,
    ) -> Result<()> {
        // sendmsg does not write to the packet.
        let mut part = IoVec { base: packet.as_ptr().cast_mut().cast(), bytes: packet.len() };
        let message = MsgHdr::new(&mut part, control);
        // SAFETY: the message points to a packet and descriptors that live until the call returns.
        again(|| unsafe { sendmsg(self.0.as_raw_fd(), &message, MSG_NOSIGNAL) })?;
        Ok(())
    }

    /// Waits for a packet, and returns it; it is empty at the end of the connection. Of the descriptors that come with
    /// it, one is returned and the kernel closes the others. A packet that is longer than the buffer is an error.
    pub(crate) fn receive<'a>(&self, buffer: &'a mut [u8]) -> Result<(&'a [u8], Option<OwnedFd>)> {
        let mut control = ControlMessage::new([-1]);
        let mut part = IoVec { base: buffer.as_mut_ptr().cast(), bytes: buffer.len() };
        let mut message = MsgHdr::new(&mut part, Some(&mut control));
        // SAFETY: the message points to a buffer and room for one descriptor, both as long as is
        // said, which nobody else uses until the call returns.
        let bytes = again(|| unsafe { recvmsg(self.0.as_raw_fd(), &mut message, MSG_CMSG_CLOEXEC) })?;
        let (filled, flags) = (message.control_bytes, message.flags);
        let is_descriptor =
            filled == ControlMessage::<1>::BYTES && (control.level, control.kind) == (SOL_SOCKET, SCM_RIGHTS);
        // SAFETY: the kernel has just made the descriptor for this packet; nobody else has it.
        let descriptor = is_descriptor.then(|| unsafe { OwnedFd::from_raw_fd(control.descriptors[0]) });
        match buffer.get(..bytes) {
            Some(packet) if flags & MSG_TRUNC == 0 => Ok((packet, descriptor)),
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }
}

/// `sigset_t`: 1024 bits in glibc, the most of any C library.
#[repr(C)]
struct SigSet([c_ulong; 16]);

/// `struct iovec`.
#[repr(C)]
struct IoVec {
    base: *mut c_void,
    bytes: usize,
}

/// `struct msghdr`.
#[repr(C)]
struct MsgHdr {
    name: *const c_void,
    name_bytes: c_uint,
    parts: *mut IoVec,
    part_count: usize,
    control: *mut c_void,
    control_bytes: usize,
    flags: c_int,
}

impl MsgHdr {
    fn new<const N: usize>(part: &mut IoVec, control: Option<&mut ControlMessage<N>>) -> Self {
        let (control, control_bytes) = match control {
            Some(control) => ((control as *mut ControlMessage<N>).cast(), ControlMessage::<N>::BYTES),
            None => (null_mut(), 0),
        };
        Self { name: null(), name_bytes: 0, parts: part, part_count: 1, control, control_bytes, flags: 0 }
    }
}

/// `struct cmsghdr`, with descriptors.
#[repr(C)]
struct ControlMessage<const N: usize> {
    bytes: usize,
    level: c_int,
    kind: c_int,
    descriptors: [RawFd; N],
}

impl<const N: usize> ControlMessage<N> {
    /// The length of the message without the padding that would align the next one. That padding has room for another
    /// descriptor.
    const BYTES: usize = size_of::<usize>() + 2 * size_of::<c_int>() + N * size_of::<RawFd>();

    fn new(descriptors: [RawFd; N]) -> Self {
        Self { bytes: Self::BYTES, level: SOL_SOCKET, kind: SCM_RIGHTS, descriptors }
    }
}

fn owned(fd: c_int) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the caller passes on what a call has just opened, and nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Repeats a call until it is not interrupted.
fn again(mut call: impl FnMut() -> isize) -> Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => match Error::last_os_error() {
                error if error.kind() == ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
