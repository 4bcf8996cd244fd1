//! What flows on a lane: frames of pages to the destination, and acknowledgements back.
//!
//! A frame is a [header](FRAME_HEADER_BYTES), a table of runs, and the bytes of the runs that
//! carry any, in the table's order. The header and the table are small and read first, so that
//! the bytes can be received straight into guest memory.
//!
//! In place of those bytes a frame may carry one LZ4 block (without a length in front) that decompresses to exactly as
//! many bytes. A lane for faults never carries compressed frames.

mod page_request;

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::WireError;
use super::reader::{Reader, put};
use crate::PAGE_SIZE;

pub use page_request::{PAGE_REQUEST_BYTES, PageRequest};

/// The length of a frame's header in bytes.
pub const FRAME_HEADER_BYTES: usize = size_of::<RawFrame>();
/// The length of one entry of the table of runs in bytes.
pub const RUN_BYTES: usize = size_of::<RawRun>();
/// The largest number of runs in one frame.
pub const MAX_RUNS: usize = 256;
/// The largest number of bytes of pages in one frame, compressed or not. It is a huge page, which post-copy has to place
/// in one piece.
pub const MAX_PAYLOAD_BYTES: u64 = 2 << 20;
/// The largest number of pages in one run that carries no bytes. It is 1 GiB of memory.
pub const MAX_ZERO_PAGES: u64 = 1 << 18;
/// The length of an acknowledgement in bytes.
pub const ACK_BYTES: usize = size_of::<RawAck>();

const FRAME_MAGIC: [u8; 4] = *b"MLFr";
const ACK_MAGIC: [u8; 4] = *b"MLAk";

/// A run is a number of consecutive pages that are sent under one descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The numbers of the pages.
    pub pages: Range<u64>,
    /// What the frame says about the pages.
    pub content: Content,
}

/// What a frame says about a run's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The bytes of the pages follow in the frame.
    Data,
    /// The pages are zero, and no bytes follow.
    Zero,
    /// The pages are zero and take no memory at the source, so that they need none at the destination either. No bytes
    /// follow.
    Hole,
}

/// The header of a frame, after it was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The number of the frame on its lane, from 1.
    pub sequence: u64,
    /// The number of entries in the table of runs, at most [`MAX_RUNS`].
    pub runs: usize,
    /// The number of bytes that follow the table, at most [`MAX_PAYLOAD_BYTES`].
    pub payload_bytes: u64,
    /// The CRC32C of the pages' bytes, as they are before they are compressed. It is only there while the guest is
    /// paused, because live pages change while the sum is computed.
    pub checksum: Option<u32>,
    /// Whether the payload is an LZ4 block, which is shorter than the pages' bytes.
    pub compressed: bool,
}

/// An acknowledgement says that all frames up to one have been written to guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The number of the last of these frames.
    pub sequence: u64,
}

impl Run {
    /// Returns how many bytes the run takes in its frame's payload before that is compressed.
    pub fn payload_bytes(&self) -> u64 {
        match self.content {
            Content::Data => (self.pages.end - self.pages.start) * PAGE_SIZE,
            Content::Zero | Content::Hole => 0,
        }
    }
}

/// Returns how many bytes of pages a frame with these runs brings.
pub fn contents_bytes(runs: &[Run]) -> u64 {
    runs.iter().map(Run::payload_bytes).sum()
}

/// Writes header and table of a frame with these runs to `out`, which is cleared first.
/// Returns the payload's length in bytes.
///
/// # Panics
///
/// Panics if the runs exceed the limits above or one is empty; the sender keeps the limits.
pub fn encode_head(out: &mut Vec<u8>, sequence: u64, runs: &[Run], checksum: Option<u32>) -> u64 {
    let frame = Frame {
        sequence,
        runs: runs.len(),
        payload_bytes: contents_bytes(runs),
        checksum,
        compressed: false,
    };
    frame.encode(out, runs);
    frame.payload_bytes
}

/// Writes header and table as [`encode_head`] does, for a frame whose payload is an LZ4 block of `payload_bytes`.
///
/// # Panics
///
/// Panics as [`encode_head`] does, and if the block is not shorter than the pages' bytes.
pub fn encode_compressed_head(
    out: &mut Vec<u8>,
    sequence: u64,
    runs: &[Run],
    checksum: Option<u32>,
    payload_bytes: u64,
) {
    assert!((1..contents_bytes(runs)).contains(&payload_bytes), "a block that is not shorter");
    Frame { sequence, runs: runs.len(), payload_bytes, checksum, compressed: true }.encode(out, runs);
}

impl Frame {
    /// Reads a header of [`FRAME_HEADER_BYTES`] on a lane where frames are not compressed.
    ///
    /// # Errors
    ///
    /// Returns an error if the header is not valid, or says that the frame is compressed.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        Self::read(bytes, HAS_CHECKSUM)
    }

    /// Reads a header of [`FRAME_HEADER_BYTES`] on a lane where frames may be compressed.
    ///
    /// # Errors
    ///
    /// Returns an error if the header is not valid.
    pub fn decode_any(bytes: &[u8]) -> Result<Self, WireError> {
        Self::read(bytes, HAS_CHECKSUM | COMPRESSED)
    }

    fn read(bytes: &[u8], known_flags: u16) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let raw: &RawFrame = reader.take("frame header")?;
        reader.end()?;
        if raw.magic != FRAME_MAGIC {
            return Err(WireError::Magic { what: "frame", expected: FRAME_MAGIC, found: raw.magic });
        }
        let (flags, runs) = (raw.flags.get(), raw.runs.get());
        if flags & !known_flags != 0 {
            return Err(WireError::Unknown { what: "frame flags", found: flags.into() });
        }
        let limit = |what, found: u64, limit: u64| match found > limit {
            true => Err(WireError::TooLarge { what, found, limit }),
            false => Ok(()),
        };
        limit("number of runs in a frame", runs.into(), MAX_RUNS as u64)?;
        limit("length of a frame", raw.payload_bytes.get().into(), MAX_PAYLOAD_BYTES)?;
        Ok(Self {
            sequence: raw.sequence.get(),
            runs: runs.into(),
            payload_bytes: raw.payload_bytes.get().into(),
            checksum: (flags & HAS_CHECKSUM != 0).then_some(raw.checksum.get()),
            compressed: flags & COMPRESSED != 0,
        })
    }

    /// Reads the table that follows this header into `runs`, which is cleared first. `pages` is the number of the
    /// guest's pages.
    ///
    /// # Errors
    ///
    /// Returns an error if a run does not lie below `pages`, or the runs are not together as long as the header says.
    /// Compressed runs must be longer than that, and within the same limit.
    pub fn decode_runs(&self, table: &[u8], pages: u64, runs: &mut Vec<Run>) -> Result<(), WireError> {
        runs.clear();
        let mut reader = Reader::new(table);
        let raw = reader.list::<RawRun>("table of runs", self.runs as u64, MAX_RUNS)?;
        reader.end()?;
        let mut contents_bytes = 0;
        for run in raw {
            let (first, count) = (run.first.get(), u64::from(run.pages.get()));
            let (content, most) = match run.content.get() {
                DATA => (Content::Data, MAX_PAYLOAD_BYTES / PAGE_SIZE),
                ZERO => (Content::Zero, MAX_ZERO_PAGES),
                HOLE => (Content::Hole, MAX_ZERO_PAGES),
                other => return Err(WireError::Unknown { what: "content of a run", found: other }),
            };
            if count == 0 {
                return Err(WireError::Value { what: "the length of a run in pages", found: 0 });
            }
            if count > most {
                return Err(WireError::TooLarge {
                    what: "length of a run in pages",
                    found: count,
                    limit: most,
                });
            }
            if first >= pages || count > pages - first {
                let found = first.saturating_add(count);
                return Err(WireError::TooLarge { what: "end of a run of pages", found, limit: pages });
            }
            let run = Run { pages: first..first + count, content };
            contents_bytes += run.payload_bytes();
            runs.push(run);
        }
        if contents_bytes > MAX_PAYLOAD_BYTES {
            let (what, limit) = ("bytes of pages in a frame", MAX_PAYLOAD_BYTES);
            return Err(WireError::TooLarge { what, found: contents_bytes, limit });
        }
        let fits = match self.compressed {
            true => (1..contents_bytes).contains(&self.payload_bytes),
            false => self.payload_bytes == contents_bytes,
        };
        if !fits {
            return Err(WireError::Value {
                what: "the length of a frame with these runs",
                found: self.payload_bytes,
            });
        }
        Ok(())
    }

    fn encode(&self, out: &mut Vec<u8>, runs: &[Run]) {
        let within = runs.len() <= MAX_RUNS && contents_bytes(runs) <= MAX_PAYLOAD_BYTES;
        assert!(within, "frame over its limits");
        let flag = |set: bool, flag: u16| if set { flag } else { 0 };
        let flags = flag(self.checksum.is_some(), HAS_CHECKSUM) | flag(self.compressed, COMPRESSED);
        out.clear();
        put(
            out,
            &RawFrame {
                magic: FRAME_MAGIC,
                runs: (self.runs as u16).into(),
                flags: flags.into(),
                sequence: self.sequence.into(),
                payload_bytes: (self.payload_bytes as u32).into(),
                checksum: self.checksum.unwrap_or(0).into(),
            },
        );
        for run in runs {
            let pages = run.pages.end.saturating_sub(run.pages.start);
            assert!((1..=MAX_ZERO_PAGES).contains(&pages), "run over its limits");
            put(
                out,
                &RawRun {
                    first: run.pages.start.into(),
                    pages: (pages as u32).into(),
                    content: match run.content {
                        Content::Data => DATA,
                        Content::Zero => ZERO,
                        Content::Hole => HOLE,
                    }
                    .into(),
                },
            );
        }
    }
}

impl Ack {
    /// Returns the [`ACK_BYTES`] bytes of the acknowledgement.
    pub fn encode(&self) -> [u8; ACK_BYTES] {
        let raw = RawAck { magic: ACK_MAGIC, reserved: 0.into(), sequence: self.sequence.into() };
        let mut bytes = [0; ACK_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Reads an acknowledgement.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one acknowledgement.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let raw: &RawAck = reader.take("acknowledgement")?;
        reader.end()?;
        if raw.magic != ACK_MAGIC {
            return Err(WireError::Magic { what: "acknowledgement", expected: ACK_MAGIC, found: raw.magic });
        }
        Ok(Self { sequence: raw.sequence.get() })
    }
}

const HAS_CHECKSUM: u16 = 1;
const COMPRESSED: u16 = 2;
const DATA: u32 = 1;
const ZERO: u32 = 2;
const HOLE: u32 = 3;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFrame {
    magic: [u8; 4],
    runs: U16,
    flags: U16,
    sequence: U64,
    payload_bytes: U32,
    checksum: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRun {
    first: U64,
    pages: U32,
    content: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAck {
    magic: [u8; 4],
    reserved: U32,
    sequence: U64,
}
