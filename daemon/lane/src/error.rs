//! Why lanes end.

use std::io;
use std::time::Duration;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::WireError;

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
    /// A compressed frame whose payload is no LZ4 block, or is one of more than the frame's pages.
    #[error("the other end broke the protocol: a frame cannot be decompressed: {0}")]
    Compressed(#[from] lz4_flex::block::DecompressError),
    /// The guest's memory is not there any more.
    #[error("{0}")]
    Memory(io::Error),
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
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }

    /// Why a lane really ended that has used `ram`: to the kernel, memory that is not there any more is a bad
    /// address.
    pub(crate) fn of(self, ram: &GuestRam) -> Self {
        match &self {
            Self::Io { source, .. } if source.raw_os_error() == Some(libc::EFAULT) => {
                ram.note_fault();
                ram.intact().map_err(Self::Memory).err().unwrap_or(self)
            }
            _ => self,
        }
    }
}
