//! The protocol between the daemon and a VMM on the same host: packets on a `SOCK_SEQPACKET` Unix socket.
//!
//! The VMM connects and says [`VmmHello`], with one descriptor for each region of RAM attached
//! (`SCM_RIGHTS`). The daemon answers [`ToVmm::Welcome`] or [`ToVmm::Refused`], and from then
//! on sends one [`Request`] at a time; the VMM answers each with one [`Reply`]. A VMM whose
//! daemon went away connects again and says in which [`RunState`] its guest is.
//!
//! A VMM that does not know this protocol has a shim in its process. The shim sends [`FromVmm::Shim`] in place of the
//! hello, and knows only [`Request::OpenUserfault`], [`Request::KeptUserfault`] and [`Request::MappedFile`]. The daemon asks the kernel
//! to which process the shim belongs (`SO_PEERCRED`).

mod bond;
mod codec;
mod packet;
mod request;

pub use bond::{Bond, MigrationId};
pub use packet::{
    FromVmm, HANDS_OVER_AGAIN, HANDS_OVER_MEMORY, MAX_PACKET_BYTES, MAX_STATE_BYTES, Reply, RunState, ToVmm,
    VERSIONS, VmmHello,
};
pub use request::Request;
