//! Headers and tables of frames: what a lane believes before it writes to guest memory.

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::strategies;
use crate::PAGE_SIZE;
use crate::wire::WireError;
use crate::wire::frame::{
    ACK_BYTES, Ack, Content, FRAME_HEADER_BYTES, Frame, MAX_PAYLOAD_BYTES, MAX_RUNS, MAX_ZERO_PAGES,
    PAGE_REQUEST_BYTES, PageRequest, RUN_BYTES, Run, contents_bytes, encode_compressed_head, encode_head,
};

/// Pages of data that fit into a frame.
const MAX_DATA_PAGES: u64 = MAX_PAYLOAD_BYTES / PAGE_SIZE;
/// Pages of the guest in tests of single runs.
const PAGES: u64 = 1 << 20;

proptest! {
    #[test]
    fn a_frame_comes_back_as_it_was(
        (pages, runs) in strategies::frame(),
        sequence: u64,
        checksum: Option<u32>,
    ) {
        let mut head = vec![7; 3];
        let payload_bytes = encode_head(&mut head, sequence, &runs, checksum);
        prop_assert_eq!(head.len(), FRAME_HEADER_BYTES + runs.len() * RUN_BYTES);
        let (header, table) = head.split_at(FRAME_HEADER_BYTES);
        let frame = Frame::decode(header);
        let compressed = false;
        prop_assert_eq!(&frame, &Ok(Frame { sequence, runs: runs.len(), payload_bytes, checksum, compressed }));
        prop_assert_eq!(&Frame::decode_any(header), &frame);
        let mut found = vec![data(0, 1)];
        prop_assert_eq!(frame.unwrap().decode_runs(table, pages, &mut found), Ok(()));
        prop_assert_eq!(found, runs);
    }

    #[test]
    fn a_compressed_frame_comes_back_where_it_may_come(
        (pages, runs) in strategies::frame(),
        share in 0.0..1.0f64,
        checksum: Option<u32>,
    ) {
        let contents = contents_bytes(&runs);
        prop_assume!(contents > 0);
        let payload_bytes = ((contents as f64 * share) as u64).max(1);
        let mut head = Vec::new();
        encode_compressed_head(&mut head, 5, &runs, checksum, payload_bytes);
        let (header, table) = head.split_at(FRAME_HEADER_BYTES);
        let refused = Frame::decode(header).unwrap_err();
        prop_assert!(matches!(refused, WireError::Unknown { what: "frame flags", .. }), "{}", refused);
        let frame = Frame::decode_any(header).unwrap();
        let (runs_in_table, compressed) = (runs.len(), true);
        let expected = Frame { sequence: 5, runs: runs_in_table, payload_bytes, checksum, compressed };
        prop_assert_eq!(frame, expected);
        let mut found = Vec::new();
        prop_assert_eq!(frame.decode_runs(table, pages, &mut found), Ok(()));
        prop_assert_eq!(found, runs);
        // One that is as long as what is in it, or empty, is none.
        for payload_bytes in [0, contents, contents + 1] {
            let frame = Frame { payload_bytes, ..frame };
            prop_assert!(frame.decode_runs(table, pages, &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn a_frame_that_is_cut_or_lengthened_is_refused((pages, runs) in strategies::frame()) {
        let mut head = Vec::new();
        encode_head(&mut head, 1, &runs, None);
        let (header, table) = head.split_at(FRAME_HEADER_BYTES);
        for length in 0..header.len() {
            prop_assert!(Frame::decode(&header[..length]).is_err());
        }
        prop_assert_eq!(Frame::decode(&[header, &[0]].concat()), Err(WireError::Trailing(1)));
        let (frame, mut found) = (Frame::decode(header).unwrap(), Vec::new());
        for length in 0..table.len() {
            prop_assert!(frame.decode_runs(&table[..length], pages, &mut found).is_err());
        }
        let longer = [table, &[0; RUN_BYTES]].concat();
        let refused = Err(WireError::Trailing(RUN_BYTES));
        prop_assert_eq!(frame.decode_runs(&longer, pages, &mut found), refused);
    }

    #[test]
    fn a_frame_may_have_a_wrong_byte((pages, runs) in strategies::frame(), mask in 1..=u8::MAX) {
        let mut head = Vec::new();
        encode_head(&mut head, 1, &runs, Some(7));
        for at in 0..head.len() {
            head[at] ^= mask;
            survives(&head, pages)?;
            head[at] ^= mask;
        }
    }

    #[test]
    fn a_frame_may_be_anything(bytes in prop::collection::vec(any::<u8>(), 0..400), pages: u64) {
        survives(&bytes, pages)?;
    }

    /// Numbers that are nearly right reach the checks behind the first one.
    #[test]
    fn a_frame_may_say_anything(
        pages in 0..1000u64,
        flags in 0..5u16,
        runs in prop::collection::vec(
            (prop_oneof![0..1000u64, any::<u64>()], 0..300u32, 0..5u32),
            0..6,
        ),
        payload_pages in 0..300u32,
        less in 0..2u32,
    ) {
        let payload_bytes = (payload_pages * PAGE_SIZE as u32).saturating_sub(less);
        let header = header(runs.len() as u16, flags, payload_bytes);
        let runs = runs.into_iter().map(|(first, pages, content)| entry(first, pages, content));
        survives(&[header, runs.collect::<Vec<_>>().concat()].concat(), pages)?;
    }

    #[test]
    fn a_page_request_comes_back_as_it_was_and_names_a_page_of_the_guest((pages, request) in strategies::page_request()) {
        let bytes = request.encode();
        prop_assert_eq!(bytes.len(), PAGE_REQUEST_BYTES);
        prop_assert_eq!(PageRequest::decode(&bytes, pages), Ok(request));
        if let PageRequest::Page(page) = request {
            let refused =
                WireError::TooLarge { what: "number of a requested page", found: page, limit: page };
            prop_assert_eq!(PageRequest::decode(&bytes, page), Err(refused));
        }
    }

    #[test]
    fn a_page_request_may_be_anything(bytes in prop::collection::vec(any::<u8>(), 0..PAGE_REQUEST_BYTES * 2), pages: u64) {
        if let Ok(PageRequest::Page(page)) = PageRequest::decode(&bytes, pages) {
            prop_assert!(page < pages);
        }
    }

    #[test]
    fn an_acknowledgement_is_as_long_as_its_reader_asks_for(sequence: u64) {
        prop_assert_eq!(Ack { sequence }.encode().len(), ACK_BYTES);
    }
}

/// Reads a frame as a lane does; what is believed is within all bounds.
fn survives(bytes: &[u8], pages: u64) -> TestCaseResult {
    let (header, rest) = bytes.split_at(FRAME_HEADER_BYTES.min(bytes.len()));
    let Ok(frame) = Frame::decode_any(header) else { return Ok(()) };
    prop_assert_eq!(Frame::decode(header).is_ok(), !frame.compressed);
    prop_assert!(frame.runs <= MAX_RUNS && frame.payload_bytes <= MAX_PAYLOAD_BYTES);
    let table = &rest[..rest.len().min(frame.runs * RUN_BYTES)];
    let mut runs = Vec::new();
    if frame.decode_runs(table, pages, &mut runs).is_err() {
        return Ok(());
    }
    prop_assert_eq!(runs.len(), frame.runs);
    for run in &runs {
        prop_assert!(run.pages.start < run.pages.end && run.pages.end <= pages, "{run:?} of {pages}");
        prop_assert!(run.pages.end - run.pages.start <= MAX_ZERO_PAGES);
    }
    let contents = contents_bytes(&runs);
    prop_assert!(contents <= MAX_PAYLOAD_BYTES);
    let mut again = Vec::new();
    if frame.compressed {
        prop_assert!(frame.payload_bytes > 0 && frame.payload_bytes < contents);
        encode_compressed_head(&mut again, frame.sequence, &runs, frame.checksum, frame.payload_bytes);
    } else {
        prop_assert_eq!(encode_head(&mut again, frame.sequence, &runs, frame.checksum), contents);
    }
    prop_assert_eq!(Frame::decode_any(&again[..FRAME_HEADER_BYTES]), Ok(frame));
    Ok(())
}

#[test]
fn a_wrong_magic_names_both() {
    let mut bytes = header(0, 0, 0);
    bytes[..4].copy_from_slice(b"MLAk");
    let wrong = WireError::Magic { what: "frame", expected: *b"MLFr", found: *b"MLAk" };
    assert_eq!(Frame::decode(&bytes), Err(wrong));
    let mut bytes = Ack { sequence: 1 }.encode();
    bytes[..4].copy_from_slice(b"MLFr");
    let wrong = WireError::Magic { what: "acknowledgement", expected: *b"MLAk", found: *b"MLFr" };
    assert_eq!(Ack::decode(&bytes), Err(wrong));
}

#[test]
fn a_header_over_its_limits_is_refused() {
    let refused = |what, found, limit| Err(WireError::TooLarge { what, found, limit });
    for runs in [MAX_RUNS as u16 + 1, u16::MAX] {
        let want = refused("number of runs in a frame", runs.into(), MAX_RUNS as u64);
        assert_eq!(Frame::decode(&header(runs, 0, 0)), want);
    }
    for bytes in [MAX_PAYLOAD_BYTES as u32 + 1, u32::MAX] {
        let want = refused("length of a frame", bytes.into(), MAX_PAYLOAD_BYTES);
        assert_eq!(Frame::decode(&header(1, 0, bytes)), want);
    }
    for flags in [2, 0x8001] {
        let want = Err(WireError::Unknown { what: "frame flags", found: flags.into() });
        assert_eq!(Frame::decode(&header(1, flags, 0)), want);
    }
    let want = Err(WireError::Unknown { what: "frame flags", found: 6 });
    assert_eq!(Frame::decode_any(&header(1, 6, 0)), want);
    assert!(Frame::decode(&header(MAX_RUNS as u16, 1, MAX_PAYLOAD_BYTES as u32)).is_ok());
}

#[test]
fn a_run_has_pages_and_known_content() {
    for content in [0, 4, u32::MAX] {
        let unknown = WireError::Unknown { what: "content of a run", found: content };
        assert_eq!(decode_one(entry(0, 1, content), 0), Err(unknown));
    }
    for content in [1, 2, 3] {
        let empty = WireError::Value { what: "the length of a run in pages", found: 0 };
        assert_eq!(decode_one(entry(0, 0, content), 0), Err(empty));
    }
}

#[test]
fn a_run_is_not_over_its_limits() {
    let data = (1, MAX_DATA_PAGES, MAX_PAYLOAD_BYTES);
    for (content, limit, bytes) in [data, (2, MAX_ZERO_PAGES, 0), (3, MAX_ZERO_PAGES, 0)] {
        assert_eq!(decode_one(entry(0, limit as u32, content), bytes), Ok(()));
        for found in [limit + 1, u32::MAX.into()] {
            let refused = WireError::TooLarge { what: "length of a run in pages", found, limit };
            assert_eq!(decode_one(entry(0, found as u32, content), bytes), Err(refused));
        }
    }
}

#[test]
fn a_run_ends_within_the_guest() {
    for content in [2, 3] {
        assert_eq!(decode_one(entry(PAGES - 2, 2, content), 0), Ok(()));
        for (first, found) in [(PAGES - 1, PAGES + 1), (PAGES, PAGES + 2), (u64::MAX, u64::MAX)] {
            let refused = WireError::TooLarge { what: "end of a run of pages", found, limit: PAGES };
            assert_eq!(decode_one(entry(first, 2, content), 0), Err(refused));
        }
    }
}

#[test]
fn runs_are_together_as_long_as_the_header_says() {
    for bytes in [0, PAGE_SIZE, 2 * PAGE_SIZE + 1, 3 * PAGE_SIZE] {
        let wrong = WireError::Value { what: "the length of a frame with these runs", found: bytes };
        assert_eq!(decode_one(entry(0, 2, 1), bytes), Err(wrong));
    }
    // Each run is within its limit, and all of them are not.
    let table = [entry(0, MAX_DATA_PAGES as u32, 1), entry(0, 1, 1)].concat();
    for compressed in [false, true] {
        let (sequence, payload_bytes, checksum) = (1, MAX_PAYLOAD_BYTES, None);
        let frame = Frame { sequence, runs: 2, payload_bytes, checksum, compressed };
        let found = MAX_PAYLOAD_BYTES + PAGE_SIZE;
        let refused =
            WireError::TooLarge { what: "bytes of pages in a frame", found, limit: MAX_PAYLOAD_BYTES };
        assert_eq!(frame.decode_runs(&table, PAGES, &mut Vec::new()), Err(refused));
    }
}

#[test]
#[should_panic = "frame over its limits"]
fn too_much_data_is_not_encoded() {
    encode_head(&mut Vec::new(), 1, &[data(0, MAX_DATA_PAGES), data(0, 1)], None);
}

#[test]
#[should_panic = "a block that is not shorter"]
fn a_block_that_is_not_shorter_is_not_encoded() {
    encode_compressed_head(&mut Vec::new(), 1, &[data(0, 1)], None, PAGE_SIZE);
}

#[test]
#[should_panic = "run over its limits"]
fn too_many_zero_pages_are_not_encoded() {
    let run = Run { pages: 0..MAX_ZERO_PAGES + 1, content: Content::Hole };
    encode_head(&mut Vec::new(), 1, &[run], None);
}

#[test]
#[should_panic = "run over its limits"]
fn an_empty_run_is_not_encoded() {
    encode_head(&mut Vec::new(), 1, &[data(5, 0)], None);
}

fn data(first: u64, pages: u64) -> Run {
    Run { pages: first..first + pages, content: Content::Data }
}

fn decode_one(table: Vec<u8>, payload_bytes: u64) -> Result<(), WireError> {
    let frame = Frame { sequence: 1, runs: 1, payload_bytes, checksum: None, compressed: false };
    frame.decode_runs(&table, PAGES, &mut Vec::new())
}

fn header(runs: u16, flags: u16, payload_bytes: u32) -> Vec<u8> {
    let (runs, flags) = (runs.to_le_bytes(), flags.to_le_bytes());
    [b"MLFr", &runs[..], &flags, &1u64.to_le_bytes(), &payload_bytes.to_le_bytes(), &[0; 4]].concat()
}

fn entry(first: u64, pages: u32, content: u32) -> Vec<u8> {
    [&first.to_le_bytes()[..], &pages.to_le_bytes(), &content.to_le_bytes()].concat()
}
