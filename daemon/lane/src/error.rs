//! The reasons why a lane ends.

use std::io;
use std::time::Duration;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::WireError;
use memlane_tls::TlsError;

/// The reason why a lane ended.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// A system call failed.
    #[error("cannot {doing}: {source}")]
    Io {
        /// The action that failed, as in "cannot send pages".
        doing: &'static str,
        /// The error that the kernel returned.
        source: io::Error,
    },
    /// The other end closed the connection.
    #[error("the other end closed the connection")]
    HungUp,
    /// The other end has not answered for too long.
    #[error("the other end has not answered for {0:.1?}; check the network link between the hosts")]
    Silent(Duration),
    /// The other end sent bytes that no lane sends.
    #[error("the other end broke the protocol: {0}")]
    Protocol(#[from] WireError),
    /// What came does not open, or cannot be sealed.
    #[error(transparent)]
    Tls(TlsError),
    /// The payload of a compressed frame is not an LZ4 block, or is a block that is larger than the frame's pages.
    #[error("the other end broke the protocol: a frame cannot be decompressed: {0}")]
    Compressed(#[from] lz4_flex::block::DecompressError),
    /// The guest's memory is gone, because its file was truncated.
    #[error("{0}")]
    Memory(io::Error),
    /// A frame came out of order, or an acknowledgement names a frame that was not sent.
    #[error("the other end broke the protocol: frame {found} where {expected} is next")]
    Sequence {
        /// The number of the next frame, or of the last one that may be acknowledged.
        expected: u64,
        /// The number that the other end sent.
        found: u64,
    },
}

impl From<TlsError> for LaneError {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Closed => Self::HungUp,
            error => Self::Tls(error),
        }
    }
}

impl LaneError {
    /// Returns a function that makes an error of the system call that failed at `doing`.
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }

    /// Returns [`Self::Memory`] in place of a "bad address" error if memory of `ram` is gone: that is how the kernel
    /// reports such memory.
    pub(crate) fn or_lost_memory(self, ram: &GuestRam) -> Self {
        match &self {
            Self::Io { source, .. } if source.raw_os_error() == Some(libc::EFAULT) => {
                ram.note_fault();
                ram.intact().map_err(Self::Memory).err().unwrap_or(self)
            }
            _ => self,
        }
    }
}
