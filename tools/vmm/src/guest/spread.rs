//! [`Spread`]: a little memory, all over a large guest.

use std::ops::Range;

/// Pieces that memory is spread in.
pub const PIECES: u64 = 64;

/// Where those pages lie that may be touched: in pieces at equal distances, of which the first begins and the last
/// ends with the memory. Each begins with its share of the working set. Numbers, from 0, go through the working set
/// piece by piece, and then through the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spread {
    free: Range<u64>,
    /// Pages of the working set in each piece,
    written: u64,
    /// and pages beside them.
    rest: u64,
}

impl Spread {
    /// Over the pages `free`.
    pub fn new(free: Range<u64>, working_set_pages: u64, resident_pages: u64) -> Result<Self, String> {
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

    /// The page of a number.
    pub fn page(&self, number: u64) -> u64 {
        match number.checked_sub(self.written * PIECES) {
            None => self.begin(number / self.written) + number % self.written,
            Some(number) => self.begin(number / self.rest) + self.written + number % self.rest,
        }
    }

    /// The number of a page; `None` if it is in no piece.
    pub fn number(&self, page: u64) -> Option<u64> {
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

    /// The pieces, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        (0..PIECES).map(|piece| self.piece(piece))
    }

    fn piece(&self, piece: u64) -> Range<u64> {
        let begin = self.begin(piece);
        begin..begin + self.written + self.rest
    }

    fn begin(&self, piece: u64) -> u64 {
        self.free.start + piece * self.span() / (PIECES - 1)
    }

    /// Pages from the beginning of the first piece to that of the last.
    fn span(&self) -> u64 {
        self.free.end - self.free.start - self.written - self.rest
    }
}
