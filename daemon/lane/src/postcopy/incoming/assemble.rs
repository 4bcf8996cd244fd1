//! Cuts a frame's runs into pieces that can be placed in one call.

use std::io;
use std::ops::Range;

use memlane_kvm::vmm_mapping::VmmMapping;
use memlane_protocol::wire::frame::{Content, Run};

use super::invalid;

/// A part of a frame that is placed in one call.
pub(super) enum Piece {
    /// The piece is whole pages, all of them with contents.
    Data(Range<u64>),
    /// The piece is whole pages of zeros.
    Zero(Range<u64>),
    /// The piece is one huge page that is zero except for the bytes of these parts.
    Mixed(Range<u64>, Vec<Range<u64>>),
    /// The piece is whole pages that are holes at the source.
    Hole(Range<u64>),
}

/// A huge page whose runs are not all read yet.
struct Open {
    unit: Range<u64>,
    /// Its runs are read up to this page.
    end: u64,
    parts: Vec<Range<u64>>,
    holes: bool,
}

/// Cuts the runs of a frame into pieces, in the order of their bytes. A frame must hold a huge page completely or not at
/// all.
///
/// # Errors
///
/// Fails if the frame holds a part of a huge page.
pub(super) fn assemble(memory: &VmmMapping, runs: &[Run]) -> io::Result<Vec<Piece>> {
    let torn = || invalid("a frame holds a part of a huge page");
    let mut pieces = Vec::with_capacity(runs.len());
    let mut open: Option<Open> = None;
    for run in runs {
        for (_, mut pages) in memory.pieces(run.pages.clone()) {
            if memory.unit_of(pages.start) == 1 {
                if open.is_some() {
                    return Err(torn());
                }
                pieces.push(match run.content {
                    Content::Data => Piece::Data(pages),
                    Content::Zero => Piece::Zero(pages),
                    Content::Hole => Piece::Hole(pages),
                });
                continue;
            }
            while !pages.is_empty() {
                let unit = memory.whole(pages.start..pages.start + 1);
                let part = pages.start..pages.end.min(unit.end);
                pages.start = part.end;
                let mut page = open.take().unwrap_or_else(|| Open {
                    end: unit.start,
                    unit: unit.clone(),
                    parts: Vec::new(),
                    holes: true,
                });
                if page.unit != unit || page.end != part.start {
                    return Err(torn());
                }
                page.end = part.end;
                page.holes &= run.content == Content::Hole;
                if run.content == Content::Data {
                    page.parts.push(part);
                }
                if page.end < unit.end {
                    open = Some(page);
                    continue;
                }
                pieces.push(match page.parts.as_slice() {
                    [] if page.holes => Piece::Hole(unit),
                    [] => Piece::Zero(unit),
                    [only] if *only == unit => Piece::Data(unit),
                    _ => Piece::Mixed(unit, page.parts),
                });
            }
        }
    }
    if open.is_some() { Err(torn()) } else { Ok(pieces) }
}
