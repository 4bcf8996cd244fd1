//! The first iteration: all of the guest's memory, write-protected piece by piece just ahead of the lanes.

use std::ops::Range;
use std::sync::Arc;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::control::MAX_RANGES;

use super::error::CopyError;
use super::precopy::Precopy;

/// Pages armed at once, just ahead of the lanes: a VMM never protects much of its guest in
/// one go.
const PIECE_PAGES: u64 = (64 << 20) / PAGE_SIZE;
/// The same where nothing is: there is nothing to protect but what comes into being at that very moment. Not
/// all of a large guest at once, since KVM's dirty log is told of each page all the same.
const HOLE_PAGES: u64 = (64 << 30) / PAGE_SIZE;
/// Armed pages that wait for the lanes.
const AHEAD_PAGES: u64 = (256 << 20) / PAGE_SIZE;

impl Precopy {
    /// Arms and releases all memory, piece by piece. A piece is armed before it is looked at,
    /// so a page that comes into being later is noticed as written.
    pub(super) async fn first_iteration(&self) -> Result<(), CopyError> {
        let transfer = &self.transfer;
        let ram = &transfer.guest.ram;
        let pages = ram.pages();
        let mut holes = Vec::new();
        let mut first = 0;
        while first < pages {
            let piece = next_piece(ram, first).await.map_err(CopyError::Memory)?;
            let begins = first == 0;
            first = piece.end;
            let data = match transfer.guest.driver.write_protect(piece.clone()).await? {
                Some(data) => Ok(data),
                None if begins => first_extents(ram, piece.clone()).await,
                None => data_extents(ram, piece.clone()).await,
            };
            let data = data.map_err(CopyError::Memory)?;
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

/// The pages from `first` on that are armed together: a piece, or many if there is nothing in them now. That
/// is no promise, as the guest runs: they are looked at once they are armed.
async fn next_piece(ram: &Arc<GuestRam>, first: u64) -> std::io::Result<Range<u64>> {
    let ram = ram.clone();
    let look = move || {
        let (piece, hole) = (first + PIECE_PAGES, first + HOLE_PAGES);
        let data = ram.next_data(first..hole)?.unwrap_or(hole);
        // Huge pages are armed whole, wherever they begin.
        Ok(ram.whole(first..(data / PIECE_PAGES * PIECE_PAGES).max(piece).min(ram.pages())))
    };
    tokio::task::spawn_blocking(look).await.expect("looking does not panic")
}

/// What the first piece holds, soon, since lanes have nothing to do before. Meanwhile the kernel looks for the end
/// of the run that goes on in the next one.
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

/// What of `pages` may hold something. On a thread of its own: looking for the end of a long run
/// of data takes the kernel long.
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
