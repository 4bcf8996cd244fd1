//! Claims pages from the dirty set and encodes the next frame.

use std::ops::Range;
use std::sync::atomic::Ordering;

use memlane_kvm::ram::{GuestRam, zero_pages};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::frame::{Content, MAX_PAYLOAD_BYTES, MAX_RUNS, Run, contents_bytes, encode_head};

use crate::SendState;
use crate::checksum::checksum;

/// Claims pages for one frame, at or after `cursor` and then from the start of memory, until the frame is full, or has
/// `most_bytes` of contents, or nothing is left. Moves `cursor` behind the pages, so that each lane walks through memory
/// in order.
///
/// Each call begins one claim, and the caller must report its end to [`SendState::settle`].
pub(crate) fn claim_frame(send_state: &SendState, cursor: &mut u64, most_bytes: u64, runs: &mut Vec<Run>) {
    runs.clear();
    send_state.claims.fetch_add(1, Ordering::SeqCst);
    if send_state.is_quiesced() {
        return;
    }
    if let Some(fault_cursor) = send_state.take_fault_cursor() {
        *cursor = fault_cursor;
    }
    match send_state.lock_huge_pages() {
        Some(_one_at_a_time) => claim_huge_pages(send_state, cursor, runs),
        None => claim_small_pages(send_state, cursor, most_bytes, runs),
    }
    send_state.backlog.claimed(runs.iter().map(|run| run.pages.end - run.pages.start).sum());
}

/// Claims pages of [`PAGE_SIZE`] for one frame.
fn claim_small_pages(send_state: &SendState, cursor: &mut u64, most_bytes: u64, runs: &mut Vec<Run>) {
    // A page with contents takes this much of the room, and one without takes 1.
    let whole = send_state.zeros_beside;
    let mut room = send_state.room().min(most_bytes) / PAGE_SIZE * whole;
    let mut wrapped = false;
    while room >= whole && runs.len() < MAX_RUNS {
        // One claimed run may fall apart into as many runs as it has pages.
        let most = (room / whole).min((MAX_RUNS - runs.len()) as u64);
        let Some(pages) = send_state.dirty.claim(&send_state.in_flight, *cursor, most) else {
            if wrapped || *cursor == 0 {
                break;
            }
            (wrapped, *cursor) = (true, 0);
            continue;
        };
        *cursor = pages.end;
        let claimed = pages.end - pages.start;
        // Pages may be added to the last run, so it is counted before and after.
        let last = runs.len().saturating_sub(1);
        let before = contents_bytes(&runs[last..]);
        classify(send_state, pages, runs);
        let with_contents = (contents_bytes(&runs[last..]) - before) / PAGE_SIZE;
        room -= with_contents * whole + (claimed - with_contents);
    }
}

/// Claims whole huge pages for one frame.
fn claim_huge_pages(send_state: &SendState, cursor: &mut u64, runs: &mut Vec<Run>) {
    const MAX: u64 = MAX_PAYLOAD_BYTES / PAGE_SIZE;
    let claim = |from| send_state.dirty.claim(&send_state.in_flight, from, MAX);
    let Some(claimed) = claim(*cursor).or_else(|| claim(0)) else { return };
    // What is dirty is made of whole pages, and the cursor lies between two: only the end can lie
    // within one.
    let last = send_state.ram.whole(claimed.end - 1..claimed.end);
    let end = if last.end > claimed.end { last.start } else { claimed.end };
    let pages = claimed.start..end.max(claimed.start);
    send_state.dirty.insert_range(pages.end..claimed.end);
    send_state.in_flight.remove_range(pages.end..claimed.end);
    *cursor = pages.end;
    classify(send_state, pages.clone(), runs);
    if runs.len() > MAX_RUNS {
        // There are too many small runs of zeros and data for one frame, so all of it is sent as data.
        runs.clear();
        runs.push(Run { pages, content: Content::Data });
    }
}

/// Splits `pages` into runs by their contents, and looks for holes if there may be some.
fn classify(send_state: &SendState, pages: Range<u64>, runs: &mut Vec<Run>) {
    if send_state.sparse.load(Ordering::Relaxed) {
        classify_with_holes(&send_state.ram, pages, runs);
    } else {
        classify_zeros(&send_state.ram, pages, runs);
    }
}

/// Writes the frame's header and table to `head`, with a checksum if the guest is paused. Returns the bytes of payload.
pub(crate) fn encode_frame(send_state: &SendState, sequence: u64, runs: &[Run], head: &mut Vec<u8>) -> u64 {
    let checksum = send_state.paused.load(Ordering::Acquire).then(|| checksum(&send_state.ram, runs));
    encode_head(head, sequence, runs, checksum)
}

/// Splits `pages` into runs of holes, with data, and of zeros.
fn classify_with_holes(ram: &GuestRam, pages: Range<u64>, runs: &mut Vec<Run>) {
    // If the kernel cannot be asked for holes, the pages are read instead.
    let extents = ram.data_extents_uncached(pages.clone()).unwrap_or_else(|_| vec![pages.clone()]);
    let mut hole_from = pages.start;
    for extent in extents {
        add(runs, hole_from..extent.start, Content::Hole);
        hole_from = extent.end;
        classify_zeros(ram, extent, runs);
    }
    add(runs, hole_from..pages.end, Content::Hole);
}

/// Splits `pages` into runs with data and runs of zeros.
pub(crate) fn classify_zeros(ram: &GuestRam, pages: Range<u64>, runs: &mut Vec<Run>) {
    // If this fails, the pages are mapped one by one as they are read.
    let _ = ram.populate_read(pages.clone());
    for slice in ram.slices(pages) {
        // SAFETY: the slice is mapped as long as `ram` lives.
        for (page, zero) in (slice.first_page..).zip(unsafe { zero_pages(slice) }) {
            add(runs, page..page + 1, if zero { Content::Zero } else { Content::Data });
        }
    }
}

/// Adds pages to the last run if they continue it, and otherwise as a run of their own.
fn add(runs: &mut Vec<Run>, pages: Range<u64>, content: Content) {
    match runs.last_mut() {
        _ if pages.is_empty() => {}
        Some(last) if last.content == content && last.pages.end == pages.start => last.pages.end = pages.end,
        _ => runs.push(Run { pages, content }),
    }
}
