//! The first iteration goes over all of the guest's memory, which it write-protects piece by piece just ahead of the
//! lanes.

use std::ops::Range;
use std::sync::Arc;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::control::MAX_RANGES;

use super::error::CopyError;
use super::precopy::Precopy;

/// This many pages are write-protected at once, just ahead of the lanes, so that a VMM never protects much of its guest
/// in one go.
const PIECE_PAGES: u64 = (64 << 20) / PAGE_SIZE;
/// This many pages are write-protected at once where there is no data: nothing is to be protected there but what comes
/// into being at that very moment. It is not all of a large guest at once, since KVM's dirty log has to protect each
/// page all the same.
const HOLE_PAGES: u64 = (64 << 30) / PAGE_SIZE;
/// This many pages are write-protected at once if block I/O has to come to an end before they may be read: so it stands
/// still seldom.
const SETTLED_PAGES: u64 = (1 << 30) / PAGE_SIZE;
/// This many write-protected pages may wait for the lanes.
const AHEAD_PAGES: u64 = (256 << 20) / PAGE_SIZE;

impl Precopy {
    /// Write-protects all memory piece by piece, and releases it to the lanes. A piece is protected before it is looked
    /// at, so a page that comes into being later is noticed as written.
    pub(super) async fn first_iteration(&self) -> Result<(), CopyError> {
        let transfer = &self.transfer;
        let ram = &transfer.guest.ram;
        let pages = ram.pages();
        let reads_directly = transfer.guest.driver.reads_directly();
        let at_once = if reads_directly { SETTLED_PAGES } else { PIECE_PAGES };
        let mut holes = Vec::new();
        let (mut first, mut settled) = (0, 0);
        while first < pages {
            let piece = next_piece(ram, first, at_once).await.map_err(CopyError::Memory)?;
            let begins = first == 0;
            first = piece.end;
            let data = match transfer.guest.driver.write_protect(piece.clone()).await? {
                Some(data) => Ok(data),
                None if begins => first_extents(ram, piece.clone()).await,
                None => data_extents(ram, piece.clone()).await,
            };
            let data = data.map_err(CopyError::Memory)?;
            // Also without such a disk: one may come, and that is to be noticed before it goes again.
            if reads_directly || piece.end - settled >= SETTLED_PAGES {
                transfer.settle().await?;
                settled = piece.end;
            }
            let mut fresh = 0;
            let mut hole_from = piece.start;
            for extent in data {
                add_hole(&mut holes, hole_from..extent.start);
                hole_from = extent.end;
                fresh += transfer.outbound.dirty.insert_range(extent);
            }
            add_hole(&mut holes, hole_from..piece.end);
            if holes.len() >= MAX_RANGES / 2 {
                transfer.send_holes(&mut holes).await?;
            }
            let mut ahead = transfer.outbound.dirty.count();
            if fresh > 0 {
                transfer.outbound.publish_ahead(pages - piece.end);
            }
            while ahead > AHEAD_PAGES {
                transfer.wait_for_lanes().await?;
                ahead = transfer.outbound.dirty.count();
            }
        }
        // Memory may have ended in holes, which were counted until now.
        transfer.outbound.publish();
        transfer.send_holes(&mut holes).await?;
        transfer.until_holes_are_made().await
    }
}

/// Returns the pages from `first` on that are write-protected together: `at_once`, or many times that if there is nothing
/// in them now. That is no promise, as the guest runs: they are looked at once they are protected.
async fn next_piece(ram: &Arc<GuestRam>, first: u64, at_once: u64) -> std::io::Result<Range<u64>> {
    let ram = ram.clone();
    let look = move || {
        let (piece, hole) = (first + at_once, first + HOLE_PAGES);
        let data = ram.next_data(first..hole)?.unwrap_or(hole);
        // Huge pages are write-protected whole, wherever they begin.
        Ok(ram.whole(first..(data / at_once * at_once).max(piece).min(ram.pages())))
    };
    tokio::task::spawn_blocking(look).await.expect("looking does not panic")
}

/// Returns, soon, what the first piece holds, since lanes have nothing to do before. Meanwhile the kernel looks for the
/// end of the run that goes on in the next piece.
async fn first_extents(ram: &Arc<GuestRam>, piece: Range<u64>) -> std::io::Result<Vec<Range<u64>>> {
    let (ram, ahead) = (ram.clone(), ram.clone());
    let end = piece.end;
    let look = move || {
        if piece.end - piece.start > PIECE_PAGES {
            ram.data_extents(piece)
        } else {
            ram.data_extents_uncached(piece)
        }
    };
    // It is remembered what was found.
    drop(tokio::task::spawn_blocking(move || ahead.data_extents(end - 1..end)));
    tokio::task::spawn_blocking(look).await.expect("looking does not panic")
}

/// Returns the runs of `pages` that may hold data. It works on a thread of its own, because looking for the end of a
/// long run takes the kernel long.
async fn data_extents(ram: &Arc<GuestRam>, pages: Range<u64>) -> std::io::Result<Vec<Range<u64>>> {
    let ram = ram.clone();
    let look = tokio::task::spawn_blocking(move || ram.data_extents(pages));
    look.await.expect("looking does not panic")
}

fn add_hole(holes: &mut Vec<Range<u64>>, hole: Range<u64>) {
    match holes.last_mut() {
        _ if hole.is_empty() => {}
        Some(last) if last.end == hole.start => last.end = hole.end,
        _ => holes.push(hole),
    }
}
