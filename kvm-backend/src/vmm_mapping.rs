//! [`VmmMapping`]: where a guest's memory lies in the process of its VMM.

use std::ops::Range;
use std::sync::Arc;

use memlane_protocol::PAGE_SIZE;

use crate::ram::GuestRam;

/// The number of bytes that one page table of small pages maps.
const TABLE_BYTES: u64 = 2 << 20;

/// Where each region of a guest's memory lies in another process, the one that runs the guest. A userfaultfd of
/// that process, and its `pagemap`, take addresses in it.
#[derive(Debug)]
pub struct VmmMapping {
    ram: Arc<GuestRam>,
    regions: Vec<RegionMapping>,
}

/// Where one region lies in the other process.
#[derive(Debug)]
pub(crate) struct RegionMapping {
    pages: Range<u64>,
    /// The address of the region's first byte there.
    address: u64,
    /// The number of 4 KiB pages in a page of the region's own size.
    unit: u64,
}

impl VmmMapping {
    /// Returns the mapping of `ram` in a process in which the regions begin at these `addresses`; `None` if the
    /// number of addresses differs from that of regions, or a region cannot lie at its address.
    pub fn new(ram: Arc<GuestRam>, addresses: &[u64]) -> Option<Self> {
        if addresses.len() != ram.regions().len() {
            return None;
        }
        let regions = ram.pieces(0..ram.pages()).zip(ram.regions()).zip(addresses);
        let regions = regions.map(|(((_, pages), region), &address)| {
            address.checked_add(region.bytes)?;
            let fits = address.is_multiple_of(region.page_bytes.into());
            fits.then_some(RegionMapping { pages, address, unit: u64::from(region.page_bytes) / PAGE_SIZE })
        });
        let regions = regions.collect::<Option<_>>()?;
        Some(Self { ram, regions })
    }

    /// Returns the same memory as it is mapped in this process.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Returns where `pages` lie, region by region: the addresses in the other process, and the pages that lie
    /// there.
    pub fn pieces(&self, pages: Range<u64>) -> impl Iterator<Item = (Range<u64>, Range<u64>)> + '_ {
        let pieces = self.ram.pieces(pages);
        pieces.map(|(index, piece)| (self.regions[index].addresses(&piece), piece))
    }

    /// Returns the page at an address of the other process, if the guest's memory lies there.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| region.page_at(address))
    }

    /// Returns how many 4 KiB pages a page of the region has that `page` lies in: 1, or 512 for huge pages.
    pub fn unit_of(&self, page: u64) -> u64 {
        self.region_of(page).map_or(1, |region| region.unit)
    }

    /// Returns `pages` grown to whole pages of the sizes of the regions that they begin and end in; see
    /// [`GuestRam::whole`].
    pub fn whole(&self, pages: Range<u64>) -> Range<u64> {
        self.ram.whole(pages)
    }

    /// Returns where the regions lie, in their order.
    pub(crate) fn regions(&self) -> &[RegionMapping] {
        &self.regions
    }

    fn region_of(&self, page: u64) -> Option<&RegionMapping> {
        self.ram.region_of(page).map(|index| &self.regions[index])
    }
}

impl RegionMapping {
    /// Returns the region's pages.
    pub(crate) fn pages(&self) -> Range<u64> {
        self.pages.clone()
    }

    /// Returns how many 4 KiB pages are in a page of the region's own size.
    pub(crate) fn unit(&self) -> u64 {
        self.unit
    }

    /// Returns the addresses of `pages` of this region in the other process.
    pub(crate) fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        let address = |page: u64| self.address + (page - self.pages.start) * PAGE_SIZE;
        address(pages.start)..address(pages.end)
    }

    /// Returns the pages of this region that share a page table with `page` in the other process.
    pub(crate) fn table_of(&self, page: u64) -> Range<u64> {
        let table = self.addresses(&(page..page + 1)).start / TABLE_BYTES * TABLE_BYTES;
        self.pages_at(&(table..table + TABLE_BYTES))
    }

    /// Returns the pages at `addresses` of the other process, as far as they belong to this region.
    pub(crate) fn pages_at(&self, addresses: &Range<u64>) -> Range<u64> {
        let page = |address: u64| {
            let page = self.pages.start + address.saturating_sub(self.address) / PAGE_SIZE;
            page.min(self.pages.end)
        };
        page(addresses.start)..page(addresses.end)
    }

    fn page_at(&self, address: u64) -> Option<u64> {
        let page = self.pages.start + address.checked_sub(self.address)? / PAGE_SIZE;
        (page < self.pages.end).then_some(page)
    }
}

#[cfg(test)]
mod tests {
    use memlane_lab::{HugePages, say_skipped};

    use super::*;
    use crate::ram::Backing;

    #[test]
    fn pages_are_found_by_address_and_addresses_by_page() {
        let layout = [(0, 0x3000), (16 << 20, 0x2000)];
        let ram = Arc::new(GuestRam::create(&layout, &Backing::Memfd).unwrap());
        // In another order than the guest sees them, and side by side.
        let mapping = VmmMapping::new(ram.clone(), &[0x7000_2000, 0x7000_0000]).unwrap();
        let pieces: Vec<_> = mapping.pieces(1..5).collect();
        assert_eq!(pieces, [(0x7000_3000..0x7000_5000, 1..3), (0x7000_0000..0x7000_2000, 3..5)]);
        assert_eq!(mapping.page_at(0x7000_1fff), Some(4));
        assert_eq!(mapping.page_at(0x7000_2000), Some(0));
        assert_eq!([0x6fff_ffff, 0x7000_5000].map(|address| mapping.page_at(address)), [None; 2]);
        assert_eq!(mapping.regions()[1].pages_at(&(0x7000_1000..0x7000_3000)), 4..5);
        assert_eq!(mapping.regions()[0].table_of(1), 0..3);
        assert_eq!((mapping.whole(1..4), mapping.whole(3..3), mapping.unit_of(4)), (1..4, 3..3, 1));
        for wrong in [&[0x7000_0000][..], &[0x7000_0001, 0], &[u64::MAX - 0xfff, 0]] {
            assert!(VmmMapping::new(ram.clone(), wrong).is_none());
        }
    }

    #[test]
    fn huge_pages_are_taken_whole() {
        let test = "finding 2 MiB pages in another process";
        let _pages = match HugePages::reserve(3) {
            Ok(pages) => pages,
            Err(error) => return say_skipped(test, &format!("{error:#}")),
        };
        let layout = [(0, 2 << 20), (16 << 20, 4 << 20)];
        let ram = match GuestRam::create(&layout, &Backing::HugeMemfd) {
            Ok(ram) => Arc::new(ram),
            Err(error) => return say_skipped(test, &error.to_string()),
        };
        assert!(VmmMapping::new(ram.clone(), &[0, 0x1000]).is_none());
        let mapping = VmmMapping::new(ram, &[8 << 20, 32 << 20]).unwrap();
        assert_eq!((mapping.whole(5..6), mapping.whole(511..1025)), (0..512, 0..1536));
        assert_eq!((mapping.unit_of(5), mapping.page_at(35 << 20)), (512, Some(512 + 768)));
    }
}
