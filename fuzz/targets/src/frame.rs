//! What flows on a lane.

use lz4_flex::block::{compress, decompress_into};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::frame::{
    ACK_BYTES, Ack, Content, FRAME_HEADER_BYTES, Frame, MAX_PAYLOAD_BYTES, MAX_RUNS, PAGE_REQUEST_BYTES,
    PageRequest, RUN_BYTES, Run, contents_bytes, encode_compressed_head, encode_head,
};

/// So many frames are read at most: each may decompress to 2 MiB.
const MAX_FRAMES: usize = 8;

/// Reads frames one after the other, as a lane of a guest does whose number of pages comes first, and the short
/// messages that flow back.
pub fn frame(bytes: &[u8]) {
    let Some((pages, stream)) = bytes.split_first_chunk() else { return };
    let pages = u64::from_le_bytes(*pages);
    answers(stream, pages);
    let mut rest = stream;
    for _ in 0..MAX_FRAMES {
        let Some(after) = one_frame(rest, pages) else { return };
        rest = after;
    }
}

/// Reads one frame, and returns what comes behind it. Returns `None` if the lane ends here.
fn one_frame(bytes: &[u8], pages: u64) -> Option<&[u8]> {
    let (head, rest) = bytes.split_at_checked(FRAME_HEADER_BYTES)?;
    let frame = Frame::decode_any(head).ok()?;
    assert!(frame.runs <= MAX_RUNS && frame.payload_bytes <= MAX_PAYLOAD_BYTES);
    assert_eq!(Frame::decode(head).ok(), Some(frame).filter(|frame| !frame.compressed));
    let (table, rest) = rest.split_at_checked(frame.runs * RUN_BYTES)?;
    let mut runs = Vec::new();
    frame.decode_runs(table, pages, &mut runs).ok()?;
    check_runs(&runs, pages);
    check_encoded(&frame, &runs, pages);
    let (payload, rest) = rest.split_at_checked(frame.payload_bytes as usize)?;
    if frame.compressed {
        let mut contents = vec![0; contents_bytes(&runs) as usize];
        let found = decompress_into(payload, &mut contents).ok()?;
        if found != contents.len() {
            return None;
        }
        check_compressed(&contents, &runs, pages);
    }
    Some(rest)
}

fn check_runs(runs: &[Run], pages: u64) {
    for run in runs {
        assert!(run.pages.start < run.pages.end && run.pages.end <= pages);
        let bytes = (run.pages.end - run.pages.start) * PAGE_SIZE;
        assert_eq!(run.payload_bytes(), if run.content == Content::Data { bytes } else { 0 });
    }
    assert!(contents_bytes(runs) <= MAX_PAYLOAD_BYTES);
}

/// The same frame comes back from the bytes that a sender makes of it.
fn check_encoded(frame: &Frame, runs: &[Run], pages: u64) {
    let mut out = Vec::new();
    if frame.compressed {
        encode_compressed_head(&mut out, frame.sequence, runs, frame.checksum, frame.payload_bytes);
    } else {
        assert_eq!(encode_head(&mut out, frame.sequence, runs, frame.checksum), frame.payload_bytes);
    }
    let (head, table) = out.split_at(FRAME_HEADER_BYTES);
    assert_eq!(Frame::decode_any(head), Ok(*frame));
    let mut again = Vec::new();
    assert_eq!(frame.decode_runs(table, pages, &mut again), Ok(()));
    assert_eq!(again, runs);
}

/// What was decompressed is the same after it was compressed.
fn check_compressed(contents: &[u8], runs: &[Run], pages: u64) {
    let block = compress(contents);
    if block.len() < contents.len() {
        let (sequence, payload_bytes) = (1, block.len() as u64);
        let frame = Frame { sequence, runs: runs.len(), payload_bytes, checksum: None, compressed: true };
        check_encoded(&frame, runs, pages);
    }
    let mut again = vec![0; contents.len()];
    assert_eq!(decompress_into(&block, &mut again).ok(), Some(contents.len()));
    assert!(again == contents);
}

fn answers(stream: &[u8], pages: u64) {
    if let Some(bytes) = stream.get(..ACK_BYTES)
        && let Ok(ack) = Ack::decode(bytes)
    {
        assert_eq!(Ack::decode(&ack.encode()), Ok(ack));
    }
    if let Some(bytes) = stream.get(..PAGE_REQUEST_BYTES)
        && let Ok(request) = PageRequest::decode(bytes, pages)
    {
        assert!(!matches!(request, PageRequest::Page(page) if page >= pages));
        assert_eq!(PageRequest::decode(&request.encode(), pages), Ok(request));
    }
}
