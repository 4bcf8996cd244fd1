//! Which pages a guest's files hold as data, and where they have holes (lseek(2), `SEEK_DATA` and `SEEK_HOLE`).

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use memlane_protocol::PAGE_SIZE;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::GuestRam;
use super::layout::is_huge;

/// The number of bytes that are read at once of a huge page.
const READ_BYTES: usize = 256 << 10;

impl GuestRam {
    /// Returns the runs within `pages` that may hold something other than zeros; all of them where the file cannot
    /// tell, as on hugetlbfs.
    ///
    /// Holes that another process has punched may be among them if they lie inside a run that was found earlier.
    /// They read as zeros, and reading them allocates them again.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the file was truncated ([`RamFault::Truncated`](super::RamFault)).
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

    /// Returns how many bytes the files have allocated, swapped out or not (stat(2), `st_blocks`). It takes a
    /// system call for each region, however large. What a file holds beside the guest's memory counts too, up to
    /// the memory's length, and so does what was reserved (fallocate(2)) and never written.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        /// The unit of `st_blocks`, whatever the file system's blocks.
        const BLOCK: u64 = 512;
        // For each file, the bytes of its regions and the bytes that it has allocated.
        let mut files = BTreeMap::new();
        for (region, mapped) in self.regions.iter().zip(&self.mapped) {
            let stat = rustix::fs::fstat(&*mapped.file)?;
            let allocated = u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK;
            files.entry((stat.st_dev, stat.st_ino)).or_insert((0, allocated)).0 += region.bytes;
        }
        Ok(files.values().map(|(bytes, allocated)| *bytes.min(allocated)).sum())
    }

    /// Returns the runs within `pages` that may hold something other than zeros, without every hole that there is
    /// now, also those that another process has just punched. Unlike [`data_extents`](Self::data_extents) it costs
    /// a system call for each page of data.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the file was truncated ([`RamFault::Truncated`](super::RamFault)).
    pub fn data_extents_uncached(&self, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut extents: Vec<Range<u64>> = Vec::new();
        for (index, mut piece) in self.pieces(pages) {
            let huge = is_huge(&self.regions[index]);
            // SEEK_HOLE would walk to the end of the run, far beyond the piece.
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

    /// Returns the blocks of `block_pages` pages, counted from page 0, that may hold something other than zeros,
    /// cut to `pages`. Blocks that touch are returned as one run.
    ///
    /// It costs a system call for each block that holds data, and nothing for the holes between, however long. It
    /// does not look at how much of a block is data.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the file was truncated ([`RamFault::Truncated`](super::RamFault)).
    pub fn data_blocks(&self, pages: Range<u64>, block_pages: u64) -> io::Result<Vec<Range<u64>>> {
        let mut blocks: Vec<Range<u64>> = Vec::new();
        for (index, mut piece) in self.pieces(pages) {
            let huge = is_huge(&self.regions[index]);
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

    /// Returns the first of `pages` that may hold something other than zeros. It costs a system call for each
    /// region, however far off the page is.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the file was truncated ([`RamFault::Truncated`](super::RamFault)).
    pub fn next_data(&self, pages: Range<u64>) -> io::Result<Option<u64>> {
        self.pieces(pages)
            .map(|(index, piece)| self.seek_data(index, &piece))
            .find_map(io::Result::transpose)
            .transpose()
    }

    /// Returns the runs within `pages` that the files do not hold, as they are now: an access through the mapping would
    /// allocate them.
    ///
    /// The kernel does not tell for huge pages. Those that read as zeros (read(2) allocates nothing) are returned, so
    /// that some may be held. It costs two system calls for each run, and reads all huge pages.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the file was truncated ([`RamFault::Truncated`](super::RamFault)).
    pub fn holes(&self, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut holes: Vec<Range<u64>> = Vec::new();
        let mut add = |hole: Range<u64>| match holes.last_mut() {
            Some(last) if last.end == hole.start => last.end = hole.end,
            _ if hole.is_empty() => {}
            _ => holes.push(hole),
        };
        for (index, mut piece) in self.pieces(pages) {
            if is_huge(&self.regions[index]) {
                self.zero_units(index, piece)?.into_iter().for_each(&mut add);
                continue;
            }
            while let Some(data) = self.seek_data(index, &piece)? {
                add(piece.start..data);
                piece.start = self.end_of_data(index, data)?.min(piece.end);
            }
            add(piece);
        }
        Ok(holes)
    }

    /// Makes the next [`data_extents`](Self::data_extents) see the holes that other processes have made up to now.
    pub(crate) fn forget_data_extents(&self) {
        self.extent_cache.remove(&(0..self.pages()));
    }

    /// Returns the first of `pages`, which lie in one region, that may hold something other than zeros.
    pub(crate) fn first_data(&self, pages: &Range<u64>) -> io::Result<Option<u64>> {
        self.region_of(pages.start).map_or(Ok(None), |index| self.seek_data(index, pages))
    }

    /// Returns the first run of data within `piece` of region `index`. The run is never empty, whatever the other
    /// users of the file do meanwhile.
    fn next_extent(&self, index: usize, piece: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if piece.is_empty() {
            return Ok(None);
        }
        if let Some(end) = self.extent_cache.end_of_extent(piece.start) {
            return Ok(Some(piece.start..end.min(piece.end)));
        }
        let Some(first) = self.seek_data(index, &piece)? else { return Ok(None) };
        let run = first..self.end_of_data(index, first)?;
        self.extent_cache.insert(run.clone());
        Ok(Some(first..run.end.min(piece.end)))
    }

    /// Returns where the data ends that page `first` of region `index` begins, at the region's end at the latest.
    fn end_of_data(&self, index: usize, first: u64) -> io::Result<u64> {
        let region_end = self.mapped[index].pages.end;
        let (file, data) = self.file_range(index, &(first..region_end));
        let last = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => first + hole.saturating_sub(data).div_ceil(PAGE_SIZE),
            // What was just found is there no more: a hole was made, or the file was truncated.
            Err(Errno::NXIO) => {
                self.check_length(index)?;
                region_end
            }
            Err(error) => return Err(error.into()),
        };
        Ok(last.clamp(first + 1, region_end))
    }

    /// Returns the huge pages within `pages` of region `index` that read as zeros.
    fn zero_units(&self, index: usize, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let unit = u64::from(self.regions[index].page_bytes) / PAGE_SIZE;
        let mut buffer = vec![0; READ_BYTES];
        let mut zero = Vec::new();
        let mut rest = self.whole(pages);
        while !rest.is_empty() {
            let page = rest.start..rest.start + unit;
            rest.start = page.end;
            if self.reads_as_zeros(index, &page, &mut buffer)? {
                zero.push(page);
            }
        }
        Ok(zero)
    }

    /// Returns whether the file holds nothing but zeros in `pages` of region `index`.
    fn reads_as_zeros(&self, index: usize, pages: &Range<u64>, buffer: &mut [u8]) -> io::Result<bool> {
        let (file, begin) = self.file_range(index, pages);
        let end = begin + (pages.end - pages.start) * PAGE_SIZE;
        let mut at = begin;
        while at < end {
            let wanted = buffer.len().min((end - at) as usize);
            let read = file.read_at(&mut buffer[..wanted], at)?;
            if read == 0 {
                self.check_length(index)?;
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if buffer[..read].iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += read as u64;
        }
        Ok(true)
    }

    /// Returns the first page of `piece` of region `index` that the file holds as data.
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
            // This is also the answer beyond the end of a file that was truncated, which must not pass for a hole.
            Err(Errno::NXIO) => self.check_length(index).map(|()| None),
            Err(error) => Err(error.into()),
        }
    }
}
