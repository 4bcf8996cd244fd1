//! What the destination of a post-copy migration sends on a lane for faults.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::wire::error::WireError;
use crate::wire::reader::Reader;

/// The length of a [`PageRequest`] in bytes.
pub const PAGE_REQUEST_BYTES: usize = size_of::<RawPageRequest>();

const PAGE_REQUEST_MAGIC: [u8; 4] = *b"MLWt";

/// A page request is what the destination sends on a lane for faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRequest {
    /// The guest waits for the page of this number. The source sends it, or the huge page that it is part of.
    Page(u64),
    /// The destination asks whether the lane still works. The source answers with a frame without runs.
    Keepalive,
}

impl PageRequest {
    /// Returns the [`PAGE_REQUEST_BYTES`] bytes of the request.
    pub fn encode(&self) -> [u8; PAGE_REQUEST_BYTES] {
        let (kind, page) = match *self {
            Self::Page(page) => (REQUEST_PAGE, page),
            Self::Keepalive => (REQUEST_KEEPALIVE, 0),
        };
        let raw = RawPageRequest { magic: PAGE_REQUEST_MAGIC, kind: kind.into(), page: page.into() };
        let mut bytes = [0; PAGE_REQUEST_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Reads a request for a guest of `pages` pages.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one request, or name a page that the guest does not have.
    pub fn decode(bytes: &[u8], pages: u64) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let raw: &RawPageRequest = reader.take("page request")?;
        reader.end()?;
        if raw.magic != PAGE_REQUEST_MAGIC {
            return Err(WireError::Magic {
                what: "page request",
                expected: PAGE_REQUEST_MAGIC,
                found: raw.magic,
            });
        }
        match (raw.kind.get(), raw.page.get()) {
            (REQUEST_PAGE, page) if page < pages => Ok(Self::Page(page)),
            (REQUEST_PAGE, found) => {
                Err(WireError::TooLarge { what: "number of a requested page", found, limit: pages })
            }
            (REQUEST_KEEPALIVE, _) => Ok(Self::Keepalive),
            (found, _) => Err(WireError::Unknown { what: "kind of a page request", found }),
        }
    }
}

const REQUEST_PAGE: u32 = 1;
const REQUEST_KEEPALIVE: u32 = 2;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPageRequest {
    magic: [u8; 4],
    kind: U32,
    page: U64,
}
