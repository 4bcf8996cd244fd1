//! From the set of dirty pages to the next frame.

use std::ops::Range;
use std::sync::atomic::Ordering;

use memlane_kvm::ram::{GuestRam, zero_pages};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::frame::{Content, MAX_PAYLOAD_BYTES, MAX_RUNS, Run, contents_bytes, encode_head};

use crate::SendState;
use crate::checksum::checksum;

/// Claims pages for one frame, at or after `cursor` and then from the start, until the frame is full,
/// `most_bytes` of it are contents, or nothing is left. Moves `cursor` behind what it took, so that
/// each lane walks through memory in order.
///
/// Each call is one of the claims that [`SendState::settle`] has to be told the end of.
pub fn claim_frame(outbound: &SendState, cursor: &mut u64, most_bytes: u64, runs: &mut Vec<Run>) {
    runs.clear();
    outbound.claims.fetch_add(1, Ordering::SeqCst);
    if outbound.is_held() {
        return;
    }
    if let Some(nearest) = outbound.take_nearest() {
        *cursor = nearest;
    }
    match outbound.lock_whole() {
        Some(_one_at_a_time) => claim_whole(outbound, cursor, runs),
        None => claim_small(outbound, cursor, most_bytes, runs),
    }
    outbound.left.claimed(runs.iter().map(|run| run.pages.end - run.pages.start).sum());
}

/// Claims pages one by one for one frame.
fn claim_small(outbound: &SendState, cursor: &mut u64, most_bytes: u64, runs: &mut Vec<Run>) {
    // What a page takes of the room if it has contents: others take 1.
    let whole = outbound.zeros_beside;
    let mut room = outbound.room().min(most_bytes) / PAGE_SIZE * whole;
    let mut wrapped = false;
    while room >= whole && runs.len() < MAX_RUNS {
        // One claimed run may fall apart into as many runs as it has pages.
        let most = (room / whole).min((MAX_RUNS - runs.len()) as u64);
        let Some(pages) = outbound.dirty.claim(&outbound.in_flight, *cursor, most) else {
            if wrapped || *cursor == 0 {
                break;
            }
            (wrapped, *cursor) = (true, 0);
            continue;
        };
        *cursor = pages.end;
        let claimed = pages.end - pages.start;
        // Which may become longer.
        let last = runs.len().saturating_sub(1);
        let before = contents_bytes(&runs[last..]);
        sort_out(outbound, pages, runs);
        let with_contents = (contents_bytes(&runs[last..]) - before) / PAGE_SIZE;
        room -= with_contents * whole + (claimed - with_contents);
    }
}

/// Claims whole pages of the guest's own size for one frame.
fn claim_whole(outbound: &SendState, cursor: &mut u64, runs: &mut Vec<Run>) {
    const MOST: u64 = MAX_PAYLOAD_BYTES / PAGE_SIZE;
    let claim = |from| outbound.dirty.claim(&outbound.in_flight, from, MOST);
    let Some(claimed) = claim(*cursor).or_else(|| claim(0)) else { return };
    // What is dirty is made of whole pages, and the cursor lies between two: only the end can lie
    // within one.
    let last = outbound.ram.whole(claimed.end - 1..claimed.end);
    let end = if last.end > claimed.end { last.start } else { claimed.end };
    let pages = claimed.start..end.max(claimed.start);
    outbound.dirty.insert_range(pages.end..claimed.end);
    outbound.in_flight.remove_range(pages.end..claimed.end);
    *cursor = pages.end;
    sort_out(outbound, pages.clone(), runs);
    if runs.len() > MAX_RUNS {
        // A patchwork of zeros and data: as it is.
        runs.clear();
        runs.push(Run { pages, content: Content::Data });
    }
}

fn sort_out(outbound: &SendState, pages: Range<u64>, runs: &mut Vec<Run>) {
    if outbound.sparse.load(Ordering::Relaxed) {
        sort_out_holes(&outbound.ram, pages, runs);
    } else {
        sort_out_zeros(&outbound.ram, pages, runs);
    }
}

/// Writes the frame's header and table; with a checksum if the guest stands still.
pub fn encode_frame(outbound: &SendState, sequence: u64, runs: &[Run], head: &mut Vec<u8>) -> u64 {
    let checksum = outbound.still.load(Ordering::Acquire).then(|| checksum(&outbound.ram, runs));
    encode_head(head, sequence, runs, checksum)
}

/// Splits `pages` into runs of holes, with data, and of zeros.
fn sort_out_holes(ram: &GuestRam, pages: Range<u64>, runs: &mut Vec<Run>) {
    // If the file cannot be asked, reading still tells what the pages hold.
    let extents = ram.data_extents_uncached(pages.clone()).unwrap_or_else(|_| vec![pages.clone()]);
    let mut hole_from = pages.start;
    for extent in extents {
        add(runs, hole_from..extent.start, Content::Hole);
        hole_from = extent.end;
        sort_out_zeros(ram, extent, runs);
    }
    add(runs, hole_from..pages.end, Content::Hole);
}

/// Splits `pages` into runs with data and runs of zeros.
pub fn sort_out_zeros(ram: &GuestRam, pages: Range<u64>, runs: &mut Vec<Run>) {
    // What cannot be mapped in one go is when it is read.
    let _ = ram.populate_read(pages.clone());
    for slice in ram.slices(pages) {
        // SAFETY: the slice is mapped as long as `ram` lives.
        for (page, zero) in (slice.first_page..).zip(unsafe { zero_pages(slice) }) {
            add(runs, page..page + 1, if zero { Content::Zero } else { Content::Data });
        }
    }
}

/// Adds pages behind the last run, or to it.
fn add(runs: &mut Vec<Run>, pages: Range<u64>, content: Content) {
    match runs.last_mut() {
        _ if pages.is_empty() => {}
        Some(last) if last.content == content && last.pages.end == pages.start => last.pages.end = pages.end,
        _ => runs.push(Run { pages, content }),
    }
}
