//! The data plane: lanes that carry pages, one thread and one io_uring each.
//!
//! At the source every lane of a migration works from one [`Outbound`]: it claims a run of
//! pages when its own window has room, so a slow port takes less and nothing is assigned
//! ahead. At the destination every lane writes into one [`Inbound`], straight into guest memory.

mod encode;
mod evidence;
mod message;
mod receive;
mod ring;
mod send;
mod stats;
mod zero;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PageSet;
use memlane_protocol::wire::WireError;
use memlane_protocol::wire::frame::MAX_PAYLOAD_BYTES;
use tokio::sync::Notify;

pub use receive::Receiver;
pub use send::Sender;
pub use stats::LaneStats;

/// Why a lane ended before its work was done.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// A system call failed.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The other end closed the connection.
    #[error("the other end hung up")]
    HungUp,
    /// Nothing was acknowledged for too long.
    #[error("nothing was acknowledged for {0:.1?}; is the link down?")]
    Silent(Duration),
    /// The other end sent what no lane sends.
    #[error("the other end broke the protocol: {0}")]
    Protocol(#[from] WireError),
    /// A frame out of order, or an acknowledgement of what was not sent.
    #[error("the other end broke the protocol: frame {found} where {expected} is next")]
    Sequence {
        /// The number that comes next (or the last that may be acknowledged).
        expected: u64,
        /// The number found.
        found: u64,
    },
}

impl LaneError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// What the lanes of one migration share at the source.
pub struct Outbound {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// Pages to send.
    pub dirty: PageSet,
    /// Pages sent and not yet acknowledged; nobody claims them meanwhile.
    pub in_flight: PageSet,
    /// Set while the guest stands still: frames then carry a checksum.
    pub still: AtomicBool,
    /// Rung when a lane finds nothing to claim, has nothing in flight, or ends.
    pub bell: Notify,
    /// Most bytes in one frame; less where little is left, so that all lanes get some of it.
    frame_bytes: AtomicU64,
    /// Rung by the migration when there is work again: one eventfd a lane.
    wakers: Vec<OwnedFd>,
}

impl Outbound {
    /// For `lanes` lanes that send from `ram`.
    pub fn new(ram: Arc<GuestRam>, lanes: usize) -> io::Result<Self> {
        let wakers = (0..lanes)
            .map(|_| Ok(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            dirty: PageSet::new(ram.pages()),
            in_flight: PageSet::new(ram.pages()),
            still: AtomicBool::new(false),
            bell: Notify::new(),
            frame_bytes: AtomicU64::new(MAX_PAYLOAD_BYTES),
            wakers,
            ram,
        })
    }

    /// Tells the lanes that there are pages to claim: about `pages` of them.
    pub fn wake(&self, pages: u64) {
        const SMALLEST: u64 = 64 << 10;
        let share = pages * memlane_protocol::PAGE_SIZE / (2 * self.wakers.len().max(1) as u64);
        self.frame_bytes.store(share.clamp(SMALLEST, MAX_PAYLOAD_BYTES), Ordering::Relaxed);
        for waker in &self.wakers {
            // An eventfd that is already rung refuses nothing but a counter overflow.
            let _ = rustix::io::write(waker, &1u64.to_ne_bytes());
        }
    }

    /// Whether all pages handed out so far have been acknowledged.
    pub fn all_acknowledged(&self) -> bool {
        self.dirty.is_empty() && self.in_flight.is_empty()
    }
}

/// What the lanes of one migration share at the destination.
pub struct Inbound {
    /// The memory that the guest will have.
    pub ram: Arc<GuestRam>,
}
