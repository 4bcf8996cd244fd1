//! What a guest's files hold as data, and where they have holes.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use memlane_protocol::PAGE_SIZE;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::{GuestRam, backing};

impl GuestRam {
    /// The runs within `pages` that may hold something other than zeros (`SEEK_DATA`); all of
    /// them where the file cannot tell, as on hugetlbfs.
    ///
    /// Pages that another process has punched may be among them if they lie inside a run that
    /// was found earlier. They read as zeros, and reading them allocates them again.
    pub fn data_extents(&self, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut extents: Vec<Range<u64>> = Vec::new();
        for (index, piece) in self.pieces(pages) {
            let mut at = piece.start;
            while let Some(extent) = self.next_extent(index, at..piece.end)? {
                at = extent.end;
                match extents.last_mut() {
                    Some(last) if last.end >= extent.start => last.end = extent.end,
                    _ => extents.push(extent),
                }
            }
        }
        Ok(extents)
    }

    /// Bytes that the files hold, swapped or not, at once and without looking for where (`st_blocks`). Those that a
    /// file holds beside the guest's memory count with them, up to the memory's length, and so does what was reserved
    /// (`fallocate`) and never written.
    pub fn held_bytes(&self) -> io::Result<u64> {
        /// What `st_blocks` counts, whatever the file system's blocks.
        const BLOCK: u64 = 512;
        // By file: the bytes of its regions, and what it holds.
        let mut files = BTreeMap::new();
        for (region, mapped) in self.regions.iter().zip(&self.mapped) {
            let stat = rustix::fs::fstat(&*mapped.file)?;
            let held = u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK;
            files.entry((stat.st_dev, stat.st_ino)).or_insert((0, held)).0 += region.bytes;
        }
        Ok(files.values().map(|(bytes, held)| *bytes.min(held)).sum())
    }

    /// As [`data_extents`](Self::data_extents), and every hole is left out, whoever made it and
    /// however lately. It costs a system call for each page of data.
    pub fn extents_now(&self, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut extents: Vec<Range<u64>> = Vec::new();
        for (index, mut piece) in self.pieces(pages) {
            let huge = backing::is_huge(&self.regions[index]);
            // Not by SEEK_HOLE: that walks to the end of the run, far beyond the piece.
            while let Some(first) = self.seek_data(index, &piece)? {
                let end = if huge { piece.end } else { first + 1 };
                match extents.last_mut() {
                    Some(last) if last.end == first => last.end = end,
                    _ => extents.push(first..end),
                }
                piece.start = end;
            }
        }
        Ok(extents)
    }

    /// The blocks of so many pages, counted from page 0, that may hold something other than zeros,
    /// cut to `pages`; those that touch are one run.
    ///
    /// Where memory is held here and there it costs a system call for each block that holds some, and
    /// nothing for what lies between, however much; it does not look at how blocks are filled.
    pub fn data_blocks(&self, pages: Range<u64>, block_pages: u64) -> io::Result<Vec<Range<u64>>> {
        let mut blocks: Vec<Range<u64>> = Vec::new();
        for (index, mut piece) in self.pieces(pages) {
            let huge = backing::is_huge(&self.regions[index]);
            while let Some(first) = self.seek_data(index, &piece)? {
                let block = first / block_pages * block_pages;
                let start = piece.start.max(block);
                let end = if huge { piece.end } else { piece.end.min(block + block_pages) };
                match blocks.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => blocks.push(start..end),
                }
                piece.start = end;
            }
        }
        Ok(blocks)
    }

    /// The first of `pages` that may hold something other than zeros. However far off it is, finding it costs
    /// a system call for each region.
    pub fn next_data(&self, pages: Range<u64>) -> io::Result<Option<u64>> {
        self.pieces(pages)
            .map(|(index, piece)| self.seek_data(index, &piece))
            .find_map(io::Result::transpose)
            .transpose()
    }

    /// Has the next [`data_extents`](Self::data_extents) see the holes that other processes have
    /// made up to now.
    pub(crate) fn look_anew(&self) {
        self.data.forget(&(0..self.pages()));
    }

    /// The first of `pages`, which lie in one region, that may hold something other than zeros.
    pub(crate) fn first_data(&self, pages: &Range<u64>) -> io::Result<Option<u64>> {
        self.region_of(pages.start).map_or(Ok(None), |index| self.seek_data(index, pages))
    }

    /// The first run of data within `piece` of region `index`. It is never empty, whatever the
    /// other users of the file do meanwhile.
    fn next_extent(&self, index: usize, piece: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if piece.is_empty() {
            return Ok(None);
        }
        if let Some(end) = self.data.end_of_run(piece.start) {
            return Ok(Some(piece.start..end.min(piece.end)));
        }
        let Some(first) = self.seek_data(index, &piece)? else { return Ok(None) };
        let (file, data) = self.file_range(index, &(first..piece.end));
        let region_end = self.mapped[index].pages.end;
        let last = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => first + hole.saturating_sub(data).div_ceil(PAGE_SIZE),
            // Nothing is there any more, of what was just found: somebody made a hole, or cut the file.
            Err(Errno::NXIO) => {
                self.check_length(index)?;
                region_end
            }
            Err(error) => return Err(error.into()),
        };
        let run = first..last.clamp(first + 1, region_end);
        self.data.note(run.clone());
        Ok(Some(first..run.end.min(piece.end)))
    }

    /// The first page of `piece` of region `index` that the file holds as data.
    fn seek_data(&self, index: usize, piece: &Range<u64>) -> io::Result<Option<u64>> {
        if piece.is_empty() {
            return Ok(None);
        }
        let (file, begin) = self.file_range(index, piece);
        match rustix::fs::seek(file, SeekFrom::Data(begin)) {
            Ok(data) => {
                let page = piece.start + data.saturating_sub(begin) / PAGE_SIZE;
                Ok((page < piece.end).then_some(page))
            }
            // So it is beyond the end of a file that was cut, which must not pass for a hole.
            Err(Errno::NXIO) => self.check_length(index).map(|()| None),
            Err(error) => Err(error.into()),
        }
    }
}
