//! [`SpreadLayout`]: a little memory, spread over a large guest.

use std::ops::Range;

/// The number of pieces that the memory is spread in.
pub(crate) const PIECES: u64 = 64;

/// The place of the pages that may be touched. They lie in pieces at equal distances; the first piece begins and the
/// last one ends with the memory. Each begins with its share of the working set. Numbers, from 0, go through the
/// working set piece by piece, and then through the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpreadLayout {
    free: Range<u64>,
    /// The number of pages of the working set in each piece.
    written: u64,
    /// The number of other pages in each piece.
    rest: u64,
}

impl SpreadLayout {
    /// Spreads the memory over the pages `free`.
    pub(crate) fn new(free: Range<u64>, working_set_pages: u64, resident_pages: u64) -> Result<Self, String> {
        if !working_set_pages.is_multiple_of(PIECES) || !resident_pages.is_multiple_of(PIECES) {
            return Err(format!(
                "what is resident, and the working set, must be multiples of {}KiB",
                PIECES * 4
            ));
        }
        let rest = resident_pages.checked_sub(working_set_pages);
        let rest = rest.ok_or("the working set must be a part of what is resident")? / PIECES;
        if resident_pages > (free.end - free.start) / 2 {
            return Err("at most half of RAM can be what is resident".into());
        }
        Ok(Self { free, written: working_set_pages / PIECES, rest })
    }

    /// Returns the page that has a number.
    pub(crate) fn page(&self, number: u64) -> u64 {
        match number.checked_sub(self.written * PIECES) {
            None => self.begin(number / self.written) + number % self.written,
            Some(number) => self.begin(number / self.rest) + self.written + number % self.rest,
        }
    }

    /// Returns the number of a page; `None` if it is in no piece.
    pub(crate) fn number(&self, page: u64) -> Option<u64> {
        let from = page.checked_sub(self.free.start)?;
        // Beginnings are rounded down, as this is: it may be the one after.
        let about = from * (PIECES - 1) / self.span();
        let piece = [about, about + 1].into_iter().find(|piece| self.piece(*piece).contains(&page))?;
        let offset = page - self.begin(piece);
        Some(match offset.checked_sub(self.written) {
            None => piece * self.written + offset,
            Some(offset) => self.written * PIECES + piece * self.rest + offset,
        })
    }

    /// Returns the pieces, in order.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        (0..PIECES).map(|piece| self.piece(piece))
    }

    fn piece(&self, piece: u64) -> Range<u64> {
        let begin = self.begin(piece);
        begin..begin + self.written + self.rest
    }

    fn begin(&self, piece: u64) -> u64 {
        self.free.start + piece * self.span() / (PIECES - 1)
    }

    /// Returns the number of pages from the beginning of the first piece to that of the last one.
    fn span(&self) -> u64 {
        self.free.end - self.free.start - self.written - self.rest
    }
}
