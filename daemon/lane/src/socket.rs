//! What is asked of the kernel about a TCP connection (tcp(7), socket(7)), for lanes and whatever else is connected.

use std::os::fd::{AsFd, AsRawFd};

use socket2::SockRef;

/// Has the kernel, and whoever forwards packets and cares, send this connection's bytes before those of
/// others: `TC_PRIO_INTERACTIVE` of `linux/pkt_sched.h`, and "low delay" of RFC 1349.
pub fn hasten(socket: impl AsFd) {
    const INTERACTIVE: u32 = 6;
    const LOW_DELAY: u32 = 0x10;
    let socket = SockRef::from(&socket);
    // In vain on a socket of another kind, which is then no slower than any. The priority is last:
    // it follows from the type of service otherwise.
    let _ = socket.set_tos_v4(LOW_DELAY);
    let _ = socket.set_tclass_v6(LOW_DELAY);
    let _ = socket.set_priority(INTERACTIVE);
}

/// Has whoever waits for this connection be woken when so many bytes have come, or no more can
/// (`SO_RCVLOWAT`, socket(7)).
pub fn set_low_water(socket: impl AsFd, bytes: usize) {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let (value, length) = ((&raw const bytes).cast(), size_of_val(&bytes) as libc::socklen_t);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the option is an int, which the call reads. In vain on a socket of another kind, whose
    // reader is then woken more often.
    unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, length) };
}

/// What the kernel knows of a TCP connection (tcp(7)); of another kind nothing.
pub fn tcp_info(socket: impl AsFd) -> Option<libc::tcp_info> {
    // SAFETY: all of its fields are numbers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the structure is as long as it is said to be, and an older kernel writes less.
    let result = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    (result == 0).then_some(info)
}

/// Ends whatever uses a connection, on both sides.
pub fn hang_up(socket: impl AsFd) {
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
}

/// Ends a connection whose way is lost, and forgets what was on its way: TCP would try to deliver it for
/// many minutes, keep it in memory for as long, and take up a port with it that comes back.
pub fn reset(socket: impl AsFd) {
    if rustix::net::connect_unspec(&socket).is_err() {
        hang_up(socket);
    }
}
