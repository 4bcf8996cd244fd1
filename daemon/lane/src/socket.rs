//! Options and state of TCP connections (tcp(7), socket(7)), for lanes and other connections of the daemon.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use socket2::SockRef;

/// Asks the kernel, and routers that look at such marks, to send this connection's bytes before those of others: sets
/// `TC_PRIO_INTERACTIVE` of `linux/pkt_sched.h`, and "low delay" of RFC 1349.
pub fn prioritize(socket: impl AsFd) {
    const INTERACTIVE: u32 = 6;
    const LOW_DELAY: u32 = 0x10;
    let socket = SockRef::from(&socket);
    // A socket of another kind refuses this, and is then as fast as any other. The priority is set last, because the
    // kernel derives it from the type of service otherwise.
    let _ = socket.set_tos_v4(LOW_DELAY);
    let _ = socket.set_tclass_v6(LOW_DELAY);
    let _ = socket.set_priority(INTERACTIVE);
}

/// Wakes a thread that waits for this connection only when so many bytes have come, or no more fit into the socket's
/// buffer (`SO_RCVLOWAT`, socket(7)).
pub fn set_low_water(socket: impl AsFd, bytes: usize) {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let (value, length) = ((&raw const bytes).cast(), size_of_val(&bytes) as libc::socklen_t);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the option is an int, which the call reads. A socket of another kind refuses it, and its
    // reader is then woken more often.
    unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, length) };
}

/// Returns the kernel's information about a TCP connection (tcp(7)); `None` for a socket of another kind.
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

/// Returns how many bytes the kernel at the other end of a TCP connection has not acknowledged yet (`SIOCOUTQ`, tcp(7));
/// `None` for a socket of another kind.
pub fn unacknowledged_bytes(socket: impl AsFd) -> Option<u32> {
    let mut bytes: libc::c_int = 0;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the call writes an int.
    let result = unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut bytes) };
    (result == 0).then(|| bytes.try_into().unwrap_or_default())
}

/// Returns the shortest recent round trip of a TCP connection; `None` for a socket of another kind.
pub fn shortest_round_trip(socket: impl AsFd) -> Option<Duration> {
    tcp_info(socket).map(|info| shortest_of(&info))
}

/// Returns the shortest recent round trip.
pub(crate) fn shortest_of(info: &libc::tcp_info) -> Duration {
    // Before the first round trip the kernel reports the largest number as the shortest one.
    Duration::from_micros(info.tcpi_min_rtt.min(info.tcpi_rtt).into())
}

/// Shuts a connection down in both directions, so that both sides stop to use it.
pub fn hang_up(socket: impl AsFd) {
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
}

/// Resets a connection over a broken network path, and discards the bytes in flight. Otherwise TCP would try to deliver
/// them for many minutes, keep them in memory for as long, and load the port with them when it comes back.
pub fn reset(socket: impl AsFd) {
    if rustix::net::connect_unspec(&socket).is_err() {
        hang_up(socket);
    }
}
